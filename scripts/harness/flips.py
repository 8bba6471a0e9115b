"""Flips single bits in checkpoint files, cuts files short, and resumes: `faults.py flips`."""

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

from harness.victim import Victim

PROMISED = {
    "bit flips found": lambda found, value: value == found["bit flips"],
    "bit flips: the step before was used": lambda found, value: value == found["bit flips"],
    "truncations found": lambda found, value: value == found["truncations"],
    "truncations: the step before was used": lambda found, value: value == found["truncations"],
    "rows that differ": 0,
    "runs whose models differ": 0,
    "all damaged: refused": 1,
}


def add_options(parser) -> None:
    parser.add_argument("--flips", type=int, default=40)
    parser.add_argument("--truncations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10, help="of each of the run's four phases")
    parser.add_argument("--seed", type=int, default=0, help="of files, bytes and bits")


def run(args) -> dict:
    """How many were found."""
    draw = random.Random(args.seed)
    damages = {"bit flips": (flip, args.flips), "truncations": (truncate, args.truncations)}
    count = {"rows that differ": 0, "runs whose models differ": 0, "all damaged: refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = (Victim(Path(folder) / name, args.rounds) for name in ("whole", "stopped"))
        whole.finish()
        process = stopped.start()
        stopped.wait_for(process, 2 * args.rounds + args.rounds // 2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        last = max(steps(stopped), key=lambda step: int(step.name)).name
        for name, (damage, number) in damages.items():
            found = {f"{name}": number, f"{name} found": 0, f"{name}: the step before was used": 0}
            for n in range(number):
                victim = Victim(Path(folder) / f"{name}-{n}", args.rounds)
                shutil.copytree(stopped.workdir, victim.workdir)
                damage(victim.workdir / "checkpoints" / last, draw)
                said = victim.finish()
                found[f"{name} found"] += f"checkpoints/{last} is damaged" in said
                found[f"{name}: the step before was used"] += (victim.workdir / "broken" / last).is_dir()
                for figure, value in victim.differs(whole).items():
                    count[figure] += value
                shutil.rmtree(victim.workdir)
            count = found | count
        for step in steps(stopped):
            flip(step, draw)
        process = stopped.start()
        refused = "no checkpoint can be used" in process.communicate()[0]
        count["all damaged: refused"] += refused and process.returncode == 1
    return count


def steps(victim: Victim) -> list[Path]:
    """The folders of the run's checkpoints."""
    return [path for path in (victim.workdir / "checkpoints").iterdir() if path.name.isdigit()]


def flip(step: Path, draw: random.Random) -> None:
    """Flips one bit of one of a step's files."""
    path = draw.choice(files(step))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(step: Path, draw: random.Random) -> None:
    """Cuts one of a step's files short."""
    path = draw.choice(files(step))
    os.truncate(path, draw.randrange(path.stat().st_size))


def files(step: Path) -> list[Path]:
    """Those of a step that hold anything."""
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
