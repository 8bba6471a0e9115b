"""What does a run leave on the disk as it goes? A row for every round, and checkpoints to go on from."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.federation import state as state_lib
from fipa_jax.federation.state import State
from fipa_jax.files import write
from fipa_jax.reporting import metrics
from fipa_jax.saving import signals as stopping
from fipa_jax.saving.checkpoints import Checkpoints, Saved


class Journal:
    """A run's rows and checkpoints, as `resume.open_at` opens it.

    Args:
      workdir: of the metrics file.
      settings: `config.checkpoint`.
      checkpoints: None where another process keeps them.
      saved: where the run goes on; None from the start.
      origin: {"config", "data", "code"}, which every checkpoint notes.
      signals: that may ask the run to stop.
    """

    def __init__(
        self,
        workdir: Path,
        settings: ConfigDict,
        checkpoints: Checkpoints | None,
        saved: Saved | None,
        origin: dict,
        signals: stopping.Signals,
    ):
        self.saved, self.start = saved, ()  # the model that all methods start from, if it is the warm-up's
        self._every, self._checkpoints, self._last = settings.seconds, checkpoints, time.monotonic()
        self._rows, self._signals, self._origin = saved.step if saved else 0, signals, origin
        size = saved.note["metrics_bytes"] if saved and checkpoints else 0
        self._writer = metrics.Writer(workdir / "metrics.jsonl", size)
        self._workdir, self._described = workdir, checkpoints is None
        if saved is None:
            self._describe()

    def close(self) -> None:
        """Closes the metrics file."""
        self._writer.close()

    def started_from(self, params):
        """The model that the methods start from where the run goes on after its warm-up, else `params`."""
        own = trees.below(self.saved.leaves, "start") if self.saved else {}
        if own:
            self.start = params = jax.tree.map(jnp.asarray, _fitting(trees.fitted, own, params))
        return params

    def resumed(self, phase: str, state: State, mesh) -> tuple[State, dict]:
        """(the state where this phase goes on, what was noted of it), or the blank state of its start as it came.

        Raises:
          ValueError: the phase is not the one that was saved.
        """
        saved = self.saved
        if not saved or saved.note["phase"] != phase:
            return state, {}
        if saved.note["first"] != int(state.round):
            raise ValueError(
                f"--resume: the run's {phase} began with round {saved.note['first']}, and would now with "
                f"{int(state.round)}; set config.first_round and config.warmup.rounds to what they were"
            )
        self.saved = saved._replace(leaves={})  # it may be large
        return _fitting(state_lib.restored, state, saved.leaves, mesh), saved.note

    def write(self, row: dict) -> None:
        """Writes a round's row."""
        self._describe()
        self._writer.write(row)
        self._rows += 1

    def asked(self) -> bool:
        """Whether this process, alone, has been asked to stop."""
        return bool(self._signals.asked) and jax.process_count() == 1

    def keep(self, phase: str, state: State, row: dict, note: dict, ended: bool) -> None:
        """Saves the state where it is due: at the phase's end, after some time, or as the run is asked to stop.

        Args:
          phase: its name.
          state: after a round.
          row: of that round.
          note: what else the phase needs to go on, with the number of its `first` round.
          ended: whether it was the phase's last one.

        Raises:
          OSError: the checkpoint, or the one before it, cannot be written.
          stopping.Stopped: the run was asked to stop; all is saved.
        """
        stop = self._signals.asked
        if jax.process_count() > 1:  # all stop after the same round
            stop = int(multihost_utils.process_allgather(np.int32(stop)).max())
        if self._checkpoints is not None:
            self._checkpoints.check()
            if ended or stop or time.monotonic() - self._last >= self._every:
                self._save(phase, state, row, note, ended)
            if stop:
                self._checkpoints.wait()
        if stop:
            raise stopping.Stopped(stop, f"after round {row['round']} of {phase}; the same command goes on from there")

    def _describe(self):
        """Writes for people what every checkpoint notes; of a run that goes on, once it does."""
        if not self._described:
            come_from = {name: part for name, part in self._origin.items() if name != "config"}
            for name, content in (("config", self._origin["config"]), ("origin", come_from)):
                write(self._workdir / f"{name}.json", f"{json.dumps(content, indent=2)}\n".encode())
            self._described = True

    def _save(self, phase, state, row, note, ended):
        self._checkpoints.wait()
        score, names = score_of(row), []
        if ended and phase == "warmup":
            names.append("end of warmup")
        _, best = self._checkpoints.named().get(f"best of {phase}", (0, {"score": -np.inf}))
        if score is not None and score > best["score"]:
            names.append(f"best of {phase}")
        note = note | {"phase": phase, "round": row["round"], "score": score, "origin": self._origin}
        note["metrics_bytes"] = self._writer.sync()
        tree = state_lib.snapshot(state)._asdict() | {"start": self.start}
        self._checkpoints.save(self._rows, tree, note, names)
        self._last = time.monotonic()


def _fitting(function, *args):
    """What a function makes of a checkpoint; its error says what that is about."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"--resume: the checkpoint is not of a run with this config: {error}") from error


class Rows(list):
    """The rows of a phase on its own, as a journal that keeps nothing else."""

    write = list.append

    def resumed(self, phase: str, state: State, mesh) -> tuple[State, dict]:
        """It begins at the start."""
        return state, {}

    def asked(self) -> bool:
        """Never."""
        return False

    def keep(self, *_, ended: bool) -> None:
        """Keeps nothing."""


def score_of(row: dict) -> float | None:
    """A round's figure by which it may be the best, higher is better: of the holdout, else of the test set."""
    for prefix in ("holdout_", "test_"):
        names = [name for name in row if name.startswith(prefix) and metrics.direction(name) and row[name] is not None]
        if names:
            name = next((name for name in names if "accuracy" in name), names[0])
            return metrics.direction(name) * row[name]
    return None
