"""Prints the figures of several runs of one config, such as one for each seed: median, mean, spread and worst.

for seed in 0 1 2; do python scripts/train.py --config.seed=$seed --workdir=runs/sine-$seed; done
python scripts/summarise.py runs/sine-0 runs/sine-1 runs/sine-2

With --plot it draws them as well: each method's mean over the runs, and a band of one standard deviation.

python scripts/summarise.py runs/sine-* --plot=sine.svg --metric=test_mse
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from fipa_jax import files
from fipa_jax.reporting import curves, metrics
from fipa_jax.saving.provenance import differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, help="work directories of the runs")
    parser.add_argument(
        "--last", type=int, default=1, help="a run's figure is its mean over this many last evaluations"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="a run counts until its rounds took so long")
    parser.add_argument("--rounds", type=float, default=math.inf, help="it counts until so many rounds of each phase")
    parser.add_argument("--megabytes", type=float, default=math.inf, help="until so much was sent in a phase")
    parser.add_argument("--figures", default="test_,holdout_", help="beginnings of the figures' names")
    parser.add_argument("--plot", type=Path, help="draw mean and spread over the runs into this file: a PNG and an SVG")
    parser.add_argument("--metric", help="the figures that are drawn, with commas; all of the test set by default")
    parser.add_argument("--methods", help="the methods that are drawn, with commas; all by default")
    parser.add_argument("--bytes", action="store_true", help="draw against the bytes sent instead of the rounds")
    parser.add_argument("--training", action="store_true", help="draw the clients' own training figures too, dotted")
    parser.add_argument("--width", type=float, default=7.2, help="of the picture in inches; 7.2 are about 700 pixels")
    args = parser.parse_args()
    if args.last < 1:
        sys.exit(f"error: --last: needs at least 1, got {args.last}")
    for name in ("width", *metrics.COSTS):
        if not getattr(args, name) > 0:
            sys.exit(f"error: --{name}: needs a number above 0, got {getattr(args, name)}")
    if len({workdir.resolve() for workdir in args.workdirs}) < len(args.workdirs):
        sys.exit("error: a folder is given twice, and would count as two runs")
    values, seeds, rounds = {}, [], {}
    for workdir in args.workdirs:
        try:
            rows = metrics.read(workdir / "metrics.jsonl")
        except FileNotFoundError as error:
            sys.exit(f"error: no run in {workdir}: {error}")
        for cost in metrics.COSTS:
            rows = metrics.within(rows, getattr(args, cost), cost)
        seeds.append(curves.start_of(workdir) + rows)
        for run, number in Counter(row["run"] for row in rows).items():
            rounds.setdefault(run, {})[str(workdir)] = number
        for (run, name), series in metrics.series(rows).items():
            if name.startswith(tuple(args.figures.split(","))):
                last = [math.nan if x is None else x for x in series[-args.last :]]
                values.setdefault((run, name), []).append(float(np.mean(last)))
    if not values:
        limits = [f"--{cost}" for cost in metrics.COSTS if getattr(args, cost) != math.inf]
        within = f" within {' and '.join(limits)}" if limits else ""
        sys.exit(f"error: --figures: no row{within} has a figure that begins with one of {args.figures!r}")
    for numbers in rounds.values():
        numbers |= {str(workdir): numbers.get(str(workdir), 0) for workdir in args.workdirs}
    warn_of_other_configs(args.workdirs)
    warn_of_other_lengths(rounds)
    if args.plot:
        draw(seeds, args)
    width, wide = max((len(run) for run, _ in values), default=0), max([20, *(len(name) + 1 for _, name in values)])
    print(f"{'method':{width}}  {'figure':{wide}}{'median':>11}{'mean':>11}{'std':>11}{'worst':>11}  runs")
    for (run, name), found in values.items():
        worst = np.min(found) if metrics.direction(name) > 0 else np.max(found)  # NaN, of a run that diverged, is worst
        figures = np.median(found), np.mean(found), np.std(found), worst
        print(f"{run:{width}}  {name:{wide}}" + "".join(f"{figure:11.5g}" for figure in figures) + f"{len(found):6}")


def draw(seeds, args):
    """Draws what the arguments ask for of the runs, or says which figure or method there is not."""
    there = [
        dict.fromkeys(name for rows in seeds for row in rows for name in names(row)) for names in (numbers_of, run_of)
    ]
    wanted = [args.metric and args.metric.split(","), args.methods and args.methods.split(",")]
    wanted[0] = wanted[0] or [name for name in there[0] if name.startswith("test_")]
    for what, asked, known in zip(("--metric", "--methods"), wanted, there, strict=True):
        if missing := set(asked or ()) - set(known):
            sys.exit(f"error: {what}: no {sorted(missing)} in these runs; there are: {', '.join(known)}")
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    options = {"by_bytes": args.bytes, "training": args.training, "width": args.width}
    curves.draw(seeds, wanted[0], args.plot, methods=wanted[1] or (), **options)


def warn_of_other_configs(workdirs):
    """Says in which fields, besides seeds, the runs differ: then their spread is not over seeds alone."""
    configs = [files.read_json(path) for workdir in workdirs if (path := workdir / "config.json").is_file()]
    lines = [line for other in configs[1:] for line in differences({"config": configs[0]}, {"config": other})]
    differ = {line.partition(":")[0] for line in lines}
    if differ := sorted(name for name in differ if not name.endswith("seed")):
        print(f"warning: the runs differ in more than their seeds: {', '.join(differ)}", file=sys.stderr)


def warn_of_other_lengths(rounds):
    """Says of which method the runs differ in length, {run: {work directory: its rounds}}, as where one was stopped."""
    for run, numbers in rounds.items():
        if len(set(numbers.values())) > 1:
            words = ", ".join(f"{number} in {workdir}" for workdir, number in numbers.items())
            print(f"warning: the runs of {run!r} differ in their rounds: {words}", file=sys.stderr)


def numbers_of(row):
    """The names of a row's numbers."""
    return [name for name, value in row.items() if not isinstance(value, str | list | dict)]


def run_of(row):
    """The run of a row, alone in a list."""
    return [row["run"]]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
