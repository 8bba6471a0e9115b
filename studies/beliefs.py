"""How sure is a model of itself: is a belief over models, which clients learn together, better calibrated than one?

`configs/digits.py` with one hidden layer of 32 units, ten clients that all take part in every round, Dirichlet 0.1, 10
rounds of FedAvg, then 30 of each method. FedIvon and IVON-ADMM learn a Gaussian over models; their belief's figures are
of the mean probabilities of eight models that are drawn from it. Each method has four settings, chosen by seed 9's
held-out tenth.
"""

from evidence.records import Run, Spread, Study, Table, chosen, every, final, number, percent, sent

FIELDS = {
    "model.name": "mlp",
    "model.widths": (32,),
    "partition.num_clients": 10,
    "cohort": 0,
    "warmup.rounds": 10,
    "fipa.rounds": 30,
    "fipa.max_skips": 0,
    "fipa.sketch.rank": 20,
    "fipa.sketch.solver": "lanczos",
    "eval.every": 5,
    "eval.clients_every": 0,
}
IVON = "{}:local.lr={}:aggregator.posterior.start={}"
TRIED = {
    "FedAvg": tuple(f"fedavg:local.lr={lr}:server.lr={s}" for lr in (0.3, 0.1) for s in (1, 0.3)),
    "FIPA with past rounds": tuple(
        f"fipa_memory:aggregator.damping={beta}:aggregator.limits.max_divergence={most}"
        for beta in (0.01, 0.003)
        for most in (0.02, 0.005)
    ),
    "FedIvon": tuple(IVON.format("fedivon", lr, start) for lr in (1, 0.3) for start in (300, 100)),
    "IVON-ADMM": tuple(
        IVON.format("ivon_admm", lr, start) + ":aggregator.posterior.rho=10" for lr in (1, 0.3) for start in (10, 3)
    ),
}
FIGURES = {
    "accuracy, %": ("accuracy", percent),
    "loss": ("loss", number),
    "calibration error": ("calibration_error", number),
}


def _best(found):
    return chosen(found, "tune", TRIED, "holdout_accuracy", 3)


def then(found):
    """All methods, as tuned."""
    best = tuple(_best(found).values())
    return {"all": Run("digits", FIELDS | {"compare": best})} if all(best) else {}


def tables(found):
    """Accuracy, loss and calibration on the test set, of the mean and of the belief."""
    rows = []
    for label, method in _best(found).items():
        size = (
            f"{sent(found, 'all', method).mean() / 1e3 / FIELDS['fipa.rounds']:.0f}" if method in _run(found) else "-"
        )
        for who, prefix in (("", "test"), (", the belief", "test_belief")):
            cells = {
                words: Spread(final(found, "all", method, f"{prefix}_{figure}", last=3), show)
                for words, (figure, show) in FIGURES.items()
            }
            if not who or cells["loss"].values.size:
                rows.append({"method": label + who} | cells | {"kB of a round": size})
    return [Table("On the test set, mean of the last three evaluations, mean and spread over the seeds.", rows)]


def _run(found):
    """The methods that were run."""
    return {row["run"] for rows in found.runs.get("all", {}).values() for row in rows}


STUDY = Study(
    words=__doc__,
    runs={"tune": Run("digits", FIELDS | {"compare": every(TRIED)}, seeds=(9,))},
    then=then,
    tables=tables,
    hours=0.1,
)
