"""At equal bytes up: is FIPA ahead of compressed first-order rules, and what does each way to save bytes cost?

On digits all methods send about 1.4 MB up after one warm-up: FIPA 40 rounds of gradients in 12 bits and eigenpairs in
8, within a budget for each client and round; FedAvg (FedPAQ) and FedAdam 270 rounds of updates in 8 bits (QSGD), or 340
of a tenth of the entries (top-k with error feedback); FedAvg 68 rounds of all bits. Step sizes of the first-order rules
are those of `configs/digits.py`, tuned there for 40 rounds; of FIPA, two dampings and three step sizes on seed 0.

The ablation takes one piece away at a time. Of CIFAR-10 one warm-up and seed: ranks, shares, and all eigenpairs.
"""

import numpy as np
from evidence.records import Run, Spread, Study, Table, fewer_images, final, number, percent

BITS = "local.compress.name=few_bits"
FIPA = f"fipa_few_bytes:aggregator.damping=0.01:{BITS}:local.compress.bits=12"
BUDGET = "sketch.rank=20:sketch.budget=6700"
FEDADAM = "fedavg:server.optimizer=adam:local.lr=0.1:server.lr=0.01"
DIGITS = {
    "FIPA, 6.7 kB of curvature a client and round": f"{FIPA}:{BUDGET}",
    "FIPA, 3 kB": f"{FIPA}:sketch.rank=20:sketch.budget=3000",
    "the best 5 pairs of each client for the budget": f"{FIPA}:sketch.rank=5",
    "20 pairs from a quarter of the clients": f"{FIPA}:sketch.rank=20:sketch.share=0.25",
    "gradients in 8 bits": f"fipa_few_bytes:aggregator.damping=0.01:{BITS}:{BUDGET}",
    "gradients in float32": f"fipa_few_bytes:aggregator.damping=0.01:{BUDGET}",
    "pairs in 6 bits": f"{FIPA}:sketch.rank=20:sketch.budget=5000:sketch.bits=6",
    "all pairs in float32, past cohorts (`fipa_memory`)": "fipa_memory:aggregator.damping=0.003",
    "FedAvg in 8 bits (FedPAQ), 270 rounds": f"fedavg:rounds=270:local.lr=0.1:server.lr=1:{BITS}",
    "FedAdam in 8 bits, 270 rounds": f"{FEDADAM}:rounds=270:{BITS}",
    "FedAvg, top-k with error feedback, 340 rounds": "fedavg:rounds=340:local.lr=0.1:server.lr=1:term.name=feedback:"
    "local.compress.name=top_k:local.compress.share=0.1",
    "FedAvg in float32, 68 rounds": "fedavg:rounds=68:local.lr=0.1:server.lr=1",
}
EIGHT = "fipa_few_bytes:sketch.bits=8"
CIFAR10 = {
    "FIPA, 5 pairs in 8 bits": EIGHT,
    "FIPA, 2 pairs in 8 bits": f"{EIGHT}:sketch.rank=2",
    "FIPA, 5 pairs in 8 bits from 0.4 of the clients": f"{EIGHT}:sketch.share=0.4",
    "all pairs in float32, past cohorts (`fipa_memory`)": "fipa_memory",
    "50 pairs from a tenth of the clients": "fipa_memory:sketch.share=0.1:sketch.full=2:aggregator.past.decay=0.97",
    "FedVARP": "fedavg:term.name=varp:local.lr=0.03:server.lr=0.1",
    "FedAvg in 8 bits (FedPAQ), 400 rounds": f"fedavg:rounds=400:local.lr=0.1:server.lr=0.08:{BITS}",
}
WARM = {"digits": ("seed", "partition.seed"), "cifar10": ("seed",)}
LINES = {"digits": DIGITS, "cifar10": CIFAR10}


def _run(config):
    fields = {"eval.every": 2, "eval.clients_every": 0}
    warm = Run(config, fields | {"fipa.rounds": 0}, seeded=WARM[config], seeds=() if config == "digits" else (0,))
    methods = fields | {"compare": tuple(LINES[config].values())}
    return Run(config, methods, seeds=warm.seeds, seeded=WARM[config], start=warm)


def up(found, run, method):
    """[S], bytes that a method's clients have sent."""
    mine = [[row for row in rows if row["run"] == method] for rows in found.runs.get(run, {}).values()]
    return np.array([sum(row["bytes_up"] for row in rows) for rows in mine if rows])


def tables(found):
    """Accuracy, loss and bytes of each."""
    made = []
    for run, lines in LINES.items():
        rows = [
            {
                "method": label,
                "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=3), percent),
                "test loss": Spread(final(found, run, spec, "test_loss", last=3), number),
                "megabytes up": Spread(up(found, run, spec) / 1e6, number),
            }
            for label, spec in lines.items()
            if final(found, run, spec, "test_accuracy").size
        ]
        made.append(
            Table(f"{run}: mean of the last three evaluations, and the standard deviation over the seeds.", rows)
        )
    return made


STUDY = Study(
    words=__doc__,
    runs={config: _run(config) for config in LINES},
    tables=tables,
    data=("cifar10",),
    reduced=fewer_images(" of CIFAR-10, 60 rounds of warm-up", {"warmup.rounds": 60}),
    gigabytes=3,
    hours=4,
)
