"""A run that is there to be ill-treated: a small one with every kind of state, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = (
    "fipa",  # whose damping follows the clients' losses
    "fedavg:term.name=scaffold:server.optimizer=adam:server.lr=0.01:local.optimizer=adam:local.lr_decay=0.99",
    "fipa:aggregator.trust=false:local.matched=false:local.optimizer=sgd:local.lr=0.1:server.optimizer=momentum",
)


class Victim:
    """The script on the sine task, by default checkpointed after every round.

    Args:
      workdir: of the run.
      rounds: of the warm-up and of each method.
      *flags: of the script besides.
    """

    def __init__(self, workdir: Path, rounds: int, *flags: str):
        self.workdir, self.rounds, self.flags = Path(workdir), rounds, flags

    def start(self) -> subprocess.Popen:
        """Starts the run, or what is left of it."""
        command = [
            sys.executable,
            str(ROOT / "scripts/train.py"),
            f"--workdir={self.workdir}",
            "--config.rounds_per_call=1",
            "--config.checkpoint.seconds=0",
            f"--config.warmup.rounds={self.rounds}",
            f"--config.fipa.rounds={self.rounds}",
            f"--config.compare={METHODS}",
            *self.flags,
        ]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=os.environ | {"TQDM_DISABLE": "1"}, text=True, **pipes)

    def finish(self) -> str:
        """Runs to the end and returns what was said.

        Raises:
          RuntimeError: it did not get there.
        """
        process = self.start()
        said = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"the run did not go on:\n{said}")
        return said

    def rows(self) -> list[dict]:
        """The metrics file's whole rows, without the seconds, which differ from run to run."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]

    def models(self) -> dict:
        """{file: bytes} of the models that the run has left."""
        return {path.name: path.read_bytes() for path in self.workdir.glob("*.msgpack")}

    def differs(self, whole: "Victim") -> dict:
        """How far the ended run is from one that nobody touched."""
        ours, theirs = self.rows(), whole.rows()
        rows = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
        return {"rows that differ": rows, "runs whose models differ": int(self.models() != whole.models())}

    def wait_for(self, process: subprocess.Popen, rows: int) -> None:
        """Waits until the metrics file has so many lines, or the process has ended."""
        path = self.workdir / "metrics.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < rows):
            time.sleep(0.002)

    def saving(self) -> bool:
        """Whether a checkpoint is being written: orbax's folder for that is there, or a step without its seal."""
        unfinished = lambda path: "tmp" in path.name or (path.name.isdigit() and not (path / "SHA256SUMS").exists())
        try:
            return any(map(unfinished, (self.workdir / "checkpoints").iterdir()))
        except FileNotFoundError:
            return False
