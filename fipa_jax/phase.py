"""How does a phase's config become a plan of its rounds? Names become functions, fields become their arguments."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from ml_collections import ConfigDict

from fipa_jax import aggregate, rounds, second_order, server, sketch, terms, trees
from fipa_jax import client as client_lib
from fipa_jax.tasks import Task


def make_plan(config: ConfigDict, settings: ConfigDict, task: Task, num_clients: int) -> rounds.Plan:
    """A phase's static choices, from the run's config and the phase's own.

    Raises:
      ValueError: a name is not known, or choices do not fit together; names the config field.
    """
    term = find(terms.TERMS, "term.name", settings.term.name)()
    solvers = client_lib.LOCAL_SOLVERS | second_order.LOCAL_SOLVERS
    solver = find(solvers, "local.optimizer", settings.local.optimizer)
    rule = find(aggregate.AGGREGATORS, "aggregator.name", settings.aggregator.name)
    aggregator = rule(**fields_for(rule, settings.aggregator))
    sketched, cohort = aggregator.curvature == "sketch", config.cohort or num_clients
    matched = settings.local.matched and sketched
    _check_fit(settings, aggregator, term, everyone=cohort == num_clients)
    local_fields = fields_for(solver, settings.local) | ({"tries": 0} if matched else {})
    makers = {"none": None, "sketch": sketch.make_sketch, "diagonal": sketch.make_diagonal}
    make = makers[aggregator.curvature]
    return rounds.Plan(
        task=task,
        local=solver(task.loss, task.augment, term=term, **local_fields),
        term=term,
        sketch=None if make is None else sketch_of(make, task.loss, settings.sketch),
        aggregator=aggregator,
        server=server.make(settings.server.optimizer, settings.server.momentum),
        cohort=cohort,
        trainable=settings.trainable,
        sketch_examples=settings.sketch.examples,
        gradient_scale=settings.sketch.gradient_scale if sketched else 0.0,
        step_scale=settings.local.step_scale if sketched else 0.0,
        max_steps=settings.local.max_steps,
        matched=matched,
        chunk=config.chunk,
        mesh=make_mesh(config.devices),
    )


def _check_fit(settings: ConfigDict, aggregator: aggregate.Aggregator, term: terms.Term, everyone: bool) -> None:
    """Refuses choices of which one would undo the other; `everyone`: whether all clients take part in every round."""
    plain = settings.server.optimizer == "sgd" and term.correct is terms.none().correct
    if aggregator.wants_loss and not (everyone and plain):
        raise ValueError(
            "config.fipa.aggregator.trust: needs the losses of all clients in every round, server.optimizer = 'sgd' "
            "and a term that leaves the server's step as it is; set config.cohort = 0, or trust to False"
        )
    if aggregator.wants_loss and settings.server.lr != 1:
        raise ValueError(f"config.fipa.aggregator.trust: needs server.lr = 1, got {settings.server.lr}")
    if aggregator.curvature != "sketch":
        return  # local work that follows the sketches is left aside, so that rules without them can be compared
    optimizer = settings.local.optimizer
    if settings.local.matched and optimizer != "gauss_newton":
        raise ValueError("config.fipa.local.matched: needs local.optimizer = 'gauss_newton'; set it to False")
    if settings.local.matched and settings.aggregator.relative:
        raise ValueError("config.fipa.local.matched: needs an absolute damping; set aggregator.relative to False")
    if settings.local.step_scale and optimizer not in client_lib.LOCAL_SOLVERS:
        raise ValueError(f"config.fipa.local.step_scale: {optimizer!r} takes its own number of steps; set it to 0")


def sketch_of(make: Callable, loss: Callable, settings: ConfigDict) -> Callable:
    """(outputs, features) -> a client's sketch, or diagonal, with the config's fields."""
    fields = fields_for(make, settings)
    if "features" not in inspect.signature(make).parameters:
        return lambda outputs, features: make(outputs, loss, **fields)
    return lambda outputs, features: make(outputs, loss, features=features, **fields)


def fields_for(factory: Callable, fields: ConfigDict) -> dict:
    """Those of the config's fields that a factory takes: it asks for a field by naming a parameter after it."""
    return {name: value for name, value in fields.items() if name in inspect.signature(factory).parameters}


def make_rates(settings: ConfigDict, dtype: str) -> rounds.Rates:
    """A phase's traced hyper-parameters, from its config."""
    array = lambda value: jnp.asarray(value, dtype)
    hyper = client_lib.Hyper(array(settings.local.lr), array(settings.local.damping), array(settings.term.mu))
    return rounds.Rates(hyper, array(settings.local.lr_decay), array(settings.server.lr))


def memory_on_host(config: ConfigDict, plan: rounds.Plan, params, num_clients: int) -> bool:
    """Whether the clients' memories live on the host rather than on the device.

    By `config.client_memory`: device, host, or auto: on the host where they would take more than a quarter of the
    device's memory.

    Raises:
      ValueError: they do, but many rounds are to run in one call.
    """
    where, limit = config.client_memory, (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if where != "auto" or limit is None:  # a CPU gives no limit: it is the host
        on_host = where == "host"
    else:
        blank = jax.eval_shape(plan.term.init, trees.select(params, plan.trainable))
        on_host = 4 * num_clients * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(blank)) > limit
    if on_host and config.rounds_per_call > 1:
        raise ValueError("config.rounds_per_call: above 1 it needs config.client_memory = 'device'")
    return on_host


def make_mesh(devices: int):
    """`devices` devices along an axis `clients`; None for one."""
    if devices == 1:
        return None
    if devices > len(jax.devices()):
        raise ValueError(
            f"config.devices: {devices} asked for, {len(jax.devices())} there; on a CPU, set in the environment "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
        )
    return jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def find(table_: dict, field: str, name: str):
    """The entry of a table; the error for a name that is not in it lists those that are."""
    if name not in table_:
        raise ValueError(f"config.{field}: unknown {name!r}; known: {', '.join(sorted(table_))}")
    return table_[name]
