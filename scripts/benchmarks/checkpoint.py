"""What does a checkpoint after every round cost? `benchmark.py checkpoint --config=configs/cifar10.py --rules fipa`.

The same rounds, kept and not kept, in turns; seconds a round with all that is waited for at the end.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import profile, timing


def run(options: list[str]) -> dict:
    """Prints and returns a line for each rule."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(profile.DEFAULT), help="a config file, FILE or FILE:VARIANT")
    parser.add_argument("--set", nargs="*", default=[], help="of its fields: PATH=VALUE, as data.dir=DIR")
    parser.add_argument("--rules", nargs="+", default=["fipa"], help="as in config.compare")
    parser.add_argument("--rounds", type=int, default=5, help="in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    args = parser.parse_args(options)

    import jax

    rows = []
    for rule in args.rules:
        args.rule = rule
        config = profile.configured(args)
        with jax.enable_x64(config.precision == "float64"):
            rows.append(measure(config, args))
    timing.table(rows)
    return {"setting": vars(args), "rows": rows}


def measure(config, args) -> dict:
    """A line of the table."""
    from fipa_jax import config as config_lib
    from fipa_jax import experiment, journal, loop

    config.checkpoint.seconds = 0.0
    built, settings = experiment.build(config), config_lib.rule(config, args.rule)
    settings.rounds = args.rounds

    def plain():
        return seconds(journal.Rows())

    def kept():
        with tempfile.TemporaryDirectory() as folder:
            with journal.open_at(Path(folder), config, {}) as rows:
                start = time.perf_counter()
                seconds(rows)
            return time.perf_counter() - start  # to the last checkpoint's end

    def seconds(rows):
        start = time.perf_counter()
        loop.run_phase(built, settings, args.rule, built.params, 0, rows)
        return time.perf_counter() - start

    plain()  # compiles
    found = timing.in_turns({"plain": plain, "kept": kept}, args.repeats)
    each = {name: statistics.median(values) / args.rounds for name, values in found.items()}
    ratios = [kept / plain for kept, plain in zip(found["kept"], found["plain"], strict=True)]
    return {
        "rule": args.rule,
        "s a round": each["plain"],
        "kept s": each["kept"],
        "ratio": statistics.median(ratios),
        "ratios": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "ms a checkpoint": 1e3 * (each["kept"] - each["plain"]),
    }
