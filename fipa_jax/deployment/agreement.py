"""What do a federation's server and clients share before it begins? A method, a model, and what an upload looks like.

Each of them makes it by itself, from the same config and the same first model; a `wire.fingerprint` tells where they
have not.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.config import fields
from fipa_jax.config.checks import validate
from fipa_jax.config.methods import method
from fipa_jax.deployment import wire
from fipa_jax.deployment.packing import Bits, packed
from fipa_jax.federation.channel import Channel, ChannelRates, late
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.round import by_clients, sketch, train
from fipa_jax.federation.server import uploads_of
from fipa_jax.federation.state import State
from fipa_jax.run.experiment import first_params, store_on_host
from fipa_jax.run.phase_checks import check_cohort, has_faults, naming
from fipa_jax.run.phase_parts import make_parts, make_rates
from fipa_jax.tasks.task import Task

SHARED = (
    "the server must know what clients keep from round to round (SCAFFOLD, FedDyn, IVON-ADMM); that does not travel"
)
RUN = 8  # bytes that tell a server's runs apart
WARMUP = "warmup"  # the phase of this name, instead of a method
# Fields by which clients work: of a run, beside the model's; of a phase, and of its rule; what may differ by machine.
WORKED_BY = (
    *("precision", "seed", "task.name", "task.kind", "task.standardise", "task.window", "task.equation"),
    *("task.boundary_weight", "data.name", "data.side", "data.loss", "data.augment", "data.rotation", "data.flip"),
)
OF_PHASE = ("trainable", "also_trained", "local", "sketch", "term")
OF_RULE = ("name", "at", "layers", "posterior", "sums", "span")
OF_MACHINE = {"local": "micro_batch", "sketch": "micro_batch"}


class Agreement(NamedTuple):
    """What server and clients share."""

    name: str  # of the method, in the metrics file
    parts: Parts  # of its rounds, as the server has them
    rates: Rates
    params: Any  # the whole model's, that the first round starts from
    root: jax.Array  # the key from which all random numbers derive
    rounds: int
    store_on_host: bool  # whether what a term keeps of clients lies on the server's host
    max_skips: int  # so many skipped rounds in a row end the run; 0 for never
    late: int  # rounds after which an answer may still come in; 0 where only those of this round count
    bits: Bits  # in how many bits entries travel
    like: Any  # shapes of a client's (upload, training loss)
    example: Any  # shapes of one example, {field: [...]}
    said: Any  # shapes of what the server says beside the parameters, see `said_of`
    fingerprint: str

    def precision(self) -> contextlib.AbstractContextManager:
        """A context with jax's precision as this federation needs it; a thread begins with jax's own."""
        wide = [leaf.dtype == np.float64 for leaf in jax.tree.leaves(self.params)]
        return jax.enable_x64(any(wide))

    @property
    def keeps(self) -> bool:
        """Whether clients keep something from round to round."""
        chosen = trees.select(self.params, self.parts.trainable)
        return self.parts.term.remember is None and bool(jax.tree.leaves(jax.eval_shape(self.parts.term.init, chosen)))

    @property
    def remembers(self) -> bool:
        """Whether the server keeps something of each client, by which one could speak for another."""
        return self.parts.aggregator.needs.ids or self.parts.term.remember is not None

    @property
    def in_turns(self) -> bool:
        """Whether in a round only some of the clients send curvature."""
        return self.parts.sketcher is not None and self.parts.sketcher.due is not None

    def of_server(self) -> Parts:
        """The parts as the server has them: what clients keep is theirs alone."""
        term = self.parts.term
        return self.parts if term.remember else self.parts._replace(term=term._replace(init=terms.none().init))

    def of_clients(self, due: bool = True) -> Parts:
        """The parts as a client has them: what the server says takes the place of the rule's state.

        Args:
          due: whether it sends curvature.
        """
        rule, sketcher = self.parts.aggregator, self.parts.sketcher
        rule = rule._replace(asks=_asked, needs=rule.needs._replace(spread=False))  # bases travel without filling
        if sketcher is not None and self.in_turns:
            sketcher = sketcher._replace(due=_everybody if due else _nobody)
        return self.parts._replace(
            announce=_told, aggregator=rule, sketcher=sketcher, channel=Channel(), chunk=1, mesh=None
        )


def agree(
    config: ConfigDict,
    task: Task,
    num_clients: int,
    example: Mapping[str, Any],
    *,
    spec: str = "fipa",
    late: int = 0,
    params: Any = None,
) -> Agreement:
    """The agreement on one method of a config, without anybody's data.

    Example:
      agree(config, problem.task, 4, problem.test, spec="fedavg")

    Args:
      config: all fields.
      task: what is learned.
      num_clients: T.
      example: {field: [N, ...]}, examples of the task, of which only shapes and types count.
      spec: the method, as in `config.compare`; or `warmup`, the warm-up, whose model is then the method's first.
      late: see `Agreement.late`.
      params: the first model; None for the one that the config draws or names, `config.init_from`.

    Raises:
      ValueError: the config asks for what a federation of real clients cannot do; names the field.
    """
    validate(config)
    if config.personal.compare:
        raise ValueError("config.personal.compare: clients' own models are a simulation's last stage; set it to ()")
    check_cohort(config, num_clients)
    config = only(config, spec)
    phase, settings = ("warmup", config.warmup) if spec == WARMUP else ("fipa", method(config, spec))
    with naming(phase, f"the method {spec!r}", settings), jax.enable_x64(config.precision == "float64"):
        check(settings)
        parts = make_parts(config, settings, task, num_clients)
        _check_parts(parts, late)
        rates = make_rates(settings, config.precision)._replace(channel=ChannelRates())
        parts = parts._replace(channel=_channel(late), chunk=1, mesh=None)
        root = jax.random.key(config.seed)
        params = first_params(config, task, root) if params is None else params
        mark = fingerprint_of(parts, params, worked_by(config, settings))
        said = jax.eval_shape(lambda params: said_of(parts, first_rule(parts, params)), params)
        steering = settings.rounds, store_on_host(config, parts, params), settings.max_skips, late
        draft = Agreement(
            spec, parts, rates, params, root, *steering, _bits_of(settings), None, _one_of(example), said, mark
        )
        return draft._replace(like=_shapes(draft, example))


def only(config: ConfigDict, spec: str) -> ConfigDict:
    """The config of one phase alone: a method, without a warm-up before it, or the warm-up.

    Raises:
      ValueError: a warm-up would come before the method.
    """
    config = config.copy_and_resolve_references()
    if spec == WARMUP:
        config.fipa.rounds = 0
        return config
    if config.warmup.rounds:
        raise ValueError(
            "config.warmup.rounds: a federation has one phase; let one with spec = 'warmup' come first, then set this "
            "to 0 and config.init_from to the model that it leaves"
        )
    config.compare = (spec,)
    return config


def check(settings: ConfigDict) -> None:
    """Refuses fields of a phase that only a simulation can follow, with a ValueError that names the field."""
    if settings.privacy.epsilon:
        raise ValueError(
            "config.fipa.privacy.epsilon: the noisy sum is a simulation's channel, and a deployed server would see "
            "each upload; set it to 0"
        )
    if settings.late.share or has_faults(settings):
        field = "late.share" if settings.late.share else "faults"
        raise ValueError(f"{field}: draws delays or faults for a study; a real federation has its own, set it to 0")
    if settings.most_bytes_up:
        raise ValueError(
            "most_bytes_up: ends a simulation's phase; stop a server when its rows say so, and set it to 0"
        )
    if settings.local.compress.name == "change":
        raise ValueError(
            "local.compress.name: 'change' needs what a client sent last at both ends, which differ once an answer is "
            "lost; set it to 'few_bits'"
        )
    if settings.term.name == "duals":  # which the rule follows by itself
        raise ValueError(f"term.name: {SHARED}")
    for field in ("pooled", "cache_body"):
        if settings[field]:
            raise ValueError(f"{field}: needs all clients' data in one place, which a real federation has not")


def _check_parts(parts: Parts, late: int) -> None:
    """Refuses what needs more than one upload from each client, and late answers that are of no use."""
    needs = parts.aggregator.needs
    if late and (needs.gradient or needs.curvature in ("image", "core")):
        raise ValueError(
            "late: the rule asks for gradients, or for curvature within a basis, of the present round; set it to 0"
        )
    if parts.sketcher is not None and parts.sketcher.sends_gradient:
        raise ValueError("sketch.gradient_scale: needs a second exchange in a round, which is not built; set it to 0")
    term = parts.term
    if term.travels or (term.remember is None and terms.changes_the_step(term)):
        raise ValueError(f"term.name: {SHARED}")


def _bits_of(settings: ConfigDict) -> Bits:
    """In how many bits entries travel, by a phase's fields."""
    compress, rule = settings.local.compress, settings.aggregator
    update = compress.bits if compress.name == "few_bits" else 0
    kept = compress.share if compress.name == "top_k" else 0.0
    return Bits(update, settings.sketch.bits, rule.span.bits if rule.name == "span" else 0, kept)


def _channel(most: int) -> Channel:
    """What the server keeps for answers that come in up to `most` rounds later."""
    return late(most) if most else Channel()


def worked_by(config: ConfigDict, settings: ConfigDict) -> str:
    """The fields by which clients work, as text: two agreements have the same only if their clients do the same.

    Args:
      config: all fields.
      settings: the phase's.
    """
    phase, rule = settings.to_dict(), settings.aggregator.to_dict()
    shared = {path: fields.value(config, path) for path in WORKED_BY} | {"model": config.model.to_dict()}
    shared |= {name: phase[name] for name in OF_PHASE} | {"rule": {name: rule[name] for name in OF_RULE}}
    for group, name in OF_MACHINE.items():
        shared[group].pop(name)
    return json.dumps(shared, sort_keys=True, default=str)


def fingerprint_of(parts: Parts, params: Any, config: str = "") -> str:
    """The `wire.fingerprint` of the model, of which `parts` train a part, and of what clients work by, if given."""
    leaves, chosen = trees.paths(params), trees.select(params, parts.trainable)
    frozen = {path: np.asarray(leaf) for path, leaf in leaves.items() if path not in chosen}
    return wire.fingerprint(chosen, frozen, config)


@functools.partial(jax.jit, static_argnums=0)
def work_of(parts: Parts, state: State, rates: Rates, cohort: Cohort, root: jax.Array):
    """(the uploads of a cohort [C, ...], their mean training losses [C], what their terms keep [C, ...]).

    It is compiled once for all that share `parts`.
    """

    def stage(function):
        return lambda *args: function(parts, *args)

    results, sketches = by_clients(parts, stage(train), stage(sketch))(state, rates, cohort, root)
    return uploads_of(parts, cohort, results, sketches)._replace(ids=None), results.loss, results.store


def said_of(parts: Parts, rule: Any) -> tuple[dict, tuple]:
    """(what clients are told for their local work, and asked along with their curvature), of the rule's state."""
    return parts.announce(rule), tuple(parts.aggregator.asks(rule))


def broadcast_of(
    agreement: Agreement, params: Any, rule: Any, number: int, due: bool = True, run: bytes = bytes(RUN)
) -> bytes:
    """What clients of a round are sent, from the whole model's parameters and the rule's state.

    Args:
      due: whether they send curvature: of the others nothing is asked.
      run: `RUN` bytes that tell the server's runs apart, for clients that keep something.
    """
    chosen = trees.select(params, agreement.parts.trainable)
    with agreement.precision():
        told, asked = said_of(agreement.parts, rule)
    leaves = trees.paths({"params": chosen, "told": told} | ({"asked": asked} if due else {}))
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    arrays |= {"due": np.asarray(due)} if agreement.in_turns else {}
    arrays |= {"run": np.frombuffer(run, np.uint8)} if agreement.keeps else {}
    arrays = packed(arrays, agreement.bits)
    return wire.pack(wire.Message("broadcast", agreement.fingerprint, number, wire.NOBODY, arrays))


def client_state(agreement: Agreement, params: Any, said: tuple[dict, tuple], round: Any, store: Any = None) -> State:
    """What a client sees of the state: the whole model's parameters, what it is told and asked, the round's number.

    Args:
      store: what its term keeps, [1, ...]; None before its first round.
    """
    store = first_store(agreement, params) if store is None else store
    return State(params, said, (), store, jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), store), round)


def first_store(agreement: Agreement, params: Any) -> Any:
    """What a client's term keeps before its first round, [1, ...]."""
    blank = agreement.parts.term.init(trees.widened(trees.select(params, agreement.parts.trainable)))
    return jax.tree.map(lambda leaf: leaf[None], blank)


def first_rule(parts: Parts, params: Any) -> Any:
    """The state of the rule before the first round."""
    return parts.aggregator.init(trees.widened(trees.select(params, parts.trainable)))


def _one_of(example: Mapping[str, Any]) -> dict:
    """The shapes of one example of {field: [N, ...]}."""
    return {name: jax.ShapeDtypeStruct(np.shape(field)[1:], field.dtype) for name, field in example.items()}


def _shapes(draft: Agreement, example: Mapping[str, Any]) -> tuple[Uploads, Any]:
    """The shapes of one client's upload and training loss."""
    forms = {name: jax.ShapeDtypeStruct(np.shape(field), field.dtype) for name, field in example.items()}
    number = next(iter(forms.values())).shape[0]
    whole = jax.ShapeDtypeStruct
    clients = Client(whole((1, number), np.int32), whole((1,), np.int32))

    def work(params, said, round, clients, ids, data, rates, root):
        cohort = Cohort(ids, clients, data)
        return work_of(draft.of_clients(), client_state(draft, params, said, round), rates, cohort, root)[:2]

    numbers = whole((), np.int32), clients, whole((1,), np.int32)
    given = draft.params, draft.said, *numbers, forms, draft.rates, draft.root
    stacked = jax.eval_shape(work, *given)
    return jax.tree.map(lambda leaf: whole(leaf.shape[1:], leaf.dtype), stacked)


def _told(said: tuple[dict, tuple]) -> dict:
    """Of what the server says, what local work takes."""
    return said[0]


def _asked(said: tuple[dict, tuple]) -> tuple:
    """Of what the server says, what it asks along with curvature."""
    return said[1]


def _everybody(round: jax.Array, key: jax.Array, ids: jax.Array) -> jax.Array:
    """[C] bool, that all of these clients send curvature; see `sketchers.due`."""
    return jnp.ones(ids.shape, bool)


def _nobody(round: jax.Array, key: jax.Array, ids: jax.Array) -> jax.Array:
    """[C] bool, that none of them does."""
    return jnp.zeros(ids.shape, bool)
