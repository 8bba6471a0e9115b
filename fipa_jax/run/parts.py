"""How does a phase's config become a plan of its rounds? Names become functions, fields become their arguments."""

import inspect
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.aggregate import past_rounds as past
from fipa_jax.aggregate import rules as aggregate
from fipa_jax.aggregate import server_optimizers as server
from fipa_jax.client import first_order as client_lib
from fipa_jax.client import second_order, terms
from fipa_jax.client.local_work import Hyper
from fipa_jax.config.methods import method
from fipa_jax.curvature import sketch
from fipa_jax.federation import faults
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parallel import make_mesh
from fipa_jax.tasks.task import Problem, Task

MANY = 2**31 - 1  # clients, where it is not known yet how many there are


def make_plan(config: ConfigDict, settings: ConfigDict, task: Task, num_clients: int) -> rounds.Plan:
    """A phase's static choices, from the run's config and the phase's own.

    Raises:
      ValueError: a name is not known, or choices do not fit together; names the config field.
    """
    term = find(terms.TERMS, "term.name", settings.term.name)()
    solvers = client_lib.LOCAL_SOLVERS | second_order.LOCAL_SOLVERS
    solver = find(solvers, "local.optimizer", settings.local.optimizer)
    rule = find(aggregate.AGGREGATORS, "aggregator.name", settings.aggregator.name)
    given = flat(settings.aggregator)
    remembered = past.rank_of(given["memory"], given["memory_rank"], settings.sketch.rank)
    given |= {"num_clients": num_clients, "memory_rank": remembered}
    aggregator = rule(**fields_for(rule, given))
    optimizer = server.make(settings.server.optimizer, settings.server.momentum)
    sketched, cohort = aggregator.curvature == "sketch", config.cohort or num_clients
    matched, natural = _matched(settings, aggregator), solver is second_order.natural_gradient
    _check_fit(settings, aggregator, term, everyone=cohort == num_clients)
    _check_faults(settings, cohort)
    local_fields = fields_for(solver, flat(settings.local))
    if matched and "tries" in local_fields:
        local_fields["tries"] = 0
    augment = task.augment if settings.local.views else Task._field_defaults["augment"]
    makers = {"none": None, "sketch": sketch.make_sketch, "diagonal": sketch.make_diagonal}
    make = makers[aggregator.curvature]
    return rounds.Plan(
        task=task,
        local=solver(task.loss, augment, term=term, **local_fields),
        term=term,
        sketch=None if make is None else sketch_of(make, task.loss, settings.sketch),
        aggregator=aggregator,
        server=optimizer,
        num_clients=num_clients,
        cohort=cohort,
        trainable=settings.trainable,
        sketch_examples=settings.sketch.examples,
        gradient_scale=settings.sketch.gradient_scale if sketched else 0.0,
        step_scale=settings.local.adaptive.scale if sketched else 0.0,
        max_steps=settings.local.adaptive.max_steps,
        sketch_first=sketched and (natural or settings.local.adaptive.scale > 0),
        matched=matched,
        faults=_has_faults(settings),
        late=settings.late.most if settings.late.share else 0,
        least_clients=settings.least_clients,
        chunk=1 if config.chunk < 0 else config.chunk,  # until it is measured
        mesh=make_mesh(config.devices),
    )


def check(config: ConfigDict) -> None:
    """Checks the names in all phases, and what fits together whatever the data: before they are loaded.

    Raises:
      ValueError: see `make_plan`.
    """
    blank, phases = Task(init=None, outputs=None, loss=None, metrics=None), {}
    if config.warmup.rounds:
        phases["the warm-up"] = config.warmup
    if config.fipa.rounds:
        phases |= {f"the method {spec!r}": method(config, spec) for spec in config.compare}
    for name, settings in phases.items():
        try:
            plan = make_plan(config, settings, blank, num_clients=config.cohort or MANY)
            if plan.sketch is not None:
                plan.sketch(None, None)
        except ValueError as error:
            raise ValueError(f"{error} (in {name})") from None


def _check_fit(settings: ConfigDict, aggregator: aggregate.Aggregator, term: terms.Term, everyone: bool) -> None:
    """Refuses choices of which one would undo the other; `everyone`: whether all clients take part in every round."""
    plain = settings.server.optimizer == "sgd" and term.correct is terms.none().correct
    if aggregator.wants_loss and not (everyone and plain):
        raise ValueError(
            "config.fipa.aggregator.trust: needs the losses of all clients in every round, server.optimizer = 'sgd' "
            "and a term that leaves the server's step as it is; set config.cohort = 0, or trust to False"
        )
    if aggregator.wants_loss and settings.late.share:
        raise ValueError("config.fipa.aggregator.trust: needs clients that are not late; set late.share = 0")
    if aggregator.wants_loss and settings.server.lr != 1:
        raise ValueError(f"config.fipa.aggregator.trust: needs server.lr = 1, got {settings.server.lr}")
    local, rule, matched = settings.local, settings.aggregator, _matched(settings, aggregator)
    natural = local.optimizer == "natural_gradient"
    if natural and (aggregator.curvature != "sketch" or aggregator.at != "broadcast"):
        raise ValueError(
            "config.fipa.local.optimizer: 'natural_gradient' is a step by the client's sketch, of which the rule "
            f"{settings.aggregator.name!r} knows none; set aggregator.name = 'fipa', or another optimizer"
        )
    if natural and not (rule.damping if matched else local.damping) > 0:
        field = "aggregator.damping" if matched else "local.damping"
        raise ValueError(f"config.fipa.{field}: 'natural_gradient' divides by it, it needs more than 0")
    if matched and rule.form == "pinv":
        raise ValueError("config.fipa.local.matched: 'pinv' has no damping to match; set aggregator.form = 'damped'")
    if aggregator.curvature != "sketch":
        return  # local work that follows the sketches is left aside, so that rules without them can be compared
    one_step = natural or (local.optimizer == "gauss_newton" and (local.steps or local.epochs) == 1)
    if aggregator.wants_damping and not (local.optimizer == "sgd" or one_step):
        raise ValueError(
            "config.fipa.aggregator.own_damping: needs local.optimizer = 'sgd', whose damping is 1 / (lr steps), or "
            f"one 'gauss_newton' step, got {local.optimizer!r} with {local.steps or local.epochs}; set it to False"
        )
    if matched and local.optimizer not in ("gauss_newton", "natural_gradient"):
        raise ValueError(
            "config.fipa.local.matched: needs local.optimizer = 'gauss_newton' or 'natural_gradient'; set it to False"
        )
    if matched and rule.relative:
        raise ValueError("config.fipa.local.matched: needs an absolute damping; set aggregator.relative to False")
    if local.adaptive.scale and local.optimizer not in client_lib.LOCAL_SOLVERS:
        raise ValueError(
            f"config.fipa.local.adaptive.scale: {local.optimizer!r} takes its own number of steps; set it to 0"
        )


def _matched(settings: ConfigDict, aggregator: aggregate.Aggregator) -> bool:
    """Whether the clients' second-order steps take the rule's damping; they cannot where it is another's."""
    return settings.local.matched and aggregator.curvature == "sketch"


def _check_faults(settings: ConfigDict, cohort: int) -> None:
    """Refuses faults that cannot happen, and a minimum of clients that no round reaches."""
    optimizer = settings.local.optimizer
    if settings.faults.straggle and (optimizer not in client_lib.LOCAL_SOLVERS or settings.local.steps == 1):
        raise ValueError(
            f"config.fipa.faults.straggle: needs a first-order solver that takes several steps, got local.optimizer "
            f"= {optimizer!r} with local.steps = {settings.local.steps}; set it to 0"
        )
    if settings.least_clients > cohort:
        raise ValueError(
            f"config.fipa.least_clients: {settings.least_clients} is above the number of clients in a round, "
            f"{cohort}: every round would be skipped"
        )


def sketch_of(make: Callable, loss: Callable, settings: ConfigDict) -> Callable:
    """(outputs, features) -> a client's sketch, or diagonal, with the config's fields."""
    fields = fields_for(make, settings)
    if "features" not in inspect.signature(make).parameters:
        return lambda outputs, features: make(outputs, loss, **fields)
    return lambda outputs, features: make(outputs, loss, features=features, **fields)


def fields_for(factory: Callable, fields: Mapping) -> dict:
    """Those of the config's fields that a factory takes: it asks for a field by naming a parameter after it."""
    return {name: value for name, value in fields.items() if name in inspect.signature(factory).parameters}


def flat(group: Mapping) -> dict:
    """A group's fields and those of the groups in it, by the names that the factories know them by."""
    past_fields = {"kind": "memory", "decay": "memory_decay", "rank": "memory_rank", "length": "memory_length"}
    fields = {}
    for name, value in group.items():
        if name == "past":
            fields |= {past_fields[field]: of_past for field, of_past in value.items()}
        elif isinstance(value, dict | ConfigDict):
            fields |= value
        else:
            fields[name] = value
    return fields


def make_rates(settings: ConfigDict, dtype: str) -> rounds.Rates:
    """A phase's traced hyper-parameters, from its config."""
    array = lambda value: jnp.asarray(value, dtype)
    hyper = Hyper(array(settings.local.lr), array(settings.local.damping), array(settings.term.mu))
    wrong = faults.Rates(**{name: array(value) for name, value in settings.faults.items()})
    lr_decay, server_lr = array(settings.local.lr_decay), array(settings.server.lr)
    late = array(settings.late.share) if settings.late.share else ()
    return rounds.Rates(hyper, lr_decay, server_lr, wrong if _has_faults(settings) else (), late)


def _has_faults(settings: ConfigDict) -> bool:
    return any(settings.faults[kind] for kind in faults.KINDS)


def memories_on_host(config: ConfigDict, plan: rounds.Plan, params) -> bool:
    """Whether what clients keep between rounds lives on the host, by `config.client_store`; see `_on_host`."""
    blank = jax.eval_shape(plan.term.init, trees.select(params, plan.trainable))
    return _on_host(config, "client_store", plan.num_clients * trees.nbytes(blank))


def examples_on_host(config: ConfigDict, problem: Problem) -> bool:
    """Whether the clients and their examples live on the host, by `config.examples_on`; see `_on_host`."""
    widest = max(map(len, problem.clients))
    return _on_host(config, "examples_on", trees.nbytes(problem.train) + 4 * len(problem.clients) * widest)


def _on_host(config: ConfigDict, field: str, size: int) -> bool:
    """Whether what takes `size` bytes lives on the host: as the field says, or where it fills a quarter of a device.

    Raises:
      ValueError: it does, but many rounds are to run in one call.
    """
    on_host = config[field] == "host" or (config[field] == "auto" and 4 * size > device_bytes())
    if on_host and config.rounds_per_call > 1:
        raise ValueError(f"config.rounds_per_call: above 1 it needs config.{field} = 'device'")
    return on_host


def check_room(plan: rounds.Plan, params) -> None:
    """Refuses a rule whose state, such as the memory of past rounds, finds no room on the device.

    Raises:
      ValueError: twice its bytes, before and after a round, are more than the device has.
    """
    size = trees.nbytes(jax.eval_shape(plan.aggregator.init, trees.select(params, plan.trainable)))
    if 2 * size > device_bytes():
        raise ValueError(
            f"config.fipa.aggregator.past: the rule would keep {size / 2**30:.3g} GiB between rounds, and hold them "
            f"twice within one; the device has {device_bytes() / 2**30:.3g} GiB. Lower past.rank or past.length, take "
            "past.kind = 'prior', or let trainable name fewer parameters"
        )


def device_bytes() -> int:
    """The memory of a device, where a CPU's is the host's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or host_bytes()


def host_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find(table_: dict, field: str, name: str):
    """The entry of a table; the error for a name that is not in it lists those that are."""
    if name not in table_:
        raise ValueError(f"config.{field}: unknown {name!r}; known: {', '.join(sorted(table_))}")
    return table_[name]
