"""Seconds from the start of the process to the end of its first round: `benchmark.py startup`.

Each run is a process of its own, twice with one folder for compiled programs: at first an empty one, then with all the
programs of the first. The rest is importing, placing data and the round itself, which is tiny here.
"""

import argparse
import tempfile

from benchmarks import timing, whole_run

MODELS = ("sine", "cnn_23k", "resnet18")
METHODS = ("fedavg", "fipa")


def run(options: list[str]) -> dict:
    """Prints and returns the seconds of each model and method."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="sine, or networks of fipa_jax.models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args(options)
    rows = [measure(model, method) for model in args.models for method in args.methods]
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(model: str, method: str) -> dict:
    """A line of the table: FIPA with a ResNet is of its last layer, on two clients with ten examples each."""
    spec = {"model": model, "method": method, "clients": 2, "cohort": 2, "examples": 10, "rounds": 1, "epochs": 1}
    fields = {"fipa.trainable": "^head/", "fipa.sketch.rank": 10} if "resnet" in model and method == "fipa" else {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder}
        cold, warm = (
            whole_run.finish(whole_run.start(environment=cache, batch=10, fields=fields, **spec)) for _ in range(2)
        )
    return {
        "model": model,
        "method": method,
        "cold s": cold["first"],
        "cached s": warm["first"],
        "cold user s": cold["user"],
        "cached user s": warm["user"],
        "cached": warm["programs"].partition(" from the cache")[0],
    }
