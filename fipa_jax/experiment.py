"""A config becomes a run: the only file that imports all sides.

`build` makes the problem and the compiled stages; `run` goes through warm-up and the compared rules, and leaves in the
work directory: config.json, metrics.jsonl, summary.json, curves.png, split.png and the models.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fipa_jax import cache, checkpoint, loop, metrics, partition, phase, plots, report, rounds, tasks
from fipa_jax import config as config_lib
from fipa_jax.simulate import Client

# What a run writes, and so what may be moved aside when the next one comes.
WRITTEN = ("config.json", "metrics.jsonl", "summary.json", "*.png", "*.msgpack")


class Experiment(NamedTuple):
    """A config made real: the data on the device and the functions of a run."""

    config: ConfigDict
    problem: tasks.Problem
    train: dict  # {field: [N, ...]} on the device
    held: dict  # {"test" | "holdout": {field: [N, ...]}} on the device
    clients: Client  # all clients, [T, ...]
    params: Any  # that the run starts from
    evaluate: Callable  # (params, data) -> {name: [N]}, compiled
    compiled: dict  # static part of a phase -> its compiled stages
    root: jax.Array  # the key from which all others derive


def build(config: ConfigDict) -> Experiment:
    """Checks the config, loads the data, splits them, and builds what a run needs.

    Raises:
      ValueError, FileNotFoundError, ImportError: naming the config field and what to change.
    """
    config_lib.validate(config)
    if jnp.asarray(np.zeros([], config.precision)).dtype != config.precision:
        raise ValueError(
            f"config.precision: {config.precision} needs `with jax.enable_x64(True):` around build; run has it"
        )
    plots.pyplot()  # its absence must show now
    problem = tasks.build(config)
    indices, counts = partition.pad(problem.clients)
    if config.cohort > len(counts):
        raise ValueError(f"config.cohort: {config.cohort} is above the number of clients, {len(counts)}")
    mesh = phase.make_mesh(config.devices)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    on_device = lambda data: jax.device_put(jax.tree.map(np.asarray, data), everywhere)
    held = {"test": problem.test} | ({} if problem.holdout is None else {"holdout": problem.holdout})
    root = jax.random.key(config.seed)
    params = problem.task.init(jax.random.fold_in(root, 2**31))
    params = jax.tree.map(lambda leaf: leaf.astype(config.precision), params)
    if config.init_from:
        params = checkpoint.load_model(config.init_from, params)
    experiment = Experiment(
        config=config,
        problem=problem,
        train=on_device(problem.train),
        held={prefix: on_device(data) for prefix, data in held.items()},
        clients=on_device(Client(indices, counts)),
        params=params,
        evaluate=jax.jit(metrics.make_evaluate(problem.task, config.eval.batch_size)),
        compiled={},
        root=root,
    )
    # A mistake in the last of the phases must show now, not after hours of the first.
    if config.warmup.rounds:
        trace(experiment, config.warmup, "warmup")
    for spec in config.compare if config.fipa.rounds else ():
        trace(experiment, config_lib.rule(config, spec), "fipa")
    return experiment


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the config and prints the rules side by side."""
    summary = run(config, workdir)
    print(f"\n{report.table(summary)}\n\nmetrics, models and plots are in {workdir}")


def run(config: ConfigDict, workdir: Path) -> dict:
    """Runs warm-up and every compared rule; returns what `summary.json` holds.

    Jax's precision is set for the run alone, from `config.precision`.
    """
    config_lib.validate(config)
    with jax.enable_x64(config.precision == "float64"):
        experiment = build(config)
        workdir = fresh(Path(workdir))
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
        report.draw_split(experiment.problem, workdir)
        writer = metrics.Writer(workdir / "metrics.jsonl")
        try:
            return run_phases(experiment, workdir, writer)
        finally:
            writer.close()


def run_phases(experiment: Experiment, workdir: Path, writer: metrics.Writer) -> dict:
    """The warm-up, then each compared rule from the model it ends with: {"runs": {NAME: {final, best, config}}}.

    Model, summary and curves are written as soon as a phase is done: an error in a later one does not cost them.
    """
    config = experiment.config
    report.describe(config, experiment.problem, experiment.params)
    first, summary = config.first_round, {"runs": {}}
    seen_by_head = {}

    def view(name: str, settings: ConfigDict, params) -> Experiment:
        """The experiment, or what the head sees of it from the phase's first model, the same for all its rules."""
        seen = experiment
        if settings.cache_body:
            key = name, settings.cache_views
            if key not in seen_by_head:
                seen_by_head[key] = cache.cached(experiment, params, settings.cache_views)
            seen = seen_by_head[key]
        return pooled(seen) if settings.pooled else seen

    def finish(name: str, params, rows: list[dict], as_run: ConfigDict) -> None:
        file = re.sub(r"[^\w.-]", "_", name.replace("=", "-"))
        checkpoint.save_model(workdir / f"{file}.msgpack", params)
        report.draw_prediction(experiment.problem, params, workdir / f"{file}.png")
        if name != "warmup" or not config.fipa.rounds:
            summary["runs"][name] = metrics.summarise(rows) | {"config": json.loads(as_run.to_json_best_effort())}
            (workdir / "summary.json").write_text(json.dumps(metrics.jsonable(summary), indent=2) + "\n")
        rows = metrics.read(workdir / "metrics.jsonl")
        figures = dict.fromkeys(name for row in rows for name in row if name.startswith("test_"))
        plots.curves(rows, list(figures), workdir / "curves.png")

    params = experiment.params
    if config.warmup.rounds:
        seen = view("warmup", config.warmup, params)
        params, rows = loop.run_phase(seen, config.warmup, "warmup", params, first, writer)
        finish("warmup", params, rows, config)
    for spec in config.compare if config.fipa.rounds else ():
        as_run = config.copy_and_resolve_references()
        as_run.fipa, as_run.compare = config_lib.rule(config, spec), (spec,)
        seen = view("fipa", as_run.fipa, params)
        final, rows = loop.run_phase(seen, as_run.fipa, spec, params, first + config.warmup.rounds, writer)
        finish(spec, final, rows, as_run)
    return summary


def pooled(experiment: Experiment) -> Experiment:
    """The experiment with all clients' examples in one client's hands."""
    indices, counts = partition.pad([np.concatenate(experiment.problem.clients)])
    put = lambda new, old: jax.device_put(new, old.sharding)
    clients = jax.tree.map(put, Client(indices, counts), experiment.clients)
    config = experiment.config.copy_and_resolve_references()
    config.cohort = 0
    return experiment._replace(config=config, clients=clients)


def trace(experiment: Experiment, settings: ConfigDict, name: str) -> None:
    """Goes through one round of a phase by shapes alone, which brings out what does not fit in its config."""
    if settings.cache_body:
        cache.check(experiment, settings, name)
        experiment = cache.cached(experiment, experiment.params, settings.cache_views, run=jax.eval_shape)
    if settings.pooled:
        experiment = pooled(experiment)
    rates = phase.make_rates(settings, experiment.config.precision)
    stages = rounds.make_stages(loop.plan_of(experiment, settings))
    phase.memory_on_host(experiment.config, stages.plan, experiment.params, experiment.clients.num_examples.size)
    state = stages.init(experiment.params, stages.plan.cohort)  # with memories of the cohort alone, as stages see it
    stages = loop.compiled(experiment, settings, stages, state)
    data, clients, root = experiment.train, experiment.clients, experiment.root
    ids = stages.draw.eval_shape(state.round, clients, root)
    by_shapes = stages._replace(train=stages.train.eval_shape, sketch=stages.sketch.eval_shape)
    results, sketches = rounds.work(by_shapes, state, rates, data, clients, ids, root)
    stages.aggregate.eval_shape(state, rates, clients, ids, results, sketches)


def fresh(workdir: Path) -> Path:
    """Makes the work directory; an earlier run's files in it are moved into `previous-N`, never written over.

    Raises:
      ValueError: the directory holds something else than runs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    foreign = [
        path.name for path in workdir.iterdir() if not any(path.match(name) for name in (*WRITTEN, "previous-*"))
    ]
    if foreign:
        raise ValueError(
            f"--workdir: {workdir} holds {sorted(foreign)[0]!r}, no run's file; name an empty or a new folder"
        )
    earlier = [path for path in workdir.iterdir() if not path.match("previous-*")]
    if earlier:
        number = next(n for n in itertools.count(1) if not (workdir / f"previous-{n}").exists())
        aside = workdir / f"previous-{number}"
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        logging.warning("%s held an earlier run: moved to %s", workdir, aside)
    return workdir
