"""Fills the disk under a run, and resumes it where there is room: `faults.py disk`; as root, as it mounts a tmpfs."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from fipa_jax.saving import checkpoints as checkpoint
from harness.victim import Victim

PROMISED = {
    "exit status": 1,
    "said": lambda found, value: "No space left" in value and "goes on from the last checkpoint" in value,
    "rounds after the disk was full": lambda found, value: value <= 1,
    "rows that differ": 0,
    "runs whose models differ": 0,
}


def add_options(parser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="of each of the run's four phases")
    parser.add_argument("--size", default="16m", help="of the disk")


def run(args) -> dict:
    """What the run says, and what is left."""
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Victim(Path(folder) / "whole", args.rounds), Path(folder) / "small"
        whole.finish()
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={args.size}", "tmpfs", str(small)], check=True)
        try:
            victim = Victim(small / "run", args.rounds)
            process = victim.start()
            victim.wait_for(process, args.rounds)
            fill(small / "ballast")
            full = len(victim.rows())
            said = process.communicate()[0]
            rows, saved = len(victim.rows()), checkpoint.recover(victim.workdir / "checkpoints")
            moved = Victim(Path(folder) / "moved", args.rounds)
            shutil.copytree(victim.workdir, moved.workdir)
        finally:
            subprocess.run(["umount", str(small)], check=True)
        moved.finish()
    return {
        "exit status": process.returncode,
        "said": next(line for line in said.splitlines() if line.startswith("error: ")).replace(folder, ""),
        "rounds after the disk was full": rows - full,
        "rounds lost": rows - saved.step,
        **moved.differs(whole),
    }


def fill(path: Path) -> None:
    """Writes until nothing more can be written."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return
