"""Prints the figures of several runs of one config, such as one for each seed: median, mean, spread and worst.

for seed in 0 1 2; do python scripts/train.py --config.seed=$seed --workdir=runs/sine-$seed; done
python scripts/summarise.py runs/sine-0 runs/sine-1 runs/sine-2
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from fipa_jax.reporting import metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, help="work directories of the runs")
    parser.add_argument(
        "--last", type=int, default=1, help="a run's figure is its mean over this many last evaluations"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="a run counts until its rounds took so long")
    parser.add_argument("--figures", default="test_,holdout_", help="beginnings of the figures' names")
    args = parser.parse_args()
    values = {}
    for workdir in args.workdirs:
        try:
            rows = metrics.within(metrics.read(workdir / "metrics.jsonl"), args.seconds)
        except FileNotFoundError as error:
            sys.exit(f"error: no run in {workdir}: {error}")
        for (run, name), series in metrics.series(rows).items():
            if name.startswith(tuple(args.figures.split(","))):
                values.setdefault((run, name), []).append(
                    statistics.fmean(math.nan if x is None else x for x in series[-args.last :])
                )
    width = max((len(run) for run, _ in values), default=0)
    print(f"{'method':{width}}  {'figure':20}{'median':>11}{'mean':>11}{'std':>11}{'worst':>11}  runs")
    for (run, name), found in values.items():
        worst = min(found) if metrics.direction(name) > 0 else max(found)
        figures = statistics.median(found), statistics.fmean(found), statistics.pstdev(found), worst
        print(f"{run:{width}}  {name:20}" + "".join(f"{figure:11.4g}" for figure in figures) + f"{len(found):6}")


if __name__ == "__main__":
    main()
