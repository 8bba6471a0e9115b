"""A config becomes a run: the only file that imports all sides.

`build` makes the problem and the compiled stages; `run` goes through warm-up and the compared methods, and leaves in
the work directory: the models, metrics.jsonl, summary.json, curves.png, split.png, and what a `journal` keeps.
"""

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fipa_jax.client.examples import Client
from fipa_jax.config.checks import validate
from fipa_jax.config.methods import method
from fipa_jax.data import partition
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parallel import make_mesh, replicate
from fipa_jax.federation.population import OnHost, Resident
from fipa_jax.files import FULL, write
from fipa_jax.reporting import console as report
from fipa_jax.reporting import metrics, plots
from fipa_jax.run import head_features as cache
from fipa_jax.run import loop
from fipa_jax.run import parts as phase
from fipa_jax.saving import journal
from fipa_jax.saving import provenance as origin
from fipa_jax.saving import resume as resume_lib
from fipa_jax.saving.model_files import export, load
from fipa_jax.tasks import task as tasks


class Experiment(NamedTuple):
    """A config made real: the data on the device and the functions of a run."""

    config: ConfigDict
    problem: tasks.Problem
    population: Resident | OnHost  # all clients and their examples
    held: dict  # {"test" | "holdout": {field: [N, ...]}} on the device
    params: Any  # that the run starts from
    evaluate: Callable  # (params, data) -> {name: [N]}, compiled
    compiled: dict  # static part of a phase -> its compiled stages
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
    phase.check(config)  # before data are loaded, which may take long
    plots.check()  # its absence must show now
    problem = problem or tasks.build(config)
    if config.cohort > len(problem.clients):
        raise ValueError(f"config.cohort: {config.cohort} is above the number of clients, {len(problem.clients)}")
    partition.sizes(problem.clients)  # which looks for clients without examples
    mesh = make_mesh(config.devices)
    on_device = lambda tree: replicate(jax.tree.map(np.asarray, tree), mesh)
    if phase.examples_on_host(config, problem):
        population = OnHost(problem.train, problem.clients, config.cohort or len(problem.clients), on_device)
    else:
        population = Resident(*on_device((problem.train, Client(*partition.pad(problem.clients)))))
    held = {"test": problem.test} | ({} if problem.holdout is None else {"holdout": problem.holdout})
    root = jax.random.key(config.seed)
    params = jax.jit(problem.task.init)(jax.random.fold_in(root, 2**31))  # op by op it would compile each alone
    params = jax.tree.map(lambda leaf: leaf.astype(config.precision), params)
    if config.init_from:
        try:
            params = load(config.init_from, params)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"config.init_from: {error}") from error
    experiment = Experiment(
        config=config,
        problem=problem,
        population=population,
        held={prefix: on_device(data) for prefix, data in held.items()},
        params=params,
        evaluate=jax.jit(metrics.make_evaluate(problem.task, config.eval.batch_size)),
        compiled={},
        root=replicate(root, mesh),
    )
    # A mistake in the last of the phases must show now, not after hours of the first.
    if config.warmup.rounds:
        trace(experiment, config.warmup, "warmup")
    for spec in config.compare if config.fipa.rounds else ():
        trace(experiment, method(config, spec), "fipa")
    return experiment


def main(config: ConfigDict, workdir: Path, resume: str = "yes") -> None:
    """Runs the config, or the rest of it, and prints the methods side by side; see `run`."""
    if jax.process_index():  # the first process speaks and writes for all
        logging.set_verbosity(logging.ERROR)
        with tempfile.TemporaryDirectory() as unseen, contextlib.redirect_stdout(io.StringIO()):
            run(config, Path(unseen), resume)
        return
    compiled = report.Compilations()
    # What orbax has to say of a write that failed is raised as one error.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    summary = run(config, workdir, resume)
    print(f"\n{report.table(summary)}\n\ncompiled {compiled}")
    print(f"metrics, models and plots are in {workdir}")


def run(config: ConfigDict, workdir: Path, resume: str = "yes") -> dict:
    """Runs warm-up and every compared method; returns what `summary.json` holds.

    Jax's precision is set for the run alone, from `config.precision`.

    Args:
      config: all fields.
      workdir: of the results; a run that was stopped in there goes on.
      resume: `yes`, `no` or `anyway`, see `resume.open_at`.

    Raises:
      ValueError, FileNotFoundError, ImportError: before anything is written, see `build` and `resume.open_at`.
      OSError: the disk is full, or fails; what was saved before stays.
      stopping.Stopped: a signal asked for it; all is saved.
    """
    validate(config)
    with jax.enable_x64(config.precision == "float64"):
        experiment = build(config)
        come_from = {"data": origin.of_data(experiment.problem, experiment.params), "code": origin.of_code()}
        try:
            with resume_lib.open_at(Path(workdir), config, come_from, resume) as kept:
                report.draw_split(experiment.problem, workdir)
                return run_phases(experiment, Path(workdir), kept)
        except OSError as error:
            if error.errno in FULL:
                hint = "free some room, and the same command goes on from the last checkpoint"
                raise OSError(error.errno, f"{error.strerror}; {hint}") from error
            raise


def run_phases(experiment: Experiment, workdir: Path, kept: journal.Journal) -> dict:
    """The warm-up, then each compared method from the model it ends with: {"runs": {NAME: {final, best, config}}}.

    Model, summary and curves are written as soon as a phase is done: an error in a later one does not cost them. Phases
    that were done before the run was stopped are passed over.
    """
    config = experiment.config
    report.describe(config, experiment.problem, experiment.params)
    phases = {"warmup": config} if config.warmup.rounds else {}
    for spec in config.compare if config.fipa.rounds else ():
        phases[spec] = config.copy_and_resolve_references()
        phases[spec].fipa, phases[spec].compare = method(config, spec), (spec,)
    seen_by_head = {}

    def view(name: str, settings: ConfigDict, params) -> Experiment:
        """The experiment, or what the head sees of it from the phase's first model, the same for all its methods."""
        seen = experiment
        if settings.cache_body:
            key = name, settings.cache_views
            if key not in seen_by_head:
                seen_by_head[key] = cache.cached(experiment, params, settings.cache_views)
            seen = seen_by_head[key]
        return pooled(seen) if settings.pooled else seen

    def finish(name: str, params) -> dict:
        file = re.sub(r"[^\w.-]", "_", name.replace("=", "-"))
        export(workdir / f"{file}.msgpack", params)
        report.draw_prediction(experiment.problem, params, workdir / f"{file}.png")
        rows = metrics.read(workdir / "metrics.jsonl")
        figures = dict.fromkeys(name for row in rows for name in row if name.startswith("test_"))
        plots.curves(rows, list(figures), workdir / "curves.png")
        summary = {"runs": {}}
        for run_name, as_run in phases.items():
            own = [row for row in rows if row["run"] == run_name]
            if own and (run_name != "warmup" or len(phases) == 1):
                fields = {"config": json.loads(as_run.to_json_best_effort())}
                summary["runs"][run_name] = metrics.summarise(own) | fields
        write(workdir / "summary.json", f"{json.dumps(metrics.jsonable(summary), indent=2)}\n".encode())
        return summary

    names, start = list(phases), kept.started_from(experiment.params)
    going_on = kept.saved.note["phase"] if kept.saved else names[0]
    if going_on not in names:
        raise ValueError(f"--resume: the run was stopped in {going_on!r}, which config.compare has no more")
    for name in names[names.index(going_on) :]:
        group, first = (
            ("warmup", config.first_round) if name == "warmup" else ("fipa", config.first_round + config.warmup.rounds)
        )
        settings = phases[name][group]
        params = loop.run_phase(view(group, settings, start), settings, name, start, first, kept)
        summary = finish(name, params)
        if name == "warmup":
            start = kept.start = params
    return summary


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
        cache.check(experiment, settings, name)
        experiment = cache.cached(experiment, experiment.params, settings.cache_views, by_shapes=True)
    if settings.pooled:
        experiment = pooled(experiment)
    rates = phase.make_rates(settings, experiment.config.precision)
    stages = rounds.make_stages(loop.plan_of(experiment, settings))
    phase.memories_on_host(experiment.config, stages.plan, experiment.params)
    phase.check_room(stages.plan, experiment.params)
    cohort = experiment.population.shapes(stages.plan.cohort)
    state = stages.init(experiment.params, on_host=True)
    state = rounds.fetch(state, np.arange(stages.plan.cohort))  # the cohort's memories alone
    stages = loop.compiled(experiment, settings, stages, state)
    by_shapes = stages._replace(train=stages.train.eval_shape, sketch=stages.sketch.eval_shape)
    results, sketches = rounds.work(by_shapes, state, rates, cohort, experiment.root)
    stages.aggregate.eval_shape(state, rates, cohort, results, sketches)
