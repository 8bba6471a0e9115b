"""A run from beginning to end: the warm-up, then every compared method from the model that it ends with.

It leaves in the work directory: the models, metrics.jsonl, start.json, summary.json, report.html with its pictures
(PNG and SVG), and what a `journal` keeps.
"""

import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from fipa_jax import files
from fipa_jax.config.checks import validate
from fipa_jax.config.methods import method
from fipa_jax.reporting import console, curves, hooks, metrics, report, writers
from fipa_jax.run import head_features, loop, private_checks, private_run
from fipa_jax.run.estimate import say_if_long
from fipa_jax.run.experiment import Experiment, build, pooled
from fipa_jax.saving import provenance
from fipa_jax.saving.journal import Journal
from fipa_jax.saving.model_files import export, stems
from fipa_jax.saving.resume import again, open_at
from fipa_jax.saving.signals import Stopped

WARMUP = "warmup"  # the name of its rows
SELDOM = 50  # times as long as it took lies between two refreshings of summary and curves
AT_FIRST = 30.0  # seconds before the first one


def main(config: ConfigDict, workdir: Path, resume: str = "yes") -> None:
    """Runs the config, or the rest of it, and prints the methods side by side; see `run`."""
    if jax.process_index():  # the first process speaks and writes for all
        logging.set_verbosity(logging.ERROR)
        with tempfile.TemporaryDirectory() as unseen, contextlib.redirect_stdout(io.StringIO()):
            run(config, Path(unseen), resume)
        return
    if sys.stderr.isatty() and not logging.vlog_is_on(1):
        logging.get_absl_handler().setFormatter(console.InLines())
    compilations = console.Compilations()
    # What orbax has to say of a write that failed is raised as one error.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    summary = run(config, workdir, resume)
    console.attempt("the table", console.show_table, summary, compilations)
    print(f"metrics, models and plots are in {workdir}, a page on all of it in {workdir / 'report.html'}")


def run(config: ConfigDict, workdir: Path, resume: str = "yes", on_row: hooks.Hook | None = None) -> dict:
    """Runs warm-up and every compared method; returns what `summary.json` holds.

    Jax's precision is set for the run alone, from `config.precision`.

    Example:
      rows = []
      run(config, "runs/mine", on_row=rows.append)

    Args:
      config: all fields.
      workdir: of the results; a run that was stopped in there goes on.
      resume: `yes`, `no` or `anyway`, see `resume.open_at`.
      on_row: is called with each row of metrics.jsonl, a dictionary, as it is written; after a resume first with those
        that are there already. What it raises is a warning, said once, and the run goes on; but KeyboardInterrupt
        ends it.

    Raises:
      ValueError, FileNotFoundError, ImportError: before anything is written, see `experiment.build` and
        `resume.open_at`.
      OSError: the disk is full, or fails; what was saved before stays.
      signals.Stopped: a signal asked for it; all is saved.
      loop.Stalled: the run makes no progress.
    """
    validate(config)
    writers.check(config.writers)  # before data are loaded, which may take long
    workdir = files.local(workdir, "--workdir")
    with jax.enable_x64(config.precision == "float64"):
        experiment = build(config)
        origin = {
            "data": provenance.of_data(experiment.problem, experiment.params, experiment.people),
            "code": provenance.of_code(),
        }
        try:
            with open_at(workdir, config, origin, resume) as journal:
                if not any_private(config):
                    console.attempt("split.png", console.draw_split, experiment.problem, workdir)
                with hooks.told(workdir, config.writers, runs_of(config), on_row) as journal.on_row:
                    return run_phases(experiment, workdir, journal)
        except OSError as error:
            if error.errno in files.FULL:
                hint = f"free some room, and {again(resume)} goes on from the last checkpoint"
                raise OSError(error.errno, f"{error.strerror}; {hint}") from error
            raise


def run_phases(experiment: Experiment, workdir: Path, journal: Journal) -> dict:
    """The warm-up, then each compared method from the model it ends with: {"runs": {NAME: {final, best, config}}}.

    Model and summary are written as soon as a phase is done: an error in a later one does not cost them. Pictures and
    page follow where they are due, and after the last phase. Phases that were done before the run was stopped are
    passed over.
    """
    config = experiment.config
    shown = experiment
    if any_private(config):
        shown = experiment._replace(problem=private_run.as_shown(experiment.problem))
        console.attempt("the parameters", print, console.parameter_table(shown.params, config.fipa.trainable))
    else:
        console.attempt("the description", console.describe, config, shown.problem, shown.params)
    console.attempt("the first model", write_start, shown, workdir)
    phases, seen_by_head = configs_of(config), {}
    settings_of = settings_by_phase(phases)
    if not journal.saved:
        console.attempt("the time that it takes", say_if_long, experiment, list(settings_of.values()))
    show = refreshing(phases, workdir)
    names, start = phases_left(list(phases), journal), started_from(experiment, journal)
    journal.last_phase = names[-1]
    for name in names:
        warmup, settings = name == WARMUP, settings_of[name]
        first = config.first_round + (0 if warmup else config.warmup.rounds)
        view = view_of(experiment, settings, start, seen_by_head, warmup)
        try:
            params = loop.run_phase(view, settings, name, start, first, journal, show)
        except (Stopped, loop.Stalled):
            refresh(phases, workdir)
            raise
        journal.done.append(name)
        finish(shown, name, params, workdir)
        summary, _ = write_summary(phases, workdir)
        if name == names[-1]:
            refresh(phases, workdir)
        else:
            show()
        if warmup:
            start = journal.start = params
    return summary


def phases_left(names: list[str], journal: Journal) -> list[str]:
    """The phases of these names that are still to run: first the one that was under way, then those not done before.

    So every method runs once, wherever a run that goes on with another `compare` has it.

    Raises:
      ValueError: the one that was under way is none of them.
    """
    if not journal.saved:
        return names
    under_way = journal.saved.note["phase"]
    if under_way not in names:
        raise ValueError(f"--resume: the run was stopped in {under_way!r}, which config.compare has no more")
    return [under_way, *(name for name in names if name not in (*journal.done, under_way))]


def started_from(experiment: Experiment, journal: Journal) -> Any:
    """The model that the methods start from where the run goes on after its warm-up, else the run's first.

    Raises:
      ValueError: a method is private, and that warm-up was not.
    """
    start = journal.started_from(experiment.params)
    if journal.start and any_private(experiment.config):
        raise ValueError(
            "--resume: the methods began with the model of the run's warm-up, which had no privacy; begin anew with "
            "--resume=no"
        )
    return start


def any_private(config: ConfigDict) -> bool:
    """Whether a phase is private: then nothing of the clients' data is shown, whichever phase it is of."""
    return any(private_checks.is_private(phase.fipa) for phase in configs_of(config).values())


def configs_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """{name of a phase: the config as it runs}: the warm-up, and each compared method as the FIPA phase."""
    phases = {WARMUP: config} if config.warmup.rounds else {}
    for spec in config.compare if config.fipa.rounds else ():
        phases[spec] = config.copy_and_resolve_references()
        phases[spec].fipa, phases[spec].compare = method(config, spec), (spec,)
    return phases


def settings_by_phase(phases: dict[str, ConfigDict]) -> dict[str, ConfigDict]:
    """{name of a phase: the fields of that phase alone}, of what `configs_of` gives."""
    return {name: config.warmup if name == WARMUP else config.fipa for name, config in phases.items()}


def runs_of(config: ConfigDict) -> dict[str, writers.Run]:
    """{name of a phase: the run that writers keep of it}."""
    names, runs = stems([WARMUP, *config.compare]), {}
    for name, phase in configs_of(config).items():
        rounds = config.warmup.rounds + (0 if name == WARMUP else phase.fipa.rounds)
        settings = json.loads(phase.to_json_best_effort())
        runs[name] = writers.Run(name, names[name], config.first_round + rounds - 1, settings)
    return runs


def view_of(experiment: Experiment, settings: ConfigDict, params: Any, seen_by_head: dict, warmup: bool) -> Experiment:
    """The experiment as a phase sees it: whole, by its head alone, or with all examples in one client's hands.

    Args:
      params: the phase's first.
      seen_by_head: what the head sees, the same for all methods; filled as it is needed.
    """
    if settings.cache_body:
        key = warmup, settings.cache_views
        if key not in seen_by_head:
            seen_by_head[key] = head_features.cached(experiment, params, settings.cache_views)
        experiment = seen_by_head[key]
    return pooled(experiment) if settings.pooled else experiment


def finish(experiment: Experiment, name: str, params: Any, workdir: Path) -> None:
    """Writes what a phase leaves: its model, and a picture of what that says."""
    file = stems([WARMUP, *experiment.config.compare])[name]
    export(workdir / f"{file}.msgpack", params)
    console.attempt(f"{file}.png", console.draw_prediction, experiment.problem, params, workdir / f"{file}.png")


def refreshing(phases: dict[str, ConfigDict], workdir: Path) -> Callable[[], None]:
    """Builds `refresh()` for every checkpoint, which takes no more than a fiftieth of the time."""
    due = time.monotonic() + AT_FIRST

    def refresh_if_due() -> None:
        nonlocal due
        began = time.monotonic()
        if began >= due:
            refresh(phases, workdir)
            due = time.monotonic() + SELDOM * (time.monotonic() - began)

    return refresh_if_due


def refresh(phases: dict[str, ConfigDict], workdir: Path) -> dict:
    """Writes the summary of all rounds so far, then draws their curves, and the page; returns the summary."""
    summary, rows = write_summary(phases, workdir)
    console.attempt("curves.png", draw_curves, rows, workdir)
    console.attempt("report.html", write_report, phases, rows, summary, workdir)
    return summary


def write_summary(phases: dict[str, ConfigDict], workdir: Path) -> tuple[dict, list[dict]]:
    """Writes the summary of all rounds so far; returns it, and their rows."""
    rows = metrics.read(workdir / "metrics.jsonl")
    summary = summary_of(phases, rows)
    files.write(workdir / "summary.json", f"{json.dumps(metrics.jsonable(summary), indent=2)}\n".encode())
    return summary, rows


def write_report(phases: dict[str, ConfigDict], rows: list[dict], summary: dict, workdir: Path) -> None:
    """Writes the page on the run so far, with all its pictures."""
    pictures = {
        "curves": "The test set's figures by rounds; all begin at the dot; dotted: the clients' own figures",
        "bytes": "The same by what was sent, to and from the clients, since all began",
        "split": "Who owns which data",
    }
    names = [name for name in phases if name != WARMUP]
    of_models = stems([WARMUP, *names])
    pictures |= {of_models[name]: f"What the model of {name} says" for name in names}
    rounds = {name: settings.rounds for name, settings in settings_by_phase(phases).items()}
    report.write(workdir, rows, summary, pictures, rounds, _goes_on_by(sys.argv))


def _goes_on_by(argv: list[str]) -> str:
    """The command that goes on with a run of scripts/train.py, see `resume.again`; "" for one of other code."""
    command = shlex.join(["python", *argv])
    return re.sub(r" --?resume[= ]no\b", "", command) if Path(argv[0]).name == "train.py" else ""


def draw_curves(rows: list[dict], workdir: Path) -> None:
    """Draws the test figures of all phases by rounds, and the first of them by bytes."""
    figures = list(dict.fromkeys(figure for row in rows for figure in row if figure.startswith("test_")))
    seeds = [curves.start_of(workdir) + rows]
    curves.draw(seeds, figures, workdir / "curves.png")
    curves.draw(seeds, figures[:1], workdir / "bytes.png", by_bytes=True)


def write_start(experiment: Experiment, workdir: Path) -> None:
    """Writes what the first model does on the test set, as a row: all curves begin there; and what a constant does."""
    file = workdir / "start.json"
    if jax.process_count() == 1 and not file.exists():
        row = {"run": curves.START, "round": experiment.config.first_round - 1}
        row |= metrics.jsonable(loop.of_model(experiment, experiment.held, experiment.params))
        constant = experiment.problem.baseline
        row |= {} if constant is None else {"constant": " ".join(console.baseline(constant).split())}
        files.write(file, f"{json.dumps(row)}\n".encode())


def summary_of(phases: dict[str, ConfigDict], rows: list[dict]) -> dict:
    """{"runs": {NAME: {final, best, config}}} of the phases that have rows; the warm-up only where it is alone."""
    runs = {}
    for name, config in phases.items():
        of_phase = [row for row in rows if row["run"] == name]
        if of_phase and (name != WARMUP or len(phases) == 1):
            runs[name] = metrics.summarise(of_phase) | {"config": json.loads(config.to_json_best_effort())}
            runs[name] |= {field: of_phase[-1][field] for field in ("epsilon", "delta") if field in of_phase[-1]}
    return {"runs": runs}
