"""A config made real: the data where they find room, and the functions of a run; checked by shapes before it starts."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fipa_jax import files, trees
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.config.checks import validate
from fipa_jax.curvature import contracts
from fipa_jax.data import partition
from fipa_jax.federation.parallel import make_mesh, replicate
from fipa_jax.federation.parts import Parts, model_of, trained_of
from fipa_jax.federation.population import OnHost, Resident
from fipa_jax.reporting import metrics, plots
from fipa_jax.run import head_features, personal_stage, phase_checks, phase_parts, private_checks, programs
from fipa_jax.saving.model_files import load
from fipa_jax.tasks import task as tasks
from fipa_jax.tasks.classification import averaged
from fipa_jax.tasks.task import Problem


class Experiment(NamedTuple):
    """A config made real: the data on the device and the functions of a run."""

    config: ConfigDict
    problem: tasks.Problem
    population: Resident | OnHost  # all clients and their examples
    people: personal_stage.People | None  # the clients that get models of their own
    held: dict  # {"test" | "holdout": {field: [N, ...]}} on the device
    params: Any  # that the run starts from
    evaluate: Callable[[Any, dict], dict]  # (params, data) -> {name: [N]}, compiled
    evaluate_drawn: Callable[[Any, dict], dict]  # the same of models [S, ...], their probabilities averaged
    compiled: dict  # static part of a phase, or of the clients' own models -> compiled programs
    root: jax.Array  # the key from which all others derive


def build(config: ConfigDict, problem: tasks.Problem | None = None) -> Experiment:
    """Checks the config, loads the data, splits them, and builds what a run needs.

    Args:
      config: all fields.
      problem: instead of that which `config.task` names.

    Raises:
      ValueError, FileNotFoundError, ImportError: naming the config field and what to change.
    """
    validate(config)
    if jnp.asarray(np.zeros([], config.precision)).dtype != config.precision:
        raise ValueError(
            f"config.precision: {config.precision} needs `with jax.enable_x64(True):` around build; run has it"
        )
    phase_parts.check(config)  # before data are loaded, which may take long
    plots.check()  # its absence must show now
    problem, root = problem or tasks.build(config), jax.random.key(config.seed)
    params = first_params(config, problem.task, root)
    tasks.check(problem, params)
    problem, people = personal_stage.set_apart(problem, config.personal, config.seed)
    phase_checks.check_cohort(config, len(problem.clients))
    partition.sizes(problem.clients)  # which looks for clients without examples
    mesh = make_mesh(config.devices)

    def on_device(tree):
        return replicate(jax.tree.map(np.asarray, tree), mesh)

    experiment = Experiment(
        config=config,
        problem=problem,
        population=_population(config, problem, on_device),
        people=people,
        held={prefix: on_device(data) for prefix, data in _held(problem).items()},
        params=params,
        evaluate=jax.jit(metrics.make_evaluate(problem.task, config.eval.batch_size, mesh)),
        evaluate_drawn=jax.jit(metrics.make_evaluate(averaged(problem.task), config.eval.batch_size, mesh)),
        compiled={},
        root=replicate(root, mesh),
    )
    # A mistake in the last of the phases must show now, not after hours of the first.
    for phase, where, settings in phase_parts.phases_of(config):
        with phase_checks.naming(phase, where, settings):
            trace(experiment, settings, phase)
    return experiment


def _held(problem: tasks.Problem) -> dict[str, dict]:
    """{"test" | "holdout": {field: [N, ...]}}, examples that nobody trains on; refuses a set without any."""
    held = {"test": problem.test} | ({} if problem.holdout is None else {"holdout": problem.holdout})
    for name, data in held.items():
        if not len(next(iter(data.values()))):
            raise ValueError(f"problem.{name}: needs an example at least to be evaluated, and has none")
    return held


def _population(config: ConfigDict, problem: tasks.Problem, on_device: Callable) -> Resident | OnHost:
    """All clients and their examples, where they find room."""
    if examples_on_host(config, problem):
        return OnHost(problem.train, problem.clients, config.cohort or len(problem.clients), on_device)
    return Resident(*on_device((problem.train, Client(*partition.pad(problem.clients)))))


def first_params(config: ConfigDict, task: tasks.Task, root: jax.Array) -> Any:
    """The parameters that the run starts from: drawn, or those of `config.init_from`, all or `config.init_paths`."""
    params = jax.jit(task.init)(jax.random.fold_in(root, 2**31))  # op by op it would compile each alone
    params = jax.tree.map(lambda leaf: leaf.astype(config.precision), contracts.floating(params, "task.init"))
    if not config.init_from:
        return params
    try:
        file = files.local(config.init_from, "config.init_from")
        if not config.init_paths:
            return load(file, params)
        like = trees.select(params, config.init_paths, "config.init_paths")
        found = {path: leaf for path, leaf in trees.paths(load(file)).items() if path in like}
        return trees.replace(params, jax.tree.map(jnp.asarray, trees.fitted(found, like)))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"config.init_from: {error}") from error


def parts_of(experiment: Experiment, settings: ConfigDict) -> Parts:
    """The parts of a phase of this experiment."""
    num_clients = experiment.population.num_examples.size
    return phase_parts.make_parts(experiment.config, settings, experiment.problem.task, num_clients)


def pooled(experiment: Experiment) -> Experiment:
    """The experiment with all clients' examples in one client's hands."""
    if isinstance(experiment.population, OnHost):
        raise ValueError(
            "config.compare: a phase in which one client holds all data needs config.examples_on = 'device'"
        )
    data, clients = experiment.population
    indices, counts = partition.pad([np.concatenate(experiment.problem.clients)])
    put = lambda new, old: jax.device_put(new, old.sharding)
    clients = jax.tree.map(put, Client(indices, counts), clients)
    config = experiment.config.copy_and_resolve_references()
    config.cohort = 0
    return experiment._replace(config=config, population=Resident(data, clients))


def trace(experiment: Experiment, settings: ConfigDict, name: str) -> None:
    """Goes through one round of a phase by shapes alone, which brings out what does not fit in its config."""
    if settings.cache_body:
        head_features.check(experiment, settings, name)
        experiment = head_features.cached(experiment, experiment.params, settings.cache_views, by_shapes=True)
    if settings.pooled:
        experiment = pooled(experiment)
    config, people, params = experiment.config, experiment.population, experiment.params
    rates = phase_parts.make_rates(settings, config.precision, experiment.problem.public)
    parts = parts_of(experiment, settings)
    personal_stage.check(experiment, settings, parts)
    private_checks.check_people(experiment, settings, parts)
    check_needs(settings, parts, params, people.data, name)
    store_on_host(config, parts, params)
    check_room(parts, params)
    shapes = programs.shapes_of_round(experiment, settings, parts, rates)
    serve = programs.compiled(experiment.compiled, settings, parts).serve
    serve.eval_shape(shapes.state, rates, shapes.cohort, shapes.results, shapes.sketches)
    if settings.most_bytes_up:
        programs.largest_upload(settings, shapes, parts)


def check_needs(settings: ConfigDict, parts: Parts, params: Any, data: dict, phase: str) -> None:
    """Refuses terms and sketches that find nothing to work on in this task, its model, or what the phase trains of it.

    It goes by shapes alone.

    Args:
      parts: of the phase.
      params: the whole model's.
      data: the training set {field: [N, ...]}.
      phase: the name of its group in the config, for the error.

    Raises:
      ValueError: the term needs a field, outputs or features that are not there, or its penalty is the same whatever is
        trained; or the sketches need the last layer's inputs.
    """
    by_head = parts.aggregator.needs.curvature in ("sketch", "image", "core") and settings.sketch.solver == "head"
    has_penalty = parts.term.penalty is not terms.none().penalty
    if not (by_head or has_penalty):
        return
    batch = {field: jax.ShapeDtypeStruct((2, *array.shape[1:]), array.dtype) for field, array in data.items()}
    out, features = jax.eval_shape(parts.task.outputs, params, batch)
    if by_head and not _of(features, "last"):
        raise ValueError(
            f"config.{phase}.sketch.solver: 'head' needs the inputs of the last layer, features.last, and this task's "
            "model gives none; set it to 'auto'"
        )
    name = f"config.{phase}.term.name: {settings.term.name!r}"
    lacking = _lacking(parts.term.needs, batch, out, features)
    if lacking:
        raise ValueError(f"{name} {lacking}; take another term, or 'none'")
    if has_penalty and not _feels(parts, params, batch):
        raise ValueError(
            f"{name} does not change with what config.{phase}.trainable = {settings.trainable!r} trains, so that it "
            "would do nothing; let trainable name more of the model, or take another term, or 'none'"
        )


def _lacking(needs: terms.Needs, batch: dict, out: Any, features: Any) -> str:
    """What a term needs of a batch, the outputs and the features, all by shapes, and does not find; "" for nothing."""
    absent = [field for field in needs.fields if field not in batch]
    if absent:
        return f"needs examples with {absent[0]!r}, and this task's have {', '.join(batch)}"
    if needs.classes and (out.shape[1] < 2 or not jnp.issubdtype(batch["label"].dtype, jnp.integer)):
        got = f"{out.shape[1]}, and labels of {batch['label'].dtype}"
        return f"needs outputs for two classes or more, and whole numbers for labels; this task has {got}"
    if needs.features and not _of(features, needs.features):
        return f"needs the model's features.{needs.features}, and there are none: in this task, or of the head alone"
    return ""


def _of(features: Any, field: str) -> list:
    """The arrays of a field of the features; none where there is no such field."""
    return jax.tree.leaves(getattr(features, field, ()))


def _feels(parts: Parts, params: Any, batch: dict) -> bool:
    """Whether the term's penalty depends on the trained parameters, as `vmap` sees it: is it another for each?"""
    theta = trained_of(parts, params)
    store, mask = jax.eval_shape(parts.term.init, theta), jax.ShapeDtypeStruct((2,), bool)

    def penalty(theta, params, store, batch, mask):
        anchor, outputs = model_of(parts, params)
        told = *outputs(theta, batch), outputs, batch.get, mask
        return parts.term.penalty(terms.Local(theta, anchor, store, store, 1.0, batch, mask, *told))

    several = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), theta)
    alike = jax.vmap(penalty, in_axes=(0, None, None, None, None), out_axes=None)
    try:
        jax.eval_shape(alike, several, params, store, batch, mask)
    except ValueError:  # it is not the same for all
        return True
    return False


def store_on_host(config: ConfigDict, parts: Parts, params: Any) -> bool:
    """Whether what clients keep between rounds lives on the host, by `config.client_store`; see `_on_host`."""
    blank = jax.eval_shape(parts.term.init, trees.select(params, parts.trainable))
    return _on_host(config, "client_store", parts.num_clients * trees.nbytes(blank))


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


def check_room(parts: Parts, params: Any) -> None:
    """Refuses a rule whose state, such as past rounds, finds no room on the device.

    Raises:
      ValueError: twice its bytes, before and after a round, are more than the device has.
    """
    size = trees.nbytes(jax.eval_shape(parts.aggregator.init, trees.select(params, parts.trainable)))
    if 2 * size > device_bytes():
        raise ValueError(
            f"config.fipa.aggregator.past: the rule would keep {size / 2**30:.3g} GiB between rounds, and hold them "
            f"twice within one; the device has {device_bytes() / 2**30:.3g} GiB. Lower aggregator.past.rank or "
            "past.length, take aggregator.past.kind = 'prior', or let trainable name fewer parameters"
        )


def device_bytes() -> int:
    """The bytes of a device's memory, where a CPU's is the host's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or host_bytes()


def host_bytes(root: Path = Path("/")) -> int:
    """The bytes of memory that this process may take: the machine's, or its container's where that has less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits(root)])


def cgroup_limits(root: Path) -> list[int]:
    """The limits of memory, in bytes, of the control groups that this process is in: Linux's, of version 1 or 2.

    Args:
      root: below which the folders `proc` and `sys` are.
    """
    limits = []
    for base, name, inside in _memory_groups(root):
        folder = base / inside.lstrip("/")
        # Inside a container the path may be the host's: then the container's own group is what stands at the top.
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(base))):
            with contextlib.suppress(OSError, ValueError):  # no such group or limit, `max` for none
                limits.append(int((group / name).read_text()))
    return limits


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(folder of the hierarchy, file of the limit, path in it) of the groups of memory that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            yield root / "sys/fs/cgroup", "memory.max", inside
        elif "memory" in controllers.split(","):
            yield root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", inside
