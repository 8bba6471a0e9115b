"""Does FIPA's gain grow as the clients' data differ more, and which distance between clients predicts it?

Handwritten digits, 20 clients, splits from iid to Dirichlet 0.01. FIPA has two settings, every other method three; the
best by the accuracy on a held-out tenth of the training images, over the seeds, is shown by its test accuracy. The
distances are those of `scripts/benchmark.py apart`, at the warm-up's last model: before FIPA's phase starts.
"""

import numpy as np
from evidence.records import Benchmark, Run, Spread, Study, Table, best, every, final, legend, number, percent

ALPHAS = ("iid", "10", "1", "0.6", "0.3", "0.1", "0.05", "0.01")
FIPA = "fipa_memory:aggregator.damping={}:aggregator.limits.max_divergence={}"
TRIED = {
    "FIPA": [FIPA.format(damping, bound) for damping, bound in ((0.003, 0.005), (0.03, 0.02))],
    "FedAvg": [f"fedavg:local.lr={lr}:server.lr={s}" for lr, s in ((0.1, 1), (0.3, 0.3), (0.1, 0.3))],
    "FedAdam": [
        f"fedavg:server.optimizer=adam:local.lr={lr}:server.lr={s}" for lr, s in ((0.1, 0.01), (0.3, 0.01), (0.1, 0.03))
    ],
    "SCAFFOLD": [
        f"fedavg:term.name=scaffold:local.lr={lr}:server.lr={s}" for lr, s in ((0.1, 1), (0.3, 0.3), (0.1, 0.3))
    ],
}
FIRST_ORDER = every({label: settings for label, settings in TRIED.items() if label != "FIPA"})
PART = {"4 of 20": (4, ALPHAS), "20 of 20": (20, ("iid", "1", "0.1", "0.01"))}  # clients a round, splits
SEEDED = ("seed", "partition.seed")
LAST, HELD_OUT, TEST = 3, "holdout_accuracy", "test_accuracy"
DISTANCES = ("angles", "eigenvalues", "jbld", "affine", "gradients", "labels")


def _run(alpha, cohort):
    split = {"partition.name": "iid"} if alpha == "iid" else {"partition.alpha": float(alpha)}
    fields = split | {"cohort": cohort, "compare": every(TRIED), "eval.every": 5, "eval.clients_every": 0}
    return Run("digits", fields, seeded=SEEDED)


def _runs():
    for part, (cohort, alphas) in PART.items():
        for alpha in alphas:
            yield f"{alpha}, {part}", _run(alpha, cohort)
            if part == "4 of 20":
                yield f"{alpha}, apart", Benchmark("apart", ("--run={start}",), (), _run(alpha, cohort))


def _gain(found, name):
    """{seed: test accuracy of FIPA less that of the best first-order method}, both chosen by held-out images."""
    fipa, other = (best(found, name, tried, HELD_OUT, LAST) for tried in (TRIED["FIPA"], FIRST_ORDER))
    gains = final(found, name, fipa, TEST, last=LAST) - final(found, name, other, TEST, last=LAST)
    return dict(zip(found.runs.get(name, {}), gains, strict=True))


def _points(found, part):
    """(distances {name: [n]}, gains [n]) of every split and seed that has both."""
    rows = []
    for alpha in PART[part][1]:
        apart = found.runs.get(f"{alpha}, apart", {})
        rows += [
            (apart[seed]["distances"], gain) for seed, gain in _gain(found, f"{alpha}, {part}").items() if seed in apart
        ]
    return {name: np.array([row[0][name] for row in rows]) for name in DISTANCES}, np.array([gain for _, gain in rows])


def _correlation(distances, gains):
    """Spearman's rank correlation, in words: its value, and the middle 95 % of bootstrap samples of the points."""
    from scipy import stats

    def rho(one, other):
        return stats.spearmanr(one, other).statistic

    drawn = stats.bootstrap(
        (distances, gains), rho, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=0
    )
    low, high = drawn.confidence_interval
    return f"{rho(distances, gains):.2f} ({low:.2f} to {high:.2f})"


def tables(found):
    """The accuracies by split, the distances, and how well each ranks the gains."""
    made = []
    for part, (_, alphas) in PART.items():
        if not any(found.runs.get(f"{alpha}, {part}") for alpha in alphas):
            continue
        rows = []
        for alpha in alphas:
            name, row = f"{alpha}, {part}", {"alpha": alpha}
            for label, settings in TRIED.items():
                row[label] = Spread(
                    final(found, name, best(found, name, settings, HELD_OUT, LAST), TEST, last=LAST), percent
                )
            row["gain over the best of the others"] = Spread(np.array(list(_gain(found, name).values())), percent)
            rows.append(row)
        made.append(
            Table(f"{part} clients a round: test accuracy in %, mean and standard deviation over the seeds.", rows)
        )
    rows = []
    for alpha in ALPHAS:
        left = [figures["distances"] for figures in found.runs.get(f"{alpha}, apart", {}).values()]
        rows.append(
            {"alpha": alpha} | {name: Spread(np.array([each[name] for each in left]), number) for name in DISTANCES}
        )
    made.append(
        Table("Distances between clients as the phase starts, mean and standard deviation over the seeds.", rows)
    )
    for part in PART:
        distances, gains = _points(found, part)
        if len(gains) >= 8:
            ranked = [
                {"distance": name, "rank correlation with the gain": _correlation(distances[name], gains)}
                for name in DISTANCES
            ]
            words = f"{part}: Spearman's correlation over {len(gains)} points (split and seed), 95 % by bootstrap."
            made.append(Table(words, ranked))
    return made


def draw(found, path):
    """The gain against every distance."""
    from fipa_jax.reporting import plots

    with plots.picture(path, 7.2, 4.6, 2, 3) as (_, axes):
        for axis, name in zip(axes.flat, DISTANCES, strict=True):
            for part, color in zip(PART, plots.CLIENTS, strict=False):
                distances, gains = _points(found, part)
                if gains.size:
                    axis.plot(distances[name], 100 * gains, ".", color=color, label=part)
            axis.set(xlabel=name, ylabel="gain, points")
            axis.grid(alpha=0.25)
        legend(axes[0, 0])


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="FIPA's gain over the best first-order method by the clients' distance; a point is a split and a seed",
    hours=1.5,
)
