"""Faulty uploads under every rule, and eigenvalues times a million: `faults.py clients`; see `benchmark.py robust`."""

from benchmarks import robust

PROMISED = {"taken for sound": 0, "farthest from without it": lambda found, value: value <= 1e-6}


def add_options(parser) -> None:
    parser.add_argument("--size", default="1000", help="parameters, P")


def run(args) -> dict:
    """How many were taken for sound, and how far the others move the step."""
    rows = robust.run([f"--size={args.size}"])["faults"]
    distances = [row[rule] for row in rows for rule in row if rule != "fault"]
    taken = sum(distance == "taken" for distance in distances)
    numbers = [distance for distance in distances if distance != "taken"]
    return {"faults x rules": len(distances), "taken for sound": taken, "farthest from without it": max(numbers)}
