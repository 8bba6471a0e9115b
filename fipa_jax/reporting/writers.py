"""Where a run's rows go besides metrics.jsonl: a CSV file, TensorBoard, Weights & Biases, MLflow.

A writer is told every row of the run once, in order: after a resume first those from before. So a file is simply made
anew, and a store that cannot be, such as a server's, passes over the rounds that it has. Each library is an extra, and
is imported when its writer is opened. Nothing is sent over a network unless the user's environment asks for it.
"""

import csv
import functools
import importlib.util
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipa_jax import files
from fipa_jax.lookup import lookup

PROJECT = "fipa_jax"  # of W&B, and the experiment of MLflow, where the environment names no other
MOST_PARAMS, MOST_METRICS = 100, 1000  # settings, and figures, that MLflow takes at once
SECONDS = 1.0  # between two moments at which a library puts on the disk, or sends, what it was told


class Run(NamedTuple):
    """The warm-up, or one compared method: a run of its own in TensorBoard, W&B and MLflow."""

    name: str  # in the rows and on the screen
    stem: str  # in the names of files
    last: int  # number of its last round
    settings: dict  # the config as it runs, nested


class Writer(NamedTuple):
    """What is told of a run's rows."""

    write: Callable[[dict], Any]  # takes a row
    close: Callable[[], Any]


class Series(NamedTuple):
    """One run in a library of curves."""

    write: Callable[[int, dict[str, float]], Any]  # takes the round's number and {name: figure}
    close: Callable[[bool], Any]  # takes whether the run's last round is written


class Kind(NamedTuple):
    """A kind of writer, by what it needs and leaves."""

    open: Callable[[Path, dict[str, Run]], Writer]  # takes the work directory and the run's parts by name
    leaves: str  # file or folder in the work directory
    needs: dict[str, str]  # {module that it imports: the package that brings it}


def figures(row: dict) -> dict[str, float]:
    """{name: number} of a row: its numbers, 0 or 1 for a truth value, NaN for None; text and lists are left out.

    None stands for NaN or infinity in metrics.jsonl. A figure that was not taken in a round is not in its row.

    Example:
      figures({"run": "fipa", "round": 3, "test_mse": None, "skipped": False}) is {"round": 3, "test_mse": nan,
      "skipped": 0}.
    """
    numbers = {name: value for name, value in row.items() if value is None or isinstance(value, int | float)}
    return {name: math.nan if value is None else value + 0 for name, value in numbers.items()}


def panel(name: str) -> str:
    """A figure's name in a library of curves, which shows those of one group together: `test_mse` is `test/mse`."""
    return name.replace("_", "/", 1)


def csv_file(workdir: Path, runs: dict[str, Run]) -> Writer:
    """Writes `metrics.csv`: a line for each row, a column for each figure; empty where it was not taken.

    Where a figure comes up for the first time, the file is written anew with one more column.
    """
    path, columns = workdir / "metrics.csv", {}
    path.write_text("")

    def write(row: dict) -> None:
        cells = {"run": row["run"]} | figures(row)
        if not columns.keys() >= cells.keys():
            columns.update(dict.fromkeys(cells))
            _widen(path, list(columns))
        with path.open("a", newline="") as file:
            csv.DictWriter(file, list(columns), lineterminator="\n").writerow(cells)

    return Writer(write, lambda: None)


def _widen(path: Path, columns: list[str]) -> None:
    """Writes a CSV file anew with these columns, of which it has some."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)


def by_run(open_series: Callable[[Run], Series], runs: dict[str, Run]) -> Writer:
    """A writer with a series for every run, opened at its first row and closed where the next run's begin.

    Rows of a method that is compared no more, as before a resume, are passed over.
    """
    name, last, series = "", {}, None

    def close() -> None:
        nonlocal series
        if series is not None:
            ended, series = series, None
            ended.close(last["round"] >= runs[name].last or last.get("ended_early", False))

    def write(row: dict) -> None:
        nonlocal name, last, series
        if row["run"] not in runs:
            return
        if series is None or row["run"] != name:
            close()
            name, series = row["run"], open_series(runs[row["run"]])
        last = row
        series.write(row["round"], figures(row))

    return Writer(write, close)


def now_and_then(act: Callable[[], Any]) -> Callable[[], None]:
    """`act()`, but where it was done less than `SECONDS` ago: rounds may be shorter than what it takes."""
    due = 0.0

    def act_if_due() -> None:
        nonlocal due
        if time.monotonic() >= due:
            act()
            due = time.monotonic() + SECONDS

    return act_if_due


def event_files(workdir: Path, runs: dict[str, Run]) -> Writer:
    """Writes TensorBoard's event files, a folder for each run: `tensorboard --logdir WORKDIR/tensorboard`."""
    return by_run(functools.partial(_event_file, workdir / "tensorboard"), runs)


def _event_file(folder: Path, run: Run) -> Series:
    """A new event file, in the place of those from before a resume."""
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = folder / run.stem
    folder.mkdir(parents=True, exist_ok=True)
    before = list(folder.glob("events.out.tfevents.*"))
    file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{PROJECT}"))

    flush = now_and_then(file.flush)

    def add(**content) -> None:
        file.write(Event(wall_time=time.time(), **content).SerializeToString())
        flush()

    def write(k: int, values: dict[str, float]) -> None:
        points = [Summary.Value(tag=panel(name), simple_value=x) for name, x in values.items() if name != "round"]
        add(step=k, summary=Summary(value=points))

    add(file_version="brain.Event:2")
    add(step=0, session_log=SessionLog(status=SessionLog.START))  # a TensorBoard that looks on forgets what it has read
    for path in before:
        path.unlink()
    return Series(write, lambda ended: file.close())


def wandb_runs(workdir: Path, runs: dict[str, Run]) -> Writer:
    """Writes runs of Weights & Biases, offline unless WANDB_MODE says otherwise; `wandb sync` sends them later."""
    return by_run(functools.partial(_wandb_run, workdir), runs)


def _wandb_run(workdir: Path, run: Run) -> Series:
    """The run of its name: on a server the same one as before a resume, offline a folder in the place of that one."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    mode = os.environ.get("WANDB_MODE") or "offline"
    offline = mode == "offline"
    folder = workdir / "wandb"
    name = _identity(folder, run.name, lambda: secrets.token_hex(8))
    for path in folder.glob(f"offline-run-*-{name}") if offline else ():
        shutil.rmtree(path)
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=os.environ.get("WANDB_RUN_GROUP", workdir.absolute().name),
        name=run.name,
        id=name,
        dir=str(workdir),
        mode=mode,
        config=run.settings,
        resume=None if offline else "allow",
        reinit="create_new",  # beside a run of the user's own
        settings=wandb.Settings(silent=offline, console="off"),
    )

    def write(k: int, values: dict[str, float]) -> None:
        if k >= opened.step:  # the server has those before
            points = {panel(name): x for name, x in values.items() if name != "round"}
            opened.log(points, step=k, commit=True)

    return Series(write, lambda ended: opened.finish(exit_code=0 if ended else 1))


def mlflow_runs(workdir: Path, runs: dict[str, Run]) -> Writer:
    """Writes runs of MLflow: in a database in the work directory, unless MLFLOW_TRACKING_URI names a store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    folder = workdir.absolute() / "mlflow"
    folder.mkdir(exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
    return by_run(functools.partial(_mlflow_run, client, folder), runs)


def _mlflow_run(client, folder: Path, run: Run) -> Series:
    """The run of its name, the same one as before a resume: rounds that the store has are passed over."""
    from mlflow.entities import Metric

    name = _identity(folder, run.name, lambda: _new_mlflow_run(client, folder.parent.name, run))
    stored = client.get_run(name).data.metrics.get("round", -1)

    waiting = []

    def send() -> None:
        while waiting:
            client.log_batch(name, waiting[:MOST_METRICS])
            del waiting[:MOST_METRICS]

    send_if_due = now_and_then(send)

    def write(k: int, values: dict[str, float]) -> None:
        if k > stored:
            now = int(1000 * time.time())
            waiting.extend(Metric(panel(figure), float(x), now, k) for figure, x in values.items())
            send_if_due()

    def close(ended: bool) -> None:
        send()
        client.set_terminated(name, "FINISHED" if ended else "KILLED")

    return Series(write, close)


def _new_mlflow_run(client, group: str, run: Run) -> str:
    """The id of a new run with its settings, in the experiment that the environment names."""
    from mlflow.entities import Param

    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    there = client.get_experiment_by_name(title)
    experiment = there.experiment_id if there else client.create_experiment(title)
    name = client.create_run(experiment, run_name=run.name, tags={"workdir": group}).info.run_id
    settings = [Param(path, str(value)) for path, value in _flat(run.settings)]
    for i in range(0, len(settings), MOST_PARAMS):
        client.log_batch(name, params=settings[i : i + MOST_PARAMS])
    return name


def _flat(tree: dict, prefix: str = ""):
    """(a.b.c, value) of nested dictionaries."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _identity(folder: Path, name: str, make: Callable[[], str]) -> str:
    """By what a library knows a run: kept in `runs.json` of its folder, made where it is not there."""
    path = folder / "runs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = make()
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, f"{json.dumps(known, indent=2)}\n".encode())
    return known[name]


DATABASE = {"sqlalchemy": "sqlalchemy", "alembic": "alembic"}  # with which MLflow keeps runs on the disk
WRITERS = {
    "csv": Kind(csv_file, "metrics.csv", {}),
    "tensorboard": Kind(event_files, "tensorboard", {"tensorboardX": "tensorboardX"}),
    "wandb": Kind(wandb_runs, "wandb", {"wandb": "wandb"}),
    "mlflow": Kind(mlflow_runs, "mlflow", {"mlflow": "mlflow-skinny"} | DATABASE),
}


def check(names: Sequence[str]) -> None:
    """Checks that there are such writers, and the packages that they need, without the time that an import takes.

    Args:
      names: `config.writers`.

    Raises:
      ValueError: a name is unknown, or stands there twice.
      ImportError: a package is not installed; says which.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"config.writers: names a writer twice: {names}")
    for name in names:
        needs = lookup(WRITERS, name, "config.writers").needs
        packages = [package for module, package in needs.items() if not _installed(module)]
        if packages:
            raise ImportError(
                f"config.writers: {name!r} needs {' and '.join(packages)}: pip install {' '.join(packages)} "
                f"(or fipa_jax with its extra {name!r})"
            )


def _installed(module: str) -> bool:
    """Whether a module can be imported; a folder of its name, such as the one that W&B leaves, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
