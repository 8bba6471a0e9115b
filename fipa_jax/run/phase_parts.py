"""How does a phase's config become the parts of its rounds? Names become functions, fields become their arguments."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fipa_jax.aggregate import server_optimizers
from fipa_jax.aggregate.aggregator import Aggregator, announce_nothing
from fipa_jax.aggregate.curvature_budget import within_budget
from fipa_jax.aggregate.gradient_span import SpanOptions
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.layerwise import LayerOptions
from fipa_jax.aggregate.limits import Limits
from fipa_jax.aggregate.past_rounds import PastRounds, rank_of
from fipa_jax.aggregate.posteriors import PosteriorOptions
from fipa_jax.aggregate.row_blocks import Spread
from fipa_jax.aggregate.rules import AGGREGATORS
from fipa_jax.aggregate.sums import SumOptions
from fipa_jax.client import first_order, ivon, second_order, terms
from fipa_jax.client.compression import Compression, Compressor, compressed, compressor_of
from fipa_jax.client.local_solver import Hyper, LocalSolver, adaptive_steps, with_initial_loss
from fipa_jax.config import fields
from fipa_jax.config.checks import check_unread
from fipa_jax.config.defaults import default
from fipa_jax.config.methods import method, overrides
from fipa_jax.curvature import common_basis, few_bits, layer_factors, sketch
from fipa_jax.curvature.sketchers import (
    above_level,
    check_link,
    from_one_start,
    on_views,
    sent_seldom,
    within_link,
)
from fipa_jax.federation.channel import Channel, ChannelRates, FaultRates, chain, faulty, late
from fipa_jax.federation.parallel import make_mesh
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.lookup import lookup
from fipa_jax.models.layers import tapped
from fipa_jax.run import private_checks, private_run
from fipa_jax.run.phase_checks import BY_CURVATURE, MATCHED, check_fit, has_faults, matched, naming
from fipa_jax.tasks.task import Task, unaugmented

MANY = 2**31 - 1  # clients, where it is not known yet how many there are
LOCAL_SOLVERS = first_order.LOCAL_SOLVERS | second_order.LOCAL_SOLVERS | ivon.LOCAL_SOLVERS
LOCAL_SOLVERS |= {"gradient": first_order.gradient}
# Curvature that a rule needs -> what makes it of a client's examples; fields of `sketch` that wrap it.
SKETCHES: dict[str, Callable] = {
    "core": common_basis.make_core,
    "diagonal": sketch.make_diagonal,
    "image": common_basis.make_image,
    "layer_inputs": layer_factors.make_layer_factors,
    "layers": layer_factors.make_layer_factors,
    "sketch": sketch.make_sketch,
}
AROUND_SKETCHES = {"common_start", "examples", "full", "share", "views"}
OF_PAIRS = {"bits", "budget", "deadline", "energy", "gradient_scale", "link", "store"}
# Fields of a phase that `make_rates` takes, so that they are traced. What a rule's state holds is traced too, see
# `Aggregator.hyper`.
TRACED = (
    *("local.lr", "local.lr_decay", "local.damping", "term.mu", "server.lr", "late.share"),
    *(f"faults.{name}" for name in FaultRates._fields),
    *(f"privacy.{name}" for name in ("clip", "clip_decay", "damping", "delta", "noise_multiplier", "release_share")),
)


def make_parts(config: ConfigDict, settings: ConfigDict, task: Task, num_clients: int) -> Parts:
    """The parts of a phase's rounds, from the run's config and the phase's own.

    Args:
      config: all fields.
      settings: the phase's.
      task: what is learned.
      num_clients: T.

    Raises:
      ValueError: a name is not known, or choices do not fit together; names the config field.
    """
    private_checks.check(config, settings)
    cohort = private_run.cohort_of(config, settings, num_clients)
    term = lookup(terms.TERMS | {"duals": ivon.duals}, settings.term.name, "config.term.name")()
    mesh = make_mesh(config.devices)
    aggregator = aggregator_of(settings, num_clients, mesh)
    server = server_optimizers.make(settings.server.optimizer, settings.server.momentum)
    server = server_optimizers.averaged(server, settings.server.average) if settings.server.average else server
    compressor = compressor_of(Compression(**settings.local.compress))
    local = local_of(settings, aggregator, term, task, compressor)
    if settings.sketch.link or settings.sketch.deadline:
        check_link(settings.sketch.link, settings.sketch.deadline)
    update_bytes = functools.partial(_update_bytes, compressor, term, jnp.dtype(config.precision).itemsize)
    check_fit(settings, aggregator, term, cohort, num_clients, augmented=task.augment is not unaugmented)
    adaptive = aggregator.needs.curvature == "sketch" and settings.local.adaptive.scale > 0
    return Parts(
        task=task,
        local=private_run.local_in_frame(local, settings),
        term=term,
        sketcher=sketcher_of(settings, aggregator, task, first_round(config, settings), update_bytes),
        aggregator=aggregator,
        server=server,
        num_clients=num_clients,
        cohort=cohort,
        trainable=settings.trainable,
        also_trained=settings.also_trained,
        channel=channel_of(config, settings, task, num_clients),
        announce=aggregator.announce if matched(settings, aggregator) else announce_nothing,
        sketch_first=adaptive or settings.local.optimizer in BY_CURVATURE,
        sketch_examples=settings.sketch.examples,
        update_bytes=compressor and compressor.bytes_of,
        column_bits=settings.aggregator.span.bits if settings.aggregator.name == "span" else 0,
        first=first_round(config, settings),
        least_clients=settings.least_clients,
        pooled=settings.pooled,
        chunk=1 if config.chunk < 0 else config.chunk,  # until it is measured
        mesh=mesh,
    )


def check(config: ConfigDict) -> None:
    """Checks the names in all phases, and what fits together whatever the data: before they are loaded.

    Raises:
      ValueError: see `make_parts`.
    """
    blank = Task(init=None, outputs=None, loss=None, metrics=None)
    for phase, where, settings in phases_of(config):
        with naming(phase, where, settings):
            make_parts(config, settings, blank, num_clients=config.cohort or MANY)
    for spec in [spec for spec in config.compare if ":" in spec and config.fipa.rounds]:
        settings = method(config, spec)
        with naming("fipa", f"the method {spec!r}", settings):
            _check_taken(config, settings, overrides(config, spec, settings))


def without_effect(config: ConfigDict, paths: Iterable[str]) -> list[str]:
    """What to say of fields, set for a whole phase, that change none of the methods which it runs: a line for each.

    A method does not read the field, or sets it itself.

    They are no mistake where one command line serves several runs, as those of a study. What one method sets for itself
    and does not read is refused by `check`.

    Args:
      config: all fields.
      paths: `fipa.FIELD`, of all methods that are compared, or `warmup.FIELD`.

    Raises:
      ValueError: what `check` raises.
    """
    check(config)
    usual, lines = default(), []
    for path in paths:
        phase, _, field = path.partition(".")
        methods = [settings for name, _, settings in phases_of(config) if name == phase]
        value, as_usual = fields.value(config, path), fields.value(usual, path)
        own = [fields.value(settings, field) for settings in methods]
        said = [_unread(config, settings, field) for settings in methods]
        if not methods or not all(words or other != value for words, other in zip(said, own, strict=True)):
            continue
        if all(said) and value != as_usual:
            where = "the warm-up" if phase == "warmup" else "all methods of config.compare"
            lines.append(f"{said[0].replace('config.fipa.', f'config.{phase}.')} (in {where})")
        elif not all(said):
            other = next(other for words, other in zip(said, own, strict=True) if not words)
            where = f"write NAME:{field}={value} in config.compare"
            lines.append(f"config.{path}: each method that reads it sets it itself, to {other!r}; {where}")
    return lines


def _unread(config: ConfigDict, settings: ConfigDict, path: str) -> str:
    """Why nothing reads a field of a phase; "" where something does."""
    try:
        check_unread(settings, [path])
        _check_taken(config, settings, [path])
    except ValueError as error:
        return str(error)
    return ""


def _check_taken(config: ConfigDict, settings: ConfigDict, paths: Sequence[str]) -> None:
    """Refuses fields that a method sets, `paths`, and that none of its parts takes, with a ValueError.

    A part takes one by naming a parameter after it, see `fields_for`; what is traced, or wraps a part, is told here.
    """
    aggregator = aggregator_of(settings, MANY)
    curvature = aggregator.needs.curvature
    local = _parameters(LOCAL_SOLVERS[settings.local.optimizer]) | {"optimizer", "lr", "lr_decay", "views", "compress"}
    local |= ({"adaptive"} if curvature == "sketch" else set()) | ({"matched"} if curvature in MATCHED else set())
    local |= set() if matched(settings, aggregator) else {"damping"}  # else it is the rule's
    local |= {"gauss_newton"} if "tries" in local else set()
    sketched = _parameters(SKETCHES[curvature]) | AROUND_SKETCHES if curvature in SKETCHES else set()
    sketched |= {"bits"} if curvature == "core" else set()
    if curvature == "sketch" or config.personal.compare:  # whose ways have sketches of their own
        sketched |= _parameters(SKETCHES["sketch"]) | OF_PAIRS | {"examples"}
    rule = {"name"} | _parameters(AGGREGATORS[settings.aggregator.name])
    taken = {"aggregator": rule, "local": local, "sketch": sketched}
    for path in paths:
        group, _, field = path.partition(".")
        if group in taken and field.partition(".")[0] not in taken[group]:
            raise ValueError(f"config.fipa.{path}: no part of this method reads it; leave it out")


@functools.cache
def _parameters(factory: Callable) -> frozenset[str]:
    """What they are called."""
    return frozenset(inspect.signature(factory).parameters)


def phases_of(config: ConfigDict) -> Iterator[tuple[str, str, ConfigDict]]:
    """(its group of the config, what it is called in an error, its fields) of each phase that runs."""
    if config.warmup.rounds:
        yield "warmup", "the warm-up", config.warmup
    for spec in config.compare if config.fipa.rounds else ():
        yield "fipa", f"the method {spec!r}", method(config, spec)


def aggregator_of(settings: ConfigDict, num_clients: int, mesh: Mesh | None = None) -> Aggregator:
    """The aggregation rule that `aggregator` names, with its groups of fields as the records that factories take."""
    fields = settings.aggregator
    past = PastRounds(**fields.past, num_clients=num_clients)
    groups = {
        "past": past._replace(rank=rank_of(past, settings.sketch.rank)),
        "limits": Limits(**fields.limits),
        "late": LateUpdates(**fields.late),
        "layers": LayerOptions(**fields.layers),
        "posterior": PosteriorOptions(**fields.posterior),
        "span": SpanOptions(**fields.span),
        "sums": SumOptions(**fields.sums),
        "spread": Spread(mesh),
    }
    make = lookup(AGGREGATORS, fields.name, "config.aggregator.name")
    rule = make(**fields_for(make, {**fields, **groups}))
    if not settings.sketch.budget or rule.needs.curvature != "sketch":
        return rule
    return within_budget(rule, settings.sketch.budget, settings.sketch.bits)


def local_of(
    settings: ConfigDict, aggregator: Aggregator, term: terms.Term, task: Task, compressor: Compressor | None = None
) -> LocalSolver:
    """The clients' local solver, wrapped by what the phase asks for."""
    make = lookup(LOCAL_SOLVERS, settings.local.optimizer, "config.local.optimizer")
    fields = fields_for(make, {**settings.local, **settings.local.gauss_newton})
    if matched(settings, aggregator) and "tries" in fields:
        fields["tries"] = 0
    augment = task.augment if settings.local.views else unaugmented
    local = make(task.loss, augment, term=term, **fields)
    if aggregator.needs.curvature == "sketch" and settings.local.adaptive.scale:
        momentum = settings.local.momentum if settings.local.optimizer in first_order.WITH_MOMENTUM else 0.0
        adaptive = settings.local.adaptive
        local = adaptive_steps(local, adaptive.scale, adaptive.max_steps, reach=1 / (1 - momentum))
    local = local if compressor is None else compressed(local, compressor)
    if not aggregator.needs.loss:
        return local
    return with_initial_loss(local, task.loss, settings.local.weight_decay, term)


def _update_bytes(compressor: Compressor | None, term: terms.Term, itemsize: int, size: int) -> int:
    """The bytes of an update of P = `size` entries, and of what a term sends beside it."""
    in_full = itemsize * size
    return (compressor.bytes_of(size) if compressor else in_full) + (in_full if term.travels else 0)


def sketcher_of(
    phase: ConfigDict, aggregator: Aggregator, task: Task, start: int, update_bytes: Callable[[int], int]
) -> sketch.Sketcher | None:
    """What the clients say of their curvature, as the rule needs it, from round `start`; None if it needs nothing."""
    settings = phase.sketch
    sketcher = _sketcher_of_examples(settings, aggregator, task)
    if sketcher is None:
        return None
    sketcher = on_views(sketcher, task.augment) if settings.views else sketcher
    sketcher = from_one_start(sketcher) if settings.common_start else sketcher
    if settings.share != 1:  # a rule of gradients takes the mean over those who have sent a sketch
        scaled, of_cores = not aggregator.needs.gradient, aggregator.needs.curvature == "core"
        start += of_cores  # in the first round there is no direction to ask about
        how = {"full": settings.full, "start": start, "scaled": scaled, "least": int(of_cores)}
        sketcher = sent_seldom(sketcher, settings.share, **how)
    if settings.link:
        sketcher = within_link(sketcher, settings.link, settings.deadline, update_bytes)
    return above_level(sketcher, settings.budget) if settings.budget else sketcher


def first_round(config: ConfigDict, settings: ConfigDict) -> int:
    """The number of a phase's first round."""
    return config.first_round + (0 if settings is config.warmup else config.warmup.rounds)


def _sketcher_of_examples(settings: ConfigDict, aggregator: Aggregator, task: Task) -> sketch.Sketcher | None:
    """The same, of the examples as they are, each client by random numbers of its own."""
    if aggregator.needs.curvature in ("none", "posterior"):
        return None
    if aggregator.needs.curvature == "diagonal":
        fields = fields_for(sketch.make_diagonal, settings)
        return sketch.plain(lambda outputs, features: sketch.make_diagonal(outputs, task.loss, **fields))
    if aggregator.needs.curvature == "image":
        return common_basis.sketcher_of_images(task.loss, **fields_for(common_basis.make_image, settings))
    if aggregator.needs.curvature == "core":
        fields = fields_for(common_basis.make_core, settings)
        return common_basis.sketcher_of_cores(task.loss, settings.bits, **fields)
    if aggregator.needs.curvature in ("layers", "layer_inputs"):
        fields = fields_for(layer_factors.make_layer_factors, settings)
        alone = aggregator.needs.curvature == "layer_inputs"
        return layer_factors.sketcher_of_layers(tapped, task.loss, inputs_alone=alone, **fields)
    return eigenpairs_of(settings, task)


def eigenpairs_of(settings: ConfigDict, task: Task) -> sketch.Sketcher:
    """The sketches of the clients' curvature, as `sketch` has its fields."""
    fields = fields_for(sketch.make_sketch, settings)
    if settings.energy and not settings.probes:
        raise ValueError("sketch.energy: needs the trace, and sketch.probes = 0 leaves it unknown; set it to 2 or more")

    def make(outputs, features):
        of_client = sketch.make_sketch(outputs, task.loss, features=features, **fields)
        of_client = sketch.stored_as(of_client, settings.store, settings.tolerance) if settings.store else of_client
        of_client = few_bits.in_few_bits(of_client, settings.bits) if settings.bits else of_client
        return sketch.keeping_energy(of_client, settings.energy) if settings.energy else of_client

    make(None, None)  # so that what is wrong with its fields shows now
    plain = sketch.plain(make)._replace(bits=settings.bits)
    if not settings.gradient_scale:
        return plain
    return sketch.with_rank_by_gradient(plain, task.loss, settings.gradient_scale)


def channel_of(config: ConfigDict, settings: ConfigDict, task: Task, num_clients: int) -> Channel:
    """What lies between server and clients."""
    if private_checks.is_private(settings):
        return private_run.channel_of(config, settings, task, num_clients)
    channels = [late(settings.late.most)] if settings.late.share else []
    channels += [faulty()] if has_faults(settings) else []
    return chain(*channels) if channels else Channel()


def make_rates(settings: ConfigDict, dtype: str, public: dict | None = None) -> Rates:
    """A phase's traced hyper-parameters, from its config.

    Args:
      settings: the phase's fields.
      dtype: of the numbers.
      public: `Problem.public`, for a private phase.
    """

    def array(value):
        return jnp.asarray(value, dtype)

    local = Hyper(array(settings.local.lr), array(settings.local.damping), array(settings.term.mu))
    faults = FaultRates(**{name: array(value) for name, value in settings.faults.items()})
    channel = ChannelRates(
        late=array(settings.late.share) if settings.late.share else None,
        faults=faults if has_faults(settings) else None,
        privacy=private_run.rates_of(settings, dtype, public),
    )
    return Rates(local, array(settings.local.lr_decay), array(settings.server.lr), channel)


def fields_for(factory: Callable, fields: Mapping) -> dict:
    """Those of the config's fields that a factory takes: it asks for a field by naming a parameter after it."""
    return {name: value for name, value in fields.items() if name in _parameters(factory)}
