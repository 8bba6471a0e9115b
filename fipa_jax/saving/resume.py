"""What is in a work directory already, and whether the run goes on with it."""

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

from fipa_jax.files import PARTIAL, remove_partial
from fipa_jax.lookup import lookup
from fipa_jax.reporting import metrics
from fipa_jax.reporting.writers import WRITERS
from fipa_jax.saving.checkpoints import Checkpoints, Saved, recover
from fipa_jax.saving.journal import Journal
from fipa_jax.saving.model_files import stems
from fipa_jax.saving.provenance import differences
from fipa_jax.saving.signals import Signals

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# What a run writes, and so what may be moved aside when the next one comes.
WRITTEN = (
    "config.json", "origin.json", "metrics.jsonl", "start.json", "summary.json", "report.html", "checkpoints", "broken",
    "*.png", "*.svg", "*.msgpack", f"*{PARTIAL}", *(kind.leaves for kind in WRITERS.values()),
)  # fmt: skip
MARKS = ("config.json", "origin.json", "metrics.jsonl", "checkpoints")  # of which a run leaves one at least
PICTURES, ENDINGS = ("curves", "bytes", "split"), ("png", "svg")
SHOWING = ("start.json", "summary.json", "report.html")
RESUMES = {  # what --resume may say: what becomes of a run that is there already
    "yes": "goes on where its origin is the same; is moved aside where it is finished, or had saved nothing",
    "anyway": "goes on whatever its origin",
    "no": "is moved aside",
}
SHOWN = 20  # differences between two runs that a person is shown


@contextlib.contextmanager
def open_at(workdir: Path, config: ConfigDict, come_from: dict, resume: str = "yes") -> Iterator[Journal]:
    """A context with the journal of a run in its work directory, after what is there already; signals are noted in it.

    Args:
      workdir: made if it is not there.
      config: the run's.
      come_from: its {"data", "code"}, as `provenance` says them.
      resume: `yes` goes on with a run of the same origin and moves a finished one of another aside, or one that saved
        nothing; `anyway` goes on whatever the origin; `no` moves any aside. Moved aside is to `previous-N`.

    Yields:
      The journal, which knows where the run goes on.

    Raises:
      ValueError: the folder holds something else, a run that is under way, an unfinished one of another origin, or one
        whose checkpoints are all damaged.
    """
    lookup(RESUMES, resume, "--resume")
    origin, checkpoints = {"config": json.loads(config.to_json_best_effort())} | come_from, None
    with contextlib.ExitStack() as held:
        if jax.process_index():  # the first process reads and writes for all
            saved = _from_first(_nothing)
        else:
            saved = _from_first(functools.partial(_find, workdir, origin, resume, held))
            kept = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
            checkpoints = held.enter_context(contextlib.closing(kept))
        signals = held.enter_context(Signals())
        journal = Journal(workdir, config.checkpoint, checkpoints, saved, origin, signals)
        journal.again = again(resume)
        journal.last_phase = config.compare[-1] if config.fipa.rounds else "warmup"
        yield held.enter_context(contextlib.closing(journal))


def again(resume: str) -> str:
    """What goes on with a run that was begun with this `--resume`, in words."""
    return "the same command without --resume=no" if resume == "no" else "the same command"


def _nothing() -> None:
    """What a process finds that leaves it to the first one to look."""


def _find(workdir: Path, origin: dict, resume: str, held: contextlib.ExitStack) -> Saved | None:
    """Where the run in the work directory goes on; None if there is none, or none any more."""
    workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(_lock(workdir / "lock"))
    if not _earlier(workdir):
        return _check_strangers(workdir, origin["config"])
    if resume == "no":
        return _move_aside(workdir, "is not resumed")
    rows = workdir / "metrics.jsonl"
    try:
        saved = recover(workdir / "checkpoints", functools.partial(_check_rows, rows))
        if saved:
            _check_readable(rows, saved)
    except ValueError as error:
        raise ValueError(f"--workdir: {error}; name another folder, or --resume=no to move it aside") from None
    if saved is None:
        return _move_aside(workdir, "had saved nothing")
    if not _may_go_on(workdir, saved, origin, resume):
        return _move_aside(workdir, "is finished, and of another origin")
    if saved.note["finished"] and not differences(saved.note["origin"], origin):
        logging.warning("the run in %s is finished; --resume=no runs it anew", workdir)
    else:
        logging.warning("%s: going on after round %d of %s", workdir, saved.note["round"], saved.note["phase"])
    remove_partial(workdir)
    return saved


def _may_go_on(workdir: Path, saved: Saved, origin: dict, resume: str) -> bool:
    """Whether a saved run goes on: one of this origin, or of any if so told; False of a finished one of another.

    Raises:
      ValueError: it is of another origin, and not finished.
    """
    theirs = saved.note["origin"]
    differ = differences(theirs, origin)
    if not differ:
        return True
    shown = "\n  ".join([*differ[:SHOWN], *([f"and {len(differ) - SHOWN} more"] if differ[SHOWN:] else [])])
    if resume == "anyway":
        logging.warning("going on with a run of another origin:\n  %s", shown)
        return True
    if saved.note["finished"]:
        return False
    raise ValueError(
        f"--workdir: {workdir} holds an unfinished run of another origin:\n  {shown}\nName another folder; or "
        "--resume=anyway to go on with that run all the same, or --resume=no to move it aside and begin anew"
    )


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
    """What an earlier run has left in the work directory, if there was one; files of others stay where they are."""
    if not any((workdir / name).exists() for name in MARKS):
        return []
    return [path for path in workdir.iterdir() if any(path.match(name) for name in WRITTEN)]


def _check_strangers(workdir: Path, config: dict) -> None:
    """Refuses a work directory in which the run would write over a file of others.

    Raises:
      ValueError: names the file.
    """
    of_phases = list(stems(["warmup", *config["compare"]]).values())
    written = [f"{stem}.{ending}" for stem in [*PICTURES, *of_phases] for ending in ENDINGS]
    written += [f"{stem}.msgpack" for stem in of_phases] + list(SHOWING)
    written += [WRITERS[name].leaves for name in config["writers"]]
    taken = [name for name in written if (workdir / name).exists()]
    if taken:
        raise ValueError(f"--workdir: the run would write over {taken[0]!r} in {workdir}; name another folder")


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


def _check_readable(path: Path, saved: Saved) -> None:
    """Checks that a run can go on: its rows can be read, and the checkpoint says which phases are done."""
    metrics.read(path, saved.note["metrics_bytes"])
    if "done" not in saved.note:
        raise ValueError(f"{path.parent} holds a run of an older version of this package")


def _from_first(find: Callable[[], Saved | None]) -> Saved | None:
    """What `find()` returns, or raises, in the first process: the same in all of them."""
    if jax.process_count() == 1:
        return find()
    saved, error = _attempt(find)
    message, about, shapes = json.loads(_text_of_first(_outline(saved, error)))
    if message is not None:
        raise error or ValueError(message)
    if about is None:
        return None
    step, note = about
    blank = {path: np.zeros(shape, dtype) for path, (dtype, *shape) in shapes.items()}
    leaves = blank if jax.process_index() else saved.leaves
    return Saved(step, {path: _array_of_first(leaves[path]) for path in blank}, note)


def _attempt(find: Callable[[], Saved | None]) -> tuple[Saved | None, Exception | None]:
    """(what `find()` returns, None), or (None, what it raises): whatever that is, the other processes wait."""
    try:
        return find(), None
    except Exception as error:
        return None, error


def _outline(saved: Saved | None, error: Exception | None) -> str:
    """What processes must know before arrays are sent: JSON of [error, [step, note], {path: [type, *shape]}]."""
    shapes = None if saved is None else {path: [str(leaf.dtype), *leaf.shape] for path, leaf in saved.leaves.items()}
    return json.dumps([error and str(error), saved and [saved.step, saved.note], shapes])


def _text_of_first(text: str) -> str:
    """The first process's text, in all of them; its length goes first."""
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    mine = np.zeros(size, np.uint8) if jax.process_index() else content
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes().decode()


def _array_of_first(leaf: np.ndarray) -> np.ndarray:
    """The first process's array, in all of them, for which the others give one of its type and shape.

    As bytes: a sum over processes, which is how it is sent, would turn -0.0 into 0.0.
    """
    sent = np.asarray(multihost_utils.broadcast_one_to_all(leaf.reshape(-1).view(np.uint8)))
    return sent.view(leaf.dtype).reshape(leaf.shape)
