"""How near is FIPA to the centralised Gauss-Newton method, and does the gap fall as O(1/K) (the paper's Theorem 1)?

`scripts/benchmark.py gauss_newton`: clients solve their problems exactly in one round; then they follow their own
Gauss-Newton flow within each of K rounds, which end at the same time of the flow as the centralised one.
"""

import numpy as np
from evidence.records import Benchmark, Spread, Study, Table, error, number, ticks

RANKS = (2, 5, 10, 20, 0)  # 0 for full rank
TASKS = {"sine": (0.01, (5, 10, 20, 40, 80)), "poisson_1d": (1.0, (5, 10, 20, 40))}  # config -> damping, rounds
DEBUG = ("--ranks", "2", "0", "--rounds", "2", "4", "--substeps=2")


def _rows(found, task, part):
    """{rank: [the benchmark's row of each seed]}; full rank is the largest."""
    rows = {}
    for figures in found.runs.get(task, {}).values():
        for row in figures[part]:
            rows.setdefault(row["rank"], []).append(row)
    return rows


def tables(found):
    """One round with exact local solves, then the gap after K rounds."""
    one, many = [], []
    for task, (damping, _) in TASKS.items():
        for rank, rows in _rows(found, task, "one round").items():
            values = Spread(np.array([row["relative difference"] for row in rows]), error)
            one.append({"task": f"{task}, damping {damping:g}", "rank": str(rank), "relative difference": values})
        for rank, rows in _rows(found, task, "gaps").items():
            cells = {name: Spread(np.array([row[name] for row in rows]), number) for name in rows[0] if name != "rank"}
            many.append({"task": task, "rank": str(rank)} | cells)
    return [
        Table(
            "One FIPA round with exact local solves beside the centralised step; the last rank is the full one.", one
        ),
        Table(
            "Gap to the centralised flow after K rounds to the same horizon, and its slope in log K; O(1/K) is -1.",
            many,
        ),
    ]


def draw(found, path):
    """The gaps by the number of rounds."""
    from fipa_jax.reporting import plots

    with plots.picture(path, 7.2, 3.2, 1, len(TASKS)) as (_, axes):
        for axis, task in zip(axes[0], TASKS, strict=True):
            for rank, rows in _rows(found, task, "gaps").items():
                gaps = {
                    int(name[2:]): np.mean([row[name] for row in rows]) for name in rows[0] if name.startswith("K=")
                }
                axis.loglog(list(gaps), list(gaps.values()), marker=".", label=f"rank {rank}")
                first = min(gaps), gaps[min(gaps)]
            axis.loglog(list(gaps), [first[1] * first[0] / K for K in gaps], "k:", label="O(1/K)")
            axis.set(title=task, xlabel="rounds, K", ylabel="gap to centralised Gauss-Newton")
            ticks(axis, TASKS[task][1])
            axis.grid(alpha=0.25)
            axis.legend(fontsize=7)


def _options(task):
    damping, rounds = TASKS[task]
    listed = "--ranks", *map(str, RANKS), "--rounds", *map(str, rounds)
    return f"--config={{configs}}/{task}.py", f"--damping={damping:g}", *listed, "--seed={seed}"


STUDY = Study(
    words=__doc__,
    runs={task: Benchmark("gauss_newton", _options(task), debug=DEBUG) for task in TASKS},
    tables=tables,
    draw=draw,
    caption="Gap to the centralised Gauss-Newton flow by the number of rounds to the same horizon, mean over the seeds",
    hours=0.5,
)
