"""Asks runs to stop by SIGTERM and SIGINT, and insists: `faults.py signals`."""

import random
import re
import signal
import statistics
import tempfile
import time
from pathlib import Path

from harness.victim import Victim

PROMISED = {
    "rounds lost": 0,
    "rows that differ": 0,
    "runs whose models differ": 0,
    "seconds to exit at a second signal, most": lambda found, value: value < 1,
}


def add_options(parser) -> None:
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20, help="of each of the run's four phases")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")


def run(args) -> dict:
    """Rounds lost, and seconds until the process is gone."""
    draw, seconds, lost = random.Random(args.seed), [], []
    count = {"signals": args.times, "rows that differ": 0, "runs whose models differ": 0}
    with tempfile.TemporaryDirectory() as folder:
        # No checkpoint is due but by the signal.
        whole, *victims = (Victim(Path(folder) / str(n), args.rounds, SELDOM) for n in range(args.times + 1))
        whole.finish()
        for n, victim in enumerate(victims):
            process = victim.start()
            victim.wait_for(process, draw.randrange(1, 4 * args.rounds - 1))
            sent = time.perf_counter()
            process.send_signal((signal.SIGTERM, signal.SIGINT)[n % 2])
            said = process.communicate()[0]
            seconds.append(time.perf_counter() - sent)
            rows, where = victim.rows(), re.search(r"stopped by SIG\w+ after round (\d+) of (.+);", said)
            lost.append(len(rows) - 1 - [(row["round"], row["run"]) for row in rows].index((int(where[1]), where[2])))
            victim.finish()
            for name, value in victim.differs(whole).items():
                count[name] += value
        insist = Victim(Path(folder) / "twice", 10**6, SELDOM, "--config.fipa.local.gauss_newton.tries=0")
        at_once = [insisted(insist) for _ in range(3)]
    return count | {
        "rounds lost": sum(lost),
        "seconds to exit, median": round(statistics.median(seconds), 3),
        "seconds to exit, most": round(max(seconds), 3),
        "seconds to exit at a second signal, most": round(max(at_once), 3),
    }


SELDOM = "--config.checkpoint.seconds=1e9"


def insisted(victim: Victim) -> float:
    """Seconds until the process is gone after two signals, the second as soon as the first is heard."""
    process = victim.start()
    victim.wait_for(process, 1)
    sent = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate()
    return time.perf_counter() - sent
