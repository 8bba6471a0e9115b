"""What a run leaves on the disk as it goes: a row for every round, and checkpoints to go on from."""

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.federation import state as state_lib
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.state import State
from fipa_jax.files import replacing, write
from fipa_jax.reporting import metrics
from fipa_jax.saving.checkpoints import Checkpoints, Saved
from fipa_jax.saving.signals import Signals, Stopped

SECRETS, SECRET_BITS = "secrets.json", 64  # of private phases: {phase: number}


class Journal:
    """A run's rows and checkpoints, as `resume.open_at` opens it.

    Args:
      workdir: of the metrics file.
      settings: `config.checkpoint`.
      checkpoints: None where another process keeps them.
      saved: where the run goes on; None from the start.
      origin: {"config", "data", "code"}, which every checkpoint notes.
      signals: that may ask the run to stop.

    Attributes:
      saved: the same, without its arrays once they are in use.
      start: parameters that all methods start from, if they are the warm-up's; else ().
      done: names of the phases that are done.
      again: what goes on with the run once it is stopped, in words.
      last_phase: of the one after which the run is finished.
      on_row: is called with every row once it is written.
    """

    def __init__(
        self,
        workdir: Path,
        settings: ConfigDict,
        checkpoints: Checkpoints | None,
        saved: Saved | None,
        origin: dict,
        signals: Signals,
    ):
        self.saved, self.start, self.on_row = saved, (), lambda row: None
        self.again = "the same command"
        self.done, self.last_phase = list(saved.note["done"]) if saved else [], ""
        self._workdir, self._origin, self._signals = workdir, origin, signals
        self._checkpoints, self._seconds, self._saved_at = checkpoints, settings.seconds, time.monotonic()
        self._described = checkpoints is None
        self._rows = saved.step if saved else 0
        self._numbers: dict[str, float] = {}  # of the phase's rule, as the config has them
        size = saved.note["metrics_bytes"] if saved and checkpoints else 0
        self._writer = metrics.Writer(workdir / "metrics.jsonl", size)
        if saved is None:
            self._describe()

    def close(self) -> None:
        """Closes the metrics file."""
        self._writer.close()

    def started_from(self, params):
        """The model that the methods start from where the run goes on after its warm-up, else `params`."""
        leaves = trees.below(self.saved.leaves, "start") if self.saved else {}
        if leaves:
            self.start = params = jax.tree.map(jnp.asarray, _fitting(trees.fitted, leaves, params))
        return params

    def resumed(self, phase: str, state: State, parts: Parts) -> tuple[State, dict]:
        """(the state where this phase goes on, what was noted of it), or the blank state of its start as it came.

        The rule's numbers that the config has changed since are the new ones; a rule has moved others by itself.

        Raises:
          ValueError: the phase is not the one that was saved.
        """
        saved, numbers = self.saved, state_lib.numbers_of(state.aggregator, parts.aggregator.hyper)
        self._numbers = {path: float(number) for path, number in numbers.items()}
        if not saved or saved.note["phase"] != phase:
            return state, {}
        if saved.note["first"] != int(state.round):
            raise ValueError(
                f"--resume: the run's {phase} began with round {saved.note['first']}, and would now with "
                f"{int(state.round)}; set config.first_round and config.warmup.rounds to what they were"
            )
        self.saved = saved._replace(leaves={})  # it may be large
        found, before = _fitting(state_lib.restored, state, saved.leaves, parts.mesh), saved.note.get("numbers", {})
        changed = {path: numbers[path] for path, now in self._numbers.items() if before.get(path, now) != now}
        return found._replace(aggregator=trees.replace(found.aggregator, changed)), saved.note

    def write(self, row: dict) -> None:
        """Writes a round's row, and tells whoever is to know."""
        self._describe()
        self._writer.write(row)
        self._rows += 1
        self.on_row(row)

    def secret(self, phase: str) -> int:
        """A phase's secret, of the operating system's entropy: on the disk before it is used, and the same ever after.

        So a run that is killed and goes on draws the same noise again for the same sums, and spends nothing twice. It
        stays where another run moves this one aside, and is another one for another config, other data or code: two
        sums that differ never have the same noise, which their difference would take out.
        """
        file = self._workdir / SECRETS
        known = json.loads(file.read_text()) if file.exists() else {}
        if phase not in known:
            known[phase] = secrets.randbits(SECRET_BITS)
            with replacing(file) as temporary:
                temporary.touch(mode=0o600)  # before there is anything to read
                temporary.write_text(json.dumps(known))
        said = f"{known[phase]:x} {json.dumps(self._origin, sort_keys=True)}"
        return int.from_bytes(hashlib.sha256(said.encode()).digest()[: SECRET_BITS // 8], "big")

    def asked(self) -> bool:
        """Whether this process, alone, has been asked to stop, or is to write a checkpoint."""
        return jax.process_count() == 1 and (bool(self._signals.asked) or self._is_time())

    def _is_time(self) -> bool:
        """Whether the last checkpoint is `checkpoint.seconds` old."""
        return self._checkpoints is not None and time.monotonic() - self._saved_at >= self._seconds

    def keep(self, phase: str, state: State, row: dict, note: dict, ended: bool) -> bool:
        """Saves the state where it is due: at the phase's end, after some time, or as the run is asked to stop.

        Returns whether it was due.

        Args:
          phase: its name.
          state: after a round.
          row: of that round.
          note: what else the phase needs to go on, with the number of its `first` round.
          ended: whether it was the phase's last one.

        Raises:
          OSError: the checkpoint, or the one before it, cannot be written.
          Stopped: the run was asked to stop; all is saved.
        """
        number, due = self._asked_of_any(), False
        if self._checkpoints is not None:
            self._checkpoints.check()
            due = ended or bool(number) or self._is_time()
            if due:
                self._save(phase, state, row, note, ended)
        if number:
            if self._checkpoints is not None:
                self._checkpoints.wait()
            raise Stopped(number, f"after round {row['round']} of {phase}; {self.again} goes on from there")
        return due

    def _asked_of_any(self) -> int:
        """The number of a signal that asked any of the processes to stop, the same in all of them; 0 for none."""
        if jax.process_count() == 1:
            return self._signals.asked
        return int(multihost_utils.process_allgather(np.int32(self._signals.asked)).max())

    def _describe(self):
        """Writes for people what every checkpoint notes; of a run that goes on, once it does."""
        if not self._described:
            come_from = {name: part for name, part in self._origin.items() if name != "config"}
            for name, content in (("config", self._origin["config"]), ("origin", come_from)):
                write(self._workdir / f"{name}.json", f"{json.dumps(content, indent=2)}\n".encode())
            self._described = True

    def _save(self, phase: str, state: State, row: dict, note: dict, ended: bool):
        """Starts to write a checkpoint, once the last one is on the disk; the rows so far are there before it."""
        self._checkpoints.wait()
        score = score_of(row)
        note = note | {"phase": phase, "round": row["round"], "score": score, "origin": self._origin}
        note["numbers"], note["done"] = self._numbers, [*self.done]
        note["finished"] = ended and phase == self.last_phase
        note["metrics_bytes"] = self._writer.sync()
        tree = state_lib.snapshot(state)._asdict() | {"start": self.start}
        self._checkpoints.save(self._rows, tree, note, self._names_of(phase, score, ended))
        self._saved_at = time.monotonic()

    def _names_of(self, phase: str, score: float | None, ended: bool) -> list[str]:
        """The names by which a checkpoint is kept, whatever comes after it."""
        names = ["end of warmup"] if ended and phase == "warmup" else []
        best = f"best of {phase}"
        _, note = self._checkpoints.named().get(best, (0, {"score": -np.inf}))
        if score is not None and score > note["score"]:
            names.append(best)
        return names


def _fitting(function: Callable, *args):
    """What a function makes of a checkpoint's arrays; its error says that they are of another run."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"--resume: the checkpoint is not of a run with this config: {error}") from error


class Rows(list):
    """A journal in memory, a list of the rows: for a phase on its own, which keeps and resumes nothing."""

    write = list.append

    def resumed(self, phase: str, state: State, parts: Parts) -> tuple[State, dict]:
        """The state as it came: there is nothing to go on from."""
        return state, {}

    def secret(self, phase: str) -> int:
        """A fresh secret: nothing is kept."""
        return secrets.randbits(SECRET_BITS)

    def asked(self) -> bool:
        """False: no signal is heard."""
        return False

    def keep(self, *_, ended: bool) -> bool:
        """False: nothing is saved."""
        return False


def score_of(row: dict) -> float | None:
    """A round's figure by which it may be the best, higher is better: of the holdout, else of the test set."""
    for prefix in ("holdout_", "test_"):
        names = [name for name in row if name.startswith(prefix) and metrics.direction(name) and row[name] is not None]
        if names:
            name = next((name for name in names if "accuracy" in name), names[0])
            return metrics.direction(name) * row[name]
    return None
