"""How does FIPA stand beside the Kronecker family, FedPM and K-FAC, at FedPM's protocol and with few clients of many?

FedPM's protocol (arXiv 2511.09100): ten clients, all in every round, five local epochs, Dirichlet 1.0 and 0.1. Reduced
here to CIFAR-10's first 2000 images at 16 x 16 pixels, `cnn_6k` and ten rounds; published are all images, a larger CNN
and 100 rounds. Each method has three settings, chosen by seed 9's held-out tenth at Dirichlet 0.1. Few of many:
`configs/digits.py`, 4 of 20 clients, all methods with one step a client and past rounds, three dampings each by seed 9.
"""

from evidence.records import Run, Spread, Study, Table, chosen, every, final, number, percent, sent

ALPHAS = (1.0, 0.1)
PROTOCOL = {
    "data.train_split": "train[:2000]",
    "data.test_split": "test[:2000]",
    "data.side": 16,
    "model.name": "cnn_6k",
    "partition.num_clients": 10,
    "cohort": 0,
    "warmup.rounds": 0,
    "fipa.rounds": 10,
    "fipa.local.clip_norm": 10.0,
    "fipa.sketch.rank": 20,
    "fipa.sketch.solver": "auto",
    "fipa.sketch.examples": 0,
    "eval.every": 2,
    "eval.clients_every": 0,
}
TRIED = {
    "FedAvg": tuple(f"fedavg:local.lr={lr}:server.lr=1" for lr in (0.3, 0.1, 0.03)),
    "FedAvgM": tuple(f"fedavg:server.optimizer=momentum:local.lr=0.1:server.lr={lr}" for lr in (1, 0.3, 0.1)),
    "SCAFFOLD": tuple(f"fedavg:term.name=scaffold:local.lr={lr}:server.lr=1" for lr in (0.3, 0.1, 0.03)),
    "FedAdam": tuple(f"fedavg:server.optimizer=adam:local.lr=0.1:server.lr={lr}" for lr in (0.03, 0.01, 0.003)),
    "FedPM": tuple(f"fedpm:local.lr={lr}:aggregator.damping=1:server.lr=1" for lr in (0.3, 0.1, 0.03)),
    "FedFisher-KFAC": tuple(
        f"fedfisher_kfac:local.lr=0.1:server.lr=1:aggregator.damping={beta}" for beta in (0.1, 0.01, 0.001)
    ),
    "FIPA": tuple(f"fipa:local.lr=0.1:server.lr=1:aggregator.damping={beta}" for beta in (0.1, 0.01, 0.001)),
    "FIPA with past rounds": tuple(f"fipa_memory:aggregator.damping={beta}" for beta in (0.1, 0.03, 0.01)),
}
ONE_STEP = "local.lr=1:local.steps=1:local.batch_size=0:server.lr=1:aggregator.past.kind=prior"
FEW = {"fipa.rounds": 40, "warmup.rounds": 20, "eval.every": 4, "eval.clients_every": 0}
FEW_TRIED = {
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


def _runs():
    yield "protocol tune", Run("cifar10", PROTOCOL | {"partition.alpha": 0.1, "compare": every(TRIED)}, seeds=(9,))
    yield "few tune", Run("digits", FEW | {"compare": every(FEW_TRIED)}, seeds=(9,))


def _best(found):
    held_out = "holdout_accuracy"
    return chosen(found, "protocol tune", TRIED, held_out, 2), chosen(found, "few tune", FEW_TRIED, held_out, 3)


def then(found):
    """All methods, as tuned."""
    protocol, few = (tuple(best.values()) for best in _best(found))
    if not (all(protocol) and all(few)):
        return {}
    runs = {f"{alpha}": Run("cifar10", PROTOCOL | {"partition.alpha": alpha, "compare": protocol}) for alpha in ALPHAS}
    return runs | {"few": Run("digits", FEW | {"compare": few})}


def _seconds(found, run, method):
    """Median seconds of a round that is not the first, of all seeds."""
    rows = [row for rows in found.runs.get(run, {}).values() for row in rows if row["run"] == method]
    each = [sum(value for name, value in row.items() if name.startswith("seconds_")) for row in rows]
    return sorted(each)[len(each) // 2] if each else None


def tables(found):
    """Accuracies at FedPM's protocol; accuracy, loss, bytes and seconds with few clients of many."""
    protocol, few = _best(found)
    rows = [
        {"method": label}
        | {
            f"CIFAR-10, Dirichlet {alpha}": Spread(final(found, f"{alpha}", method, "test_accuracy", last=2), percent)
            for alpha in ALPHAS
        }
        | {"kB of a round": Spread(sent(found, "0.1", method) / 10e3, number)}
        for label, method in protocol.items()
    ]
    words = "FedPM's protocol, reduced: test accuracy in %, mean of the last two evaluations, mean and spread."
    made = [Table(words, rows)]
    rows = []
    for label, method in few.items():
        cells = {
            "test accuracy, %": Spread(final(found, "few", method, "test_accuracy", last=3), percent),
            "test loss": Spread(final(found, "few", method, "test_loss", last=3), number),
            "kB of a round": Spread(sent(found, "few", method) / 40e3, number),
        }
        seconds = _seconds(found, "few", method)
        rows.append({"message": label} | cells | {"seconds of a round": "-" if seconds is None else f"{seconds:.2g}"})
    words = "Digits, 4 of 20 clients: mean of the last three evaluations; median seconds of a round, machine loaded."
    return [*made, Table(words, rows)]


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    data=("cifar10",),
    hours=0.5,
)
