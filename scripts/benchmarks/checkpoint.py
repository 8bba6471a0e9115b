"""What does a checkpoint after every round cost? `benchmark.py checkpoint --config=configs/cifar10.py --methods fipa`.

The same rounds, kept and not kept, in turns: seconds a round, until the last checkpoint is on the disk, and CPU seconds
of all threads; ratios are medians over turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import profile, timing


def run(options: list[str]) -> dict:
    """Prints and returns a line for each method."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(profile.DEFAULT), help="a config file, FILE or FILE:VARIANT")
    parser.add_argument("--set", nargs="*", default=[], help="of its fields: PATH=VALUE, as data.dir=DIR")
    parser.add_argument("--methods", nargs="+", default=["fipa"], help="as in config.compare")
    parser.add_argument("--rounds", type=int, default=5, help="in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    args = parser.parse_args(options)

    import jax

    rows = []
    for method in args.methods:
        args.method = method
        config = profile.configured(args)
        with jax.enable_x64(config.precision == "float64"):
            rows.append(measure(config, args))
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(config, args) -> dict:
    """A line of the table."""
    from fipa_jax.config import methods as compared
    from fipa_jax.run import experiment, loop
    from fipa_jax.saving import journal, resume

    config.checkpoint.seconds = 0.0
    built, settings = experiment.build(config), compared.method(config, args.method)
    settings.rounds = args.rounds

    def run(rows):
        loop.run_phase(built, settings, args.method, built.params, 0, rows)

    def kept():
        with (
            tempfile.TemporaryDirectory() as folder,
            resume.open_at(Path(folder), config, {"data": {}, "code": {}}) as rows,
        ):
            run(rows)  # and until the last checkpoint is written

    def timed(name, function):
        def seconds():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            cpus[name].append(time.process_time() - cpu)
            return time.perf_counter() - wall

        return seconds

    variants, cpus = {"plain": lambda: run(journal.Rows()), "kept": kept}, {"plain": [], "kept": []}
    for function in variants.values():
        function()  # compiles
    walls = timing.in_turns({name: timed(name, function) for name, function in variants.items()}, args.repeats)
    middle = lambda found: statistics.median(found) / args.rounds
    ratio = lambda found: statistics.median(b / a for a, b in zip(found["plain"], found["kept"], strict=True))
    return {
        "method": args.method,
        "s a round": middle(walls["plain"]),
        "kept s": middle(walls["kept"]),
        "ratio": ratio(walls),
        "CPU s a round": middle(cpus["plain"]),
        "kept CPU s": middle(cpus["kept"]),
        "CPU ratio": ratio(cpus),
    }
