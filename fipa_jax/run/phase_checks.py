"""Do a phase's choices fit together? Refusals of one line.

What undoes something else, would end in NaN or do nothing shows before data are loaded.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from fipa_jax.aggregate.aggregator import Aggregator
from fipa_jax.aggregate.rules import AGGREGATORS
from fipa_jax.client import first_order, layer_steps, second_order, terms
from fipa_jax.config import fields
from fipa_jax.config.checks import WITHOUT_VIEWS
from fipa_jax.federation.channel import FAULTS

BY_CURVATURE = second_order.BY_CURVATURE | layer_steps.BY_CURVATURE  # {local.optimizer: what it steps by}
MATCHED = ("image", "layer_inputs", "layers", "sketch")  # curvature by whose rules' damping clients may step
# What FIPA does: field of `aggregator` -> what it is where nothing is done.
BY_SKETCHES = {
    "form": "damped",
    "trust": False,
    "own_damping": False,
    "past.kind": "none",
    "past.adaptive": False,
    "late.max_drift": 0.0,
}
BY_SKETCHES_ALONE = ("past.adaptive", "late.max_drift")  # of these, what no other rule does


@contextlib.contextmanager
def naming(phase: str, where: str, settings: ConfigDict) -> Iterator[None]:
    """A context in which a ValueError that begins with a field of a phase names it as the config has it, and where.

    Args:
      phase: the group of the config, `warmup` or `fipa`.
      where: what the phase is called.
      settings: its fields.
    """
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bconfig\.(fipa|warmup)\.", f"config.{phase}.", str(error))
        path = re.match(r"(?:config\.)?(?!config\.|fipa\.|warmup\.)([\w.]+)", text)
        if path and _is_field(settings, path[1]):
            text = f"config.{phase}.{text.removeprefix('config.')}"
        raise ValueError(f"{text} (in {where})") from error


def _is_field(settings: ConfigDict, path: str) -> bool:
    """Whether there is such a field, or group of fields, in a phase."""
    group = settings
    for name in path.split("."):
        if not isinstance(group, ConfigDict) or name not in group:
            return False
        group = group[name]
    return True


def check_cohort(config: ConfigDict, num_clients: int) -> None:
    """Refuses a cohort of more clients than there are."""
    if config.cohort > num_clients:
        raise ValueError(f"config.cohort: {config.cohort} is above the number of clients, {num_clients}")


def check_fit(
    settings: ConfigDict, aggregator: Aggregator, term: terms.Term, cohort: int, num_clients: int, augmented: bool
) -> None:
    """Refuses choices of which one would undo the other, with a ValueError that names the config field.

    Args:
      augmented: whether the task has random views.
    """
    if aggregator.needs.loss:
        _check_trust(settings, term, augmented, everyone=cohort == num_clients)
    if settings.local.optimizer in BY_CURVATURE:
        _check_by_curvature(settings, aggregator)
    if aggregator.needs.curvature == "sketch":
        # Local work that follows the sketches is else left aside, so that rules without them can be compared.
        _check_own_damping(settings, aggregator)
        _checkmatched(settings, aggregator)
        _check_adaptive(settings)
        _check_gradients(settings, aggregator)
        _check_adaptive_damping(settings)
    if aggregator.needs.curvature == "image":
        _check_sums(settings, aggregator)
        _checkmatched(settings, aggregator)
    if aggregator.needs.curvature == "core":
        _check_span(settings)
        _checkmatched(settings, aggregator)
    if aggregator.needs.curvature not in ("none", "sketch"):
        _check_unused(settings)
    if aggregator.needs.curvature not in ("none", "posterior", "sketch"):
        _check_no_pairs(settings, aggregator)
    _check_beliefs(settings, aggregator, everyone=cohort == num_clients)
    if settings.also_trained:
        _check_trains(settings, term)
    _check_compression(settings)
    _check_local_work(settings, aggregator, term)
    _check_kept(settings, aggregator, term)
    _check_faults(settings, aggregator, cohort)


def _check_trains(settings: ConfigDict, term: terms.Term) -> None:
    """Refuses what knows only what is sent: it cannot work on what is trained besides."""
    if settings.local.optimizer not in first_order.OPTIMIZERS:
        raise ValueError(
            f"config.fipa.also_trained: needs a first-order solver, as {settings.local.optimizer!r} goes by the "
            "curvature of `trainable` alone; set it to ''"
        )
    if term.init is not terms.none().init:
        raise ValueError(
            f"config.fipa.also_trained: the term {settings.term.name!r} keeps what clients send, not what they "
            "train; set it to '', or take another term"
        )
    if settings.cache_body:
        raise ValueError("config.fipa.also_trained: with cache_body there is the head alone; set cache_body to False")


def _check_trust(settings: ConfigDict, term: terms.Term, augmented: bool, everyone: bool) -> None:
    plain = settings.server.optimizer == "sgd" and not settings.server.average
    if not (everyone and plain and not terms.changes_the_step(term)):
        raise ValueError(
            "config.fipa.aggregator.trust: needs the losses of all clients in every round, server.optimizer = 'sgd', "
            "no server.average and a term that leaves the step as it is; set config.cohort = 0, or trust to False"
        )
    changes = term.whole_batch or (term.init is not terms.none().init and term.penalty is not terms.none().penalty)
    if changes:
        raise ValueError(
            f"config.fipa.aggregator.trust: with the term {settings.term.name!r} clients have another objective in "
            "each round or batch, and their losses judge no step; take another term, or set trust to False"
        )
    if augmented and settings.local.views and settings.local.optimizer not in WITHOUT_VIEWS:
        raise ValueError(
            "config.fipa.aggregator.trust: with local.views clients train on random views of their examples, and their "
            "losses on the examples as they are judge no step; set local.views or config.data.augment to False, or "
            "trust to False"
        )
    if settings.late.share:
        raise ValueError("config.fipa.aggregator.trust: needs clients that are not late; set late.share = 0")
    if settings.server.lr != 1:
        raise ValueError(f"config.fipa.aggregator.trust: needs server.lr = 1, got {settings.server.lr}")


def _check_by_curvature(settings: ConfigDict, aggregator: Aggregator) -> None:
    """Refuses steps by curvature that clients do not have as they begin."""
    optimizer, by = settings.local.optimizer, BY_CURVATURE[settings.local.optimizer]
    if aggregator.needs.curvature not in by.needs or aggregator.needs.at != "broadcast":
        raise ValueError(
            f"config.fipa.local.optimizer: {optimizer!r} steps by the client's {by.words} at the broadcast parameters, "
            f"of which the rule {settings.aggregator.name!r} knows none; set aggregator.name = {by.rule!r} and "
            "aggregator.at = 'broadcast', or another optimizer"
        )
    _checkmatched(settings, aggregator)
    group = "aggregator" if matched(settings, aggregator) else "local"
    if not settings[group].damping > 0:
        raise ValueError(f"config.fipa.{group}.damping: {optimizer!r} divides by it, it needs more than 0")


def _check_beliefs(settings: ConfigDict, aggregator: Aggregator, everyone: bool) -> None:
    """Refuses beliefs that only one side of the federation has."""
    served, has_duals = aggregator.needs.curvature == "posterior", settings.term.name == "duals"
    if served != (settings.local.optimizer == "ivon"):
        raise ValueError(
            "config.fipa.local.optimizer: 'ivon' and aggregator.name = 'posterior' need each other: clients send the "
            "precisions that the rule merges; compare the method 'fedivon'"
        )
    admm = served and settings.aggregator.posterior.form == "admm"
    if has_duals != admm:
        raise ValueError(
            "config.fipa.term.name: 'duals' and aggregator.posterior.form = 'admm' need each other; compare the method "
            "'ivon_admm'"
        )
    if served and settings.term.name not in ("none", "duals"):
        raise ValueError("config.fipa.term.name: 'ivon' takes the term 'duals' or 'none'")
    if admm and (settings.late.share or not everyone):
        raise ValueError(
            "config.fipa.aggregator.posterior.form: 'admm' needs all clients in every round, none of them late; set "
            "config.cohort = 0 and late.share = 0, or take 'sum'"
        )


def _check_sums(settings: ConfigDict, aggregator: Aggregator) -> None:
    """Refuses what a sum over the clients cannot serve."""
    optimizer = settings.local.optimizer
    if settings.late.share:
        raise ValueError(
            "config.fipa.late.share: the rule 'sums' adds up products with one basis, and a late client's are with "
            "another; set it to 0"
        )
    if aggregator.needs.gradient != (optimizer == "gradient"):
        needed, form = ("= 'gradient'", "gradient") if aggregator.needs.gradient else ("that trains", "galerkin")
        raise ValueError(
            f"config.fipa.local.optimizer: aggregator.sums.form = {form!r} needs a local solver {needed}, got "
            f"{optimizer!r}"
        )


def _check_span(settings: ConfigDict) -> None:
    """Refuses clients that answer with something else than gradients and cores, or about another basis."""
    if settings.local.optimizer != "gradient":
        raise ValueError(
            "config.fipa.local.optimizer: the rule 'span' asks about directions of gradients and needs clients that "
            f"send them; set it to 'gradient', got {settings.local.optimizer!r}, or compare the method 'fipa_span'"
        )
    if settings.late.share:
        raise ValueError(
            "config.fipa.late.share: the rule 'span' asks about the present basis, and a late client answers about "
            "another; set it to 0"
        )


def _check_unused(settings: ConfigDict) -> None:
    """Refuses what FIPA does with sketches where another rule by curvature does nothing of the kind."""
    name = settings.aggregator.name
    takes = set(inspect.signature(AGGREGATORS[name]).parameters)
    for path, nothing in BY_SKETCHES.items():
        taken = path.partition(".")[0] in takes and path not in BY_SKETCHES_ALONE
        if not taken and fields.value(settings.aggregator, path) != nothing:
            raise ValueError(
                f"config.fipa.aggregator.{path}: the rule {name!r} has no use for it; set it to {nothing!r}, or "
                "compare a method of that rule, which does"
            )


def _check_no_pairs(settings: ConfigDict, aggregator: Aggregator) -> None:
    """Refuses what is done to eigenpairs where clients send none."""
    of_pairs = ("budget", "link", "deadline", "energy", "gradient_scale", "store")
    of_pairs += () if aggregator.needs.curvature == "core" else ("bits",)
    if found := [name for name in of_pairs if settings.sketch[name]]:
        nothing = "''" if found[0] == "store" else "0"
        raise ValueError(
            f"config.fipa.sketch.{found[0]}: is of eigenpairs, and under the rule {settings.aggregator.name!r} clients "
            f"send none; set it to {nothing}"
        )


def _check_gradients(settings: ConfigDict, aggregator: Aggregator) -> None:
    """Refuses updates that are no gradients where the rule takes them for such."""
    if not aggregator.needs.gradient:
        return
    if settings.local.optimizer != "gradient":
        raise ValueError(
            "config.fipa.local.optimizer: aggregator.past.kind = 'curvature' needs clients that send gradients; set it "
            f"to 'gradient', got {settings.local.optimizer!r}"
        )
    if settings.aggregator.form != "damped" or settings.aggregator.relative or not settings.aggregator.damping > 0:
        raise ValueError(
            "config.fipa.aggregator.damping: past.kind = 'curvature' divides gradients by it, it needs form = "
            "'damped', relative = False and damping above 0"
        )
    if settings.late.share:
        raise ValueError(
            "config.fipa.late.share: past.kind = 'curvature' takes gradients for those at the present parameters; set "
            "it to 0"
        )


def _check_compression(settings: ConfigDict) -> None:
    """Refuses compressed updates of which something is lost, or read as what it is not."""
    name, term = settings.local.compress.name, settings.term.name
    if (name == "top_k") != (term == "feedback"):
        raise ValueError(
            "config.fipa.term.name: local.compress.name = 'top_k' and the term 'feedback', which keeps what it leaves "
            f"out, go together; got {name!r} and {term!r}"
        )
    if name == "change" and term != "varp":
        raise ValueError(
            f"config.fipa.term.name: local.compress.name = 'change' needs 'varp', which keeps updates; got {term!r}"
        )
    if settings.local.compress.name != "none" and settings.also_trained:
        raise ValueError("config.fipa.also_trained: compressed updates are of all that is trained; set it to ''")


def _check_own_damping(settings: ConfigDict, aggregator: Aggregator) -> None:
    local = settings.local
    steps = local.steps or local.epochs
    one_step = local.optimizer == "natural_gradient" or (local.optimizer == "gauss_newton" and steps == 1)
    if aggregator.needs.damping and not (local.optimizer in first_order.LINEAR or one_step):
        raise ValueError(
            "config.fipa.aggregator.own_damping: needs local.optimizer = 'sgd', whose damping is 1 / (lr steps), "
            f"'momentum', 'nesterov' or one 'gauss_newton' step, got {local.optimizer!r} with {steps}; set it to False"
        )


def _checkmatched(settings: ConfigDict, aggregator: Aggregator) -> None:
    if not settings.local.matched:
        return
    if "damping" not in aggregator.hyper:
        rule = settings.aggregator.form if settings.aggregator.name == "fipa" else settings.aggregator.name
        raise ValueError(
            f"config.fipa.local.matched: {rule!r} has no damping to match; set aggregator.form = 'damped' (fipa), or "
            "matched to False"
        )
    if settings.local.optimizer not in ("gauss_newton", *BY_CURVATURE):
        known = ", ".join(map(repr, BY_CURVATURE))
        raise ValueError(f"config.fipa.local.matched: needs local.optimizer = 'gauss_newton', {known}; set it to False")
    if settings.aggregator.relative:
        raise ValueError("config.fipa.local.matched: needs an absolute damping; set aggregator.relative to False")


def _check_adaptive(settings: ConfigDict) -> None:
    optimizer = settings.local.optimizer
    if settings.local.adaptive.scale and optimizer not in first_order.LOCAL_SOLVERS:
        raise ValueError(f"config.fipa.local.adaptive.scale: {optimizer!r} takes its own number of steps; set it to 0")


def _check_adaptive_damping(settings: ConfigDict) -> None:
    """Refuses a damping that follows successive steps where these are not by the clients' gradients."""
    rule = settings.aggregator
    if not rule.past.adaptive:
        return
    if rule.form != "damped" or not (settings.local.matched or rule.own_damping):
        raise ValueError(
            "config.fipa.aggregator.past.adaptive: needs updates that the rule undoes, local.matched = True or "
            "aggregator.own_damping = True, and aggregator.form = 'damped'; set it to False"
        )


def _check_local_work(settings: ConfigDict, aggregator: Aggregator, term: terms.Term) -> None:
    """Refuses terms whose slope the clients' local work never meets, or whose correction is in other units."""
    name, local = settings.term.name, settings.local
    if local.optimizer == "gradient" and term.correct is not terms.none().correct:
        raise ValueError(
            f"config.fipa.term.name: {name!r} corrects the server's step by what clients send, and with "
            "local.optimizer = 'gradient' they send gradients, which are in other units; take another term or solver"
        )
    if term.needs.several_steps and _one_step(settings, aggregator):
        raise ValueError(
            f"config.fipa.term.name: {name!r} pulls back to where a client starts, and with local.optimizer = "
            f"{local.optimizer!r} and one local step it never leaves; take more steps, or set term.name = 'none'"
        )
    if term.whole_batch and local.batch_size == 1 and local.optimizer in first_order.LOCAL_SOLVERS:
        raise ValueError(
            f"config.fipa.local.batch_size: the term {name!r} compares a batch's examples with each other, and needs "
            "2 or more, or 0 for all, got 1"
        )


def _check_kept(settings: ConfigDict, aggregator: Aggregator, term: terms.Term) -> None:
    """Refuses kept updates beside a rule that sees none, keeps them itself, or goes by those of the cohort alone."""
    name, past = settings.term.name, settings.aggregator.past
    if term.remember is not None and aggregator.needs.curvature == "image":
        raise ValueError(
            f"config.fipa.term.name: {name!r} keeps what each client sends, and the rule 'sums' is for a server that "
            "sees sums alone; set it to 'none'"
        )
    if not terms.changes_the_updates(term) or aggregator.needs.curvature != "sketch":
        return
    if past.kind in ("latest", "targets"):
        raise ValueError(
            f"config.fipa.term.name: with {name!r} the absent clients' last updates stand in for them, and with "
            f"aggregator.past.kind = {past.kind!r} they take part already; set one of both to 'none'"
        )
    if past.adaptive:
        raise ValueError(
            f"config.fipa.aggregator.past.adaptive: goes by the gradients of the cohort, to which {name!r} adds those "
            "of other clients; set it to False, or term.name = 'none'"
        )


def _one_step(settings: ConfigDict, aggregator: Aggregator) -> bool:
    """Whether clients take one step from where they start, whatever their data."""
    local = settings.local
    if local.optimizer not in first_order.LOCAL_SOLVERS:
        return local.optimizer in ("gradient", "natural_gradient")
    if local.adaptive.scale and aggregator.needs.curvature == "sketch":
        return False
    return local.steps == 1 or (not local.steps and local.epochs == 1 and not local.batch_size)


def _check_faults(settings: ConfigDict, aggregator: Aggregator, cohort: int) -> None:
    """Refuses faults that cannot happen, and a minimum of clients that no round reaches."""
    optimizer = settings.local.optimizer
    several = optimizer in first_order.LOCAL_SOLVERS and not _one_step(settings, aggregator)
    if settings.faults.straggle and not several:
        raise ValueError(
            f"config.fipa.faults.straggle: needs a first-order solver that takes several steps, got local.optimizer "
            f"= {optimizer!r} with local.steps = {settings.local.steps}; set it to 0"
        )
    if settings.least_clients > cohort:
        raise ValueError(
            f"config.fipa.least_clients: {settings.least_clients} is above the number of clients in a round, "
            f"{cohort}: every round would be skipped"
        )


def matched(settings: ConfigDict, aggregator: Aggregator) -> bool:
    """Whether the clients' steps take the rule's damping, or its belief; they cannot where it is another's."""
    if aggregator.needs.curvature == "posterior":
        return True
    return settings.local.matched and aggregator.needs.curvature in MATCHED


def has_faults(settings: ConfigDict) -> bool:
    """Whether a fault can happen in this phase."""
    return any(settings.faults[kind] for kind in FAULTS)
