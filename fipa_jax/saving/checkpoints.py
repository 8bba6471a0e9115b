"""A run's checkpoints, which show when they were altered.

Checkpoints are orbax's: written beside the run's work, and there whole or not at all. Beyond that each is sealed by the
SHA-256 of its files, and notes that of its arrays: one that is not as it was written is set aside, and the one before
it used. Nothing in here is unpickled.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from fipa_jax import trees
from fipa_jax.files import FULL, SUMS, check_room, sums_of, write

SEAL = SUMS  # in each step's folder, once it is finished
REMOVED = ".removed"  # what a step's folder is called while it is removed
SLACK = 2**20  # bytes that a step takes beside its arrays, at most


Check = Callable[[dict], None]  # of a step's note; raises a ValueError where the step is of no use


class Saved(NamedTuple):
    """A checkpoint."""

    step: int
    leaves: dict  # {path: NumPy array}
    note: dict  # what the run noted of it, and `names`


class Checkpoints:
    """A run's checkpoints in a folder: the last `keep` steps, and those that have a name.

    Args:
      folder: made if it is not there. What a write that was cut short has left in it is removed.
      keep: the step before the last one is what a damaged last one falls back to.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = Path(folder).absolute(), keep
        self._thread, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        self._folder.mkdir(parents=True, exist_ok=True)
        # It removes no step: that is done here, once a later one is sealed.
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=_alone(),
            ),
        )
        self._notes = {step: _note(self._folder / str(step)) for step in self._manager.all_steps()}
        for removed in self._folder.glob(f"*{REMOVED}"):
            shutil.rmtree(removed)

    def save(self, step: int, tree, note: dict, names: Iterable[str] = ()) -> None:
        """Starts to write a step as soon as the last one is on the disk.

        Args:
          step: above all others.
          tree: pytree of arrays that nothing writes to meanwhile.
          note: anything that JSON has words for.
          names: by which the step is kept, until a later one takes them.

        Raises:
          OSError: there is no room for it, or the last one could not be written.
        """
        self.wait()
        leaves = {path: np.asarray(leaf) for path, leaf in trees.paths(tree).items()}
        check_room(self._folder, trees.nbytes(leaves) + SLACK)
        empty = {path: [str(leaf.dtype), *leaf.shape] for path, leaf in leaves.items() if not leaf.size}
        filled = {path: leaf for path, leaf in leaves.items() if leaf.size}  # the only ones that orbax takes
        note = note | {"step": step, "sha256": digest(leaves), "empty": empty, "names": [*names]}
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(filled), note=ocp.args.JsonSave(note))
        with self._as_one_error(step):
            if not self._manager.save(step, args=args, force=True):
                raise ValueError(f"step {self._manager.latest_step()} is there already")
        self._writing = self._thread.submit(self._finish, step, note)

    def check(self) -> None:
        """Looks whether the last step is known to have failed; raises as `wait`."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def wait(self) -> None:
        """Waits until the last step is on the disk.

        Raises:
          OSError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Waits, and lets go of what orbax holds."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # what could not be written was said by then
                self._manager.close()

    def named(self) -> dict:
        """{name: (step, its note)}, the last step of each name."""
        return {name: (step, note) for step, note in sorted(self._notes.items()) for name in note["names"]}

    def _finish(self, step: int, note: dict):
        """Seals the step once orbax has written it, and only then removes those that it makes superfluous."""
        with self._as_one_error(step):
            self._manager.wait_until_finished()
            write(self._folder / str(step) / SEAL, sums_of(self._folder / str(step)))
            self._notes[step] = note
            kept = {*sorted(self._notes)[-self._keep :], *(named for named, _ in self.named().values())}
            for old in {*self._notes} - kept:
                self._remove(old)

    def _remove(self, step: int):
        """Removes a step, which under its new name is none any more from the start."""
        del self._notes[step]
        removed = self._folder / f"{step}{REMOVED}"
        (self._folder / str(step)).rename(removed)
        shutil.rmtree(removed)

    @contextlib.contextmanager
    def _as_one_error(self, step: int):
        """Makes an OSError, that names the step, of whatever the libraries below raise."""
        try:
            yield
        except Exception as error:
            number = next((number for number in FULL if os.strerror(number) in str(error)), errno.EIO)
            why = str(error) if number == errno.EIO else os.strerror(number)
            raise OSError(number, f"checkpoint {step} could not be written to {self._folder}: {why}") from error


def recover(folder: Path, check: Check | None = None) -> Saved | None:
    """The last step that is as it was written; those after it, and all damaged ones, are set aside.

    Args:
      folder: of the checkpoints.
      check: refuses a step by its note; None for no such check.

    Returns:
      None if no step was ever finished: the last one has no seal if it was being written when its process ended.

    Raises:
      ValueError: there are steps, but none is of any use; they stay where they are.
    """
    steps = _steps(Path(folder).absolute())[::-1]
    unfinished = steps.pop(0) if steps and not (steps[0] / SEAL).exists() else None
    saved, broken = _newest_whole(steps, check)
    if broken and not saved:
        others = f" (nor can the {len(broken) - 1} before it)" if len(broken) > 1 else ""
        raise ValueError(f"no checkpoint can be used; of the last one, {next(iter(broken.values()))}{others}")
    if unfinished:
        broken[unfinished] = "it was never finished"
    for step, why in broken.items():
        _set_aside(step, why)
    return saved


def _newest_whole(steps: list[Path], check: Check | None) -> tuple[Saved | None, dict]:
    """(the first of the steps that can be used, {step that is damaged or of no use: why}); of the rest no arrays."""
    saved, broken = None, {}
    for step in steps:
        try:
            if saved:
                _check_seal(step)
            else:
                saved = _read_checked(step, check)
        except (OSError, ValueError) as error:
            broken[step] = error
    return saved, broken


def _read_checked(step: Path, check: Check | None) -> Saved:
    """Reads a step; raises where it is damaged, or its note is refused."""
    saved = read(step)
    if check:
        check(saved.note)
    return saved


def _set_aside(step: Path, why) -> None:
    """Moves a step into the folder `broken` beside the checkpoints, and says so."""
    aside = step.parent.with_name("broken") / step.name
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-again")
    aside.parent.mkdir(exist_ok=True)
    step.rename(aside)
    logging.warning("%s is not used: %s; moved to %s", step, why, aside)


def read(folder: Path) -> Saved:
    """Reads the step in a folder.

    Raises:
      ValueError: it is not what was written.
    """
    _check_seal(folder)
    with _reader() as reader:
        both = ocp.args.Composite(arrays=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
        arrays, note = (reader.restore(folder, args=both)[item] for item in ("arrays", "note"))
    empty = {path: np.zeros(shape, dtype) for path, (dtype, *shape) in note["empty"].items()}
    leaves = {path: np.asarray(leaf) for path, leaf in {**arrays, **empty}.items()}
    if digest(leaves) != note["sha256"]:
        raise ValueError(f"the checkpoint {folder} is damaged: its arrays are not those that were saved")
    return Saved(note["step"], leaves, note)


def named(folder: Path) -> dict[str, Path]:
    """{name: the last step's folder of that name} of a run's checkpoints: `end of warmup`, `best of NAME`."""
    sealed = [step for step in _steps(Path(folder).absolute()) if (step / SEAL).exists()]
    return {name: step for step in sealed for name in _note(step)["names"]}


def digest(leaves: dict) -> str:
    """The SHA-256 of {path: array}: of paths, types, shapes and contents."""
    total = hashlib.sha256()
    for path in sorted(leaves):
        leaf = np.ascontiguousarray(leaves[path])
        total.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        total.update(leaf.reshape(-1).view(np.uint8))
    return total.hexdigest()


def _steps(folder: Path) -> list[Path]:
    """The folders of the steps, in order; what is only being written or removed has other names."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(steps, key=lambda path: int(path.name))


def _check_seal(folder: Path) -> None:
    """Raises a ValueError that names a file if a step's files are not as they were written."""
    if not (folder / SEAL).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {SEAL}")
    written, now = (folder / SEAL).read_bytes(), sums_of(folder)
    if written != now:
        differ = {*written.split(b"\n")} ^ {*now.split(b"\n")}
        names = {line.rpartition(b"  ")[2].decode(errors="replace") for line in differ} - {""} or {SEAL}
        raise ValueError(f"the checkpoint {folder} is damaged: {min(names)} is not as it was written")


def _note(folder: Path) -> dict:
    with _reader() as reader:
        return reader.restore(folder, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]


def _reader():
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone())


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes, the first one writes and reads for all."""
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
