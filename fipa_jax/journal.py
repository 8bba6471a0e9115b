"""What does a run leave on the disk as it goes, and where does it go on when it is started again?"""

import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fipa_jax import checkpoint, metrics, origin, rounds, stopping, trees
from fipa_jax.checkpoint import Checkpoints, Saved

# What a run writes, and so what may be moved aside when the next one comes.
WRITTEN = (
    "config.json", "origin.json", "metrics.jsonl", "summary.json", "checkpoints", "broken", "*.png", "*.msgpack",
    "*.partial")  # fmt: skip
RESUMES = ("yes", "no", "anyway")
SHOWN = 20  # differences between two runs that a person is shown


class Journal:
    """A run's rows and checkpoints; a context, in which signals are noted.

    Args:
      workdir: of the metrics file.
      settings: `config.checkpoint`.
      checkpoints: None where another process keeps them.
      saved: where the run goes on; None from the start.
    """

    def __init__(self, workdir: Path, settings: ConfigDict, checkpoints: Checkpoints | None, saved: Saved | None):
        self.saved, self.start = saved, ()  # the model that all rules start from, if it is the warm-up's
        self._every, self._checkpoints, self._last = settings.seconds, checkpoints, time.monotonic()
        self._rows, self._signals = saved.step if saved else 0, stopping.Signals()
        size = saved.note["metrics_bytes"] if saved and checkpoints else 0
        self._writer = metrics.Writer(workdir / "metrics.jsonl", size)

    def __enter__(self) -> "Journal":
        self._signals.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._signals.__exit__()
        self._writer.close()
        if self._checkpoints is not None:
            self._checkpoints.close()

    def started_from(self, params):
        """The model that the rules start from where the run goes on after its warm-up, else `params`."""
        leaves = self.saved.leaves if self.saved else {}
        own = {path.removeprefix("start/"): leaf for path, leaf in leaves.items() if path.startswith("start/")}
        if own:
            self.start = params = jax.tree.map(jnp.asarray, trees.fitted(own, params))
        return params

    def resumed(self, phase: str) -> Saved | None:
        """Where this phase goes on; None from its start."""
        return self.saved if self.saved and self.saved.note["phase"] == phase else None

    def write(self, row: dict) -> None:
        """Writes a round's row."""
        self._writer.write(row)
        self._rows += 1

    def asked(self) -> bool:
        """Whether this process, alone, has been asked to stop."""
        return bool(self._signals.asked) and jax.process_count() == 1

    def keep(self, phase: str, state: rounds.State, row: dict, note: dict, ended: bool) -> None:
        """Saves the state where it is due: at the phase's end, after some time, or as the run is asked to stop.

        Args:
          phase: its name.
          state: after a round.
          row: of that round.
          note: what else the phase needs to go on.
          ended: whether it was the phase's last one.

        Raises:
          OSError: the checkpoint, or the one before it, cannot be written.
          stopping.Stopped: the run was asked to stop; all is saved.
        """
        stop = self._signals.asked
        if jax.process_count() > 1:  # all stop after the same round
            stop = int(multihost_utils.process_allgather(np.int32(stop)).max())
        if self._checkpoints is not None and (ended or stop or time.monotonic() - self._last >= self._every):
            self._save(phase, state, row, note, ended)
        if stop:
            if self._checkpoints is not None:
                self._checkpoints.wait()
            raise stopping.Stopped(stop, f"after round {row['round']} of {phase}; the same command goes on from there")

    def _save(self, phase, state, row, note, ended):
        score, names = score_of(row), []
        if ended and phase == "warmup":
            names.append("end of warmup")
        _, best = self._checkpoints.named().get(f"best of {phase}", (0, {"score": -np.inf}))
        if score is not None and score > best["score"]:
            names.append(f"best of {phase}")
        note = note | {
            "phase": phase,
            "round": row["round"],
            "ended": ended,
            "score": score,
            "metrics_bytes": self._writer.sync(),
        }
        tree = rounds.snapshot(state)._asdict() | {"start": self.start}
        self._checkpoints.save(self._rows, tree, note, names)
        self._last = time.monotonic()


class Rows(list):
    """The rows of a phase on its own, as a journal that keeps nothing else."""

    write = list.append

    def resumed(self, phase: str) -> None:
        """Never."""

    def asked(self) -> bool:
        """Never."""
        return False

    def keep(self, *_, ended: bool) -> None:
        """Keeps nothing."""


def open_at(workdir: Path, config: ConfigDict, come_from: dict, resume: str = "yes") -> Journal:
    """The journal of a run in its work directory, after what is there already.

    Args:
      workdir: made if it is not there.
      config: the run's.
      come_from: its {"data", "code"}, as `origin` says them.
      resume: `yes` goes on with a run of the same origin and moves a finished one of another aside, or one that saved
        nothing; `anyway` goes on whatever the origin; `no` moves any aside. Moved aside is to `previous-N`.

    Raises:
      ValueError: the folder holds something else, an unfinished run of another origin, or one whose checkpoints are all
        damaged.
    """
    if resume not in RESUMES:
        raise ValueError(f"--resume: unknown {resume!r}; known: {', '.join(RESUMES)}")
    if jax.process_index():  # the first process reads and writes for all
        return Journal(workdir, config.checkpoint, None, _from_first(lambda: None))
    mine = {"config": json.loads(config.to_json_best_effort())} | come_from
    saved = _from_first(lambda: _find(workdir, mine, resume))
    (workdir / "checkpoints").mkdir(exist_ok=True)
    checkpoint.write(workdir / "config.json", f"{config.to_json_best_effort(indent=2)}\n".encode())
    checkpoint.write(workdir / "origin.json", f"{json.dumps(come_from, indent=2)}\n".encode())
    return Journal(workdir, config.checkpoint, Checkpoints(workdir / "checkpoints", config.checkpoint.keep), saved)


def _find(workdir: Path, mine: dict, resume: str) -> Saved | None:
    """Where the run in the work directory goes on; None if there is none, or none any more."""
    if not _held(workdir):
        return None
    if resume == "no":
        return _move_aside(workdir, "is not resumed")
    complete = functools.partial(_check_rows, workdir / "metrics.jsonl")
    saved = checkpoint.recover(workdir / "checkpoints", complete)
    if saved is None:
        return _move_aside(workdir, "had saved nothing")
    theirs = {name: _read(workdir / f"{name}.json") for name in ("config", "origin")}
    differ = origin.differences({"config": theirs["config"]} | theirs["origin"], mine)
    if differ and resume == "yes" and _finished(saved, theirs["config"]):
        return _move_aside(workdir, "is finished, and of another origin")
    if differ:
        shown = "\n  ".join([*differ[:SHOWN], *([f"and {len(differ) - SHOWN} more"] if differ[SHOWN:] else [])])
        if resume == "yes":
            raise ValueError(
                f"--workdir: {workdir} holds an unfinished run of another origin:\n  {shown}\nName another folder; or "
                "--resume=anyway to go on with that run all the same, or --resume=no to move it aside and begin anew"
            )
        logging.warning("going on with a run of another origin:\n  %s", shown)
    if _finished(saved, mine["config"]):
        logging.warning("the run in %s is finished; --resume=no runs it anew", workdir)
    else:
        logging.warning("%s: going on after round %d of %s", workdir, saved.note["round"], saved.note["phase"])
    return saved


def _held(workdir: Path) -> list[Path]:
    """What an earlier run has left in the work directory, which is made if it is not there."""
    workdir.mkdir(parents=True, exist_ok=True)
    there = [path for path in workdir.iterdir() if not path.match("previous-*")]
    foreign = [path.name for path in there if not any(path.match(name) for name in WRITTEN)]
    if foreign:
        raise ValueError(f"--workdir: {workdir} holds {min(foreign)!r}, no run's file; name an empty or a new folder")
    return there


def _move_aside(workdir: Path, why: str) -> None:
    """Moves an earlier run's files into `previous-N`: nothing is ever written over."""
    number = next(n for n in itertools.count(1) if not (workdir / f"previous-{n}").exists())
    aside, files = workdir / f"previous-{number}", _held(workdir)
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    logging.warning("the run in %s %s: moved to %s", workdir, why, aside)


def _check_rows(path: Path, note: dict) -> None:
    """Checks that the rows which a checkpoint follows on are there."""
    size = path.stat().st_size if path.exists() else 0
    if size < note["metrics_bytes"]:
        raise ValueError(f"it follows on {note['metrics_bytes']} bytes of {path}, which has only {size}")


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--workdir: {path}, which says what run this is, cannot be read ({error}); --resume=no begins anew"
        ) from None


def _finished(saved: Saved, config: dict) -> bool:
    """Whether that is the last round of all phases."""
    last = config["compare"][-1] if config["fipa"]["rounds"] else "warmup"
    return saved.note["ended"] and saved.note["phase"] == last


def _from_first(find: Callable) -> Saved | None:
    """What `find()` returns, or raises, in the first process: the same in all of them."""
    if jax.process_count() == 1:
        return find()
    saved, error, send = None, None, multihost_utils.broadcast_one_to_all
    try:
        saved = find()
    except (OSError, ValueError) as raised:
        error = raised
    shapes = None if saved is None else {path: [str(leaf.dtype), *leaf.shape] for path, leaf in saved.leaves.items()}
    outline = json.dumps([error and str(error), saved and [saved.step, saved.note], shapes]).encode()
    size, first = int(send(np.int32(len(outline)))), not jax.process_index()
    outline = np.asarray(send(np.frombuffer(outline, np.uint8) if first else np.zeros(size, np.uint8))).tobytes()
    found, about, shapes = json.loads(outline)
    if found:
        raise error or ValueError(found)
    if about is None:
        return None
    blank = {path: np.zeros(shape, dtype) for path, (dtype, *shape) in shapes.items()}
    # As bytes: a sum over processes, which is what this is, would turn -0.0 into 0.0.
    sent = {path: send(leaf.reshape(-1).view(np.uint8)) for path, leaf in (saved.leaves if first else blank).items()}
    return Saved(
        *about[:1],
        {path: np.asarray(sent[path]).view(leaf.dtype).reshape(leaf.shape) for path, leaf in blank.items()},
        about[1],
    )


def score_of(row: dict) -> float | None:
    """A round's figure by which it may be the best, higher is better: of the holdout, else of the test set."""
    for prefix in ("holdout_", "test_"):
        names = [name for name in row if name.startswith(prefix) and metrics.direction(name) and row[name] is not None]
        if names:
            name = next((name for name in names if "accuracy" in name), names[0])
            return metrics.direction(name) * row[name]
    return None
