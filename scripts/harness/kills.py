"""Kills runs at random points and inside saves, and resumes them until they end: `faults.py kills`."""

import random
import re
import signal
import tempfile
import time
from pathlib import Path

from harness.victim import Victim

PROMISED = {
    "kills": lambda found, value: value > 0,
    "failed resumes": 0,
    "rows that differ": 0,
    "runs whose models differ": 0,
    "most rounds lost by a kill": lambda found, value: value <= 2,
}


def add_options(parser) -> None:
    parser.add_argument("--anywhere", type=int, default=20, help="kills at random moments of the process")
    parser.add_argument("--saving", type=int, default=35, help="kills as soon as a checkpoint is being written")
    parser.add_argument("--rounds", type=int, default=100, help="of each of the run's four phases")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")


def run(args) -> dict:
    """What the kills cost."""
    draw = random.Random(args.seed)
    aims = ["saving"] * args.saving + ["anywhere"] * args.anywhere
    draw.shuffle(aims)
    count = {"kills": 0, "inside a save": 0, "failed resumes": 0, "rows that differ": 0, "runs whose models differ": 0}
    lost, ended = [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Victim(Path(folder) / "whole", args.rounds)
        began = time.perf_counter()
        whole.finish()
        seconds = time.perf_counter() - began
        while aims:
            victim, killed, process = Victim(Path(folder) / f"run-{ended}", args.rounds), None, None
            while process is None or process.returncode == -signal.SIGKILL:
                before, process = victim.rows(), victim.start()
                if aims:
                    strike(process, victim, aims.pop(), draw, len(before), seconds)
                said = process.communicate()[0]
                if killed is not None:
                    lost.append(len(before) - kept(said, before))
                killed = process.returncode == -signal.SIGKILL or None
                count["kills"] += bool(killed)
                count["inside a save"] += bool(killed) and victim.saving()
            if process.returncode:
                count["failed resumes"] += 1
                print(said)
            for name, value in victim.differs(whole).items():
                count[name] += value
            ended += 1
    return count | {"runs ended": ended, "most rounds lost by a kill": max(lost, default=0)}


def strike(process, victim: Victim, aim: str, draw: random.Random, rows: int, seconds: float) -> None:
    """Kills the process, if it does not end before."""
    if aim == "anywhere":
        time.sleep(draw.uniform(0, seconds / 2))
    else:
        victim.wait_for(process, rows + draw.randint(1, 30))
        while process.poll() is None and not victim.saving():
            pass
        time.sleep(draw.uniform(0, 0.01))
    process.kill()


def kept(said: str, rows: list[dict]) -> int:
    """After how many of the rows that there were a run has gone on; all, if it was killed before it could say so."""
    found = re.search(r"going on after round (\d+) of (.+)", said)
    if "saved nothing" in said:
        return 0
    if not found:
        return len(rows)
    return 1 + [(row["round"], row["run"]) for row in rows].index((int(found[1]), found[2]))
