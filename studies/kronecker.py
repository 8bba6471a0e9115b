"""What is a client's curvature worth by eigenpairs, by layers' input factors, and by both Kronecker factors?

`configs/digits.py`, 4 of 20 clients a round, Dirichlet 0.1. In each method a client takes one step from the broadcast
parameters, divided by what it sends, and the server remembers past rounds as a decaying sum. Three dampings each,
chosen by seed 9's held-out tenth. Five eigenpairs have as many bytes as a layer's factors, nearly.
"""

from evidence.records import Run, Spread, Study, Table, chosen, every, final, number, percent, sent

ONE_STEP = "local.lr=1:local.steps=1:local.batch_size=0:server.lr=1:aggregator.past.kind=prior"
FIELDS = {"fipa.rounds": 40, "warmup.rounds": 20, "eval.every": 4, "eval.clients_every": 0}
TRIED = {
    "low rank, 50 pairs": tuple(
        f"fipa_memory:aggregator.damping={beta}:aggregator.limits.max_divergence=0.005" for beta in (0.03, 0.01, 0.003)
    ),
    "low rank, 5 pairs": tuple(
        f"fipa_memory:sketch.rank=5:aggregator.damping={beta}:aggregator.limits.max_divergence=0.005"
        for beta in (0.1, 0.03, 0.01)
    ),
    "input factors (`foof`)": tuple(f"fedpm:{ONE_STEP}:aggregator.damping={beta}" for beta in (3, 1, 0.3)),
    "both factors (`kfac`)": tuple(
        f"fedpm:aggregator.layers.kind=kfac:{ONE_STEP}:aggregator.damping={beta}:aggregator.limits.max_divergence=0.005"
        for beta in (0.1, 0.03, 0.01)
    ),
}


def _best(found):
    return chosen(found, "tune", TRIED, "holdout_accuracy", 3)


def then(found):
    """Each message, as tuned."""
    best = tuple(_best(found).values())
    return {"few": Run("digits", FIELDS | {"compare": best})} if all(best) else {}


def _seconds(found, run, method):
    """Median seconds of a round that is not the first, of all seeds."""
    rows = [row for rows in found.runs.get(run, {}).values() for row in rows if row["run"] == method]
    each = [sum(value for name, value in row.items() if name.startswith("seconds_")) for row in rows]
    return sorted(each)[len(each) // 2] if each else None


def tables(found):
    """Accuracy, loss, bytes and seconds of each message."""
    rows = []
    for label, method in _best(found).items():
        cells = {
            "test accuracy, %": Spread(final(found, "few", method, "test_accuracy", last=3), percent),
            "test loss": Spread(final(found, "few", method, "test_loss", last=3), number),
            "kB of a round": Spread(sent(found, "few", method) / 40e3, number),
        }
        seconds = _seconds(found, "few", method)
        rows.append({"message": label} | cells | {"seconds of a round": "-" if seconds is None else f"{seconds:.2g}"})
    words = "Mean of the last three evaluations, mean and spread over the seeds; median seconds of a round."
    return [Table(words, rows)]


STUDY = Study(
    words=__doc__,
    runs={"tune": Run("digits", FIELDS | {"compare": every(TRIED)}, seeds=(9,))},
    then=then,
    tables=tables,
    hours=0.1,
)
