"""What is in a work directory already, and does the run go on with it?"""

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fipa_jax.saving import checkpoints as checkpoint
from fipa_jax.saving import provenance as origin
from fipa_jax.saving import signals as stopping
from fipa_jax.saving.checkpoints import Checkpoints, Saved
from fipa_jax.saving.journal import Journal

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# What a run writes, and so what may be moved aside when the next one comes.
WRITTEN = (
    "config.json", "origin.json", "metrics.jsonl", "summary.json", "checkpoints", "broken", "*.png", "*.msgpack",
    "*.partial",
)  # fmt: skip
RESUMES = ("yes", "no", "anyway")
SHOWN = 20  # differences between two runs that a person is shown


@contextlib.contextmanager
def open_at(workdir: Path, config: ConfigDict, come_from: dict, resume: str = "yes") -> Iterator[Journal]:
    """A context with the journal of a run in its work directory, after what is there already; signals are noted in it.

    Args:
      workdir: made if it is not there.
      config: the run's.
      come_from: its {"data", "code"}, as `origin` says them.
      resume: `yes` goes on with a run of the same origin and moves a finished one of another aside, or one that saved
        nothing; `anyway` goes on whatever the origin; `no` moves any aside. Moved aside is to `previous-N`.

    Raises:
      ValueError: the folder holds something else, a run that is under way, an unfinished one of another origin, or one
        whose checkpoints are all damaged.
    """
    if resume not in RESUMES:
        raise ValueError(f"--resume: unknown {resume!r}; known: {', '.join(RESUMES)}")
    mine, checkpoints = {"config": json.loads(config.to_json_best_effort())} | come_from, None
    with contextlib.ExitStack() as held:
        if jax.process_index():  # the first process reads and writes for all
            saved = _from_first(lambda: None)
        else:
            saved = _from_first(lambda: _find(workdir, mine, resume, held))
            kept = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
            checkpoints = held.enter_context(contextlib.closing(kept))
        signals = held.enter_context(stopping.Signals())
        journal = Journal(workdir, config.checkpoint, checkpoints, saved, mine, signals)
        yield held.enter_context(contextlib.closing(journal))


def _find(workdir: Path, mine: dict, resume: str, held: contextlib.ExitStack) -> Saved | None:
    """Where the run in the work directory goes on; None if there is none, or none any more."""
    workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(_lock(workdir / "lock"))
    if not _earlier(workdir):
        return None
    if resume == "no":
        return _move_aside(workdir, "is not resumed")
    saved = checkpoint.recover(workdir / "checkpoints", functools.partial(_check_rows, workdir / "metrics.jsonl"))
    if saved is None:
        return _move_aside(workdir, "had saved nothing")
    theirs = saved.note["origin"]
    differ = origin.differences(theirs, mine)
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


@contextlib.contextmanager
def _lock(path: Path):
    """Keeps other processes out of the work directory."""
    with path.open("w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # of a run that ends at this moment
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"--workdir: a run is under way in {path.parent}; name another folder") from None
        except OSError as error:  # a file system without locks
            logging.warning("nothing keeps a second run out of %s: %s", path.parent, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _earlier(workdir: Path) -> list[Path]:
    """What an earlier run has left in the work directory."""
    there = [path for path in workdir.iterdir() if not path.match("previous-*") and path.name != "lock"]
    foreign = [path.name for path in there if not any(path.match(name) for name in WRITTEN)]
    if foreign:
        raise ValueError(
            f"--workdir: {workdir} holds {min(foreign)!r}, no run's file; move it elsewhere, or name another folder"
        )
    return there


def _move_aside(workdir: Path, why: str) -> None:
    """Moves an earlier run's files into `previous-N`: nothing is ever written over."""
    number = next(n for n in itertools.count(1) if not (workdir / f"previous-{n}").exists())
    aside = workdir / f"previous-{number}"
    aside.mkdir()
    # The checkpoints first: without them what is left, if this ends halfway, is a run that had saved nothing.
    for path in sorted(_earlier(workdir), key=lambda path: path.name != "checkpoints"):
        path.rename(aside / path.name)
    logging.warning("the run in %s %s: moved to %s", workdir, why, aside)


def _check_rows(path: Path, note: dict) -> None:
    """Checks that the rows which a checkpoint follows on are there."""
    size = path.stat().st_size if path.exists() else 0
    if size < note["metrics_bytes"]:
        raise ValueError(f"it follows on {note['metrics_bytes']} bytes of {path}, which has only {size}")


def _finished(saved: Saved, config: dict) -> bool:
    """Whether that is the last round of all phases."""
    rounds = config["first_round"] + config["warmup"]["rounds"] + config["fipa"]["rounds"]
    last = config["compare"][-1] if config["fipa"]["rounds"] else "warmup"
    return (saved.note["phase"], saved.note["round"]) == (last, rounds - 1)


def _from_first(find: Callable) -> Saved | None:
    """What `find()` returns, or raises, in the first process: the same in all of them."""
    if jax.process_count() == 1:
        return find()
    saved, error, send = None, None, multihost_utils.broadcast_one_to_all
    try:
        saved = find()
    except Exception as raised:  # whatever it is, the others wait
        error = raised
    shapes = None if saved is None else {path: [str(leaf.dtype), *leaf.shape] for path, leaf in saved.leaves.items()}
    outline = json.dumps([error and str(error), saved and [saved.step, saved.note], shapes]).encode()
    size, first = int(send(np.int32(len(outline)))), not jax.process_index()
    outline = np.asarray(send(np.frombuffer(outline, np.uint8) if first else np.zeros(size, np.uint8))).tobytes()
    said, about, shapes = json.loads(outline)
    if said is not None:
        raise error or ValueError(said)
    if about is None:
        return None
    step, note = about
    blank = {path: np.zeros(shape, dtype) for path, (dtype, *shape) in shapes.items()}
    # As bytes: a sum over processes, which is what this is, would turn -0.0 into 0.0.
    sent = {
        path: np.asarray(send(leaf.reshape(-1).view(np.uint8)))
        for path, leaf in (saved.leaves if first else blank).items()
    }
    return Saved(step, {path: sent[path].view(leaf.dtype).reshape(leaf.shape) for path, leaf in blank.items()}, note)
