"""Accuracy against all bytes sent: what may be saved of the eigenpairs, and what do others do with as many bytes?

FIPA with past rounds at fixed ranks, with as many pairs as reach a share of the trace (`sketch.energy`), by the
published threshold (`sketch.gradient_scale`) and in bfloat16, for 50 rounds, its damping as tuned for all of CIFAR-10.
FedAvg and FedAdam take 500: a round of theirs costs a 26th of FIPA's bytes at rank 50. On CIFAR-10 they have the step
sizes that were tuned for 50 rounds there. At equal bytes stand beside them these rules at the best of three server
steps, and FIPA at rank 10 at the best of three dampings, by seed 9's held-out images after as many rounds.
"""

from evidence.records import (
    Run,
    Spread,
    Study,
    Table,
    chosen,
    draw_lines,
    every,
    fewer_images,
    final,
    number,
    percent,
    sent,
)

from fipa_jax.reporting import curves

SAVING = {
    "rank 50": "sketch.rank=50",
    "rank 20": "sketch.rank=20",
    "rank 10": "sketch.rank=10",
    "rank 5": "sketch.rank=5",
    "90 % of the trace": "sketch.energy=0.9",
    "80 % of the trace": "sketch.energy=0.8",
    "threshold, c = 1": "sketch.gradient_scale=1.0",
    "bfloat16": "sketch.store=bfloat16",
    "rank 20 in bfloat16": "sketch.rank=20:sketch.store=bfloat16",
}
FIRST_ORDER = {
    "FedAvg, 500 rounds": "fedavg:rounds=500:local.lr=0.1:server.lr=0.08",
    "FedAdam, 500 rounds": "fedavg:rounds=500:server.optimizer=adam:local.lr=0.05:server.lr=0.0003",
}
TRIED = {
    "FedAvg, 500 rounds, tuned": [f"fedavg:rounds=500:local.lr=0.1:server.lr={s}" for s in (0.16, 0.32, 0.64)],
    "FedAdam, 500 rounds, tuned": [
        f"fedavg:rounds=500:server.optimizer=adam:local.lr=0.1:server.lr={s}" for s in (0.001, 0.003, 0.01)
    ],
}
FIPA = "FIPA with past rounds, rank 10, 83 rounds, tuned"
BY_DAMPING = {FIPA: [f"fipa_memory:rounds=83:sketch.rank=10:aggregator.damping={d}" for d in (0.03, 0.1, 0.3)]}
TUNING = {"": TRIED, " FIPA": BY_DAMPING}  # `tune` and `tuned` with this behind it are runs
HEAD = {
    **{
        f"FIPA `damped`, rank {r}": f"fipa_damped:sketch.rank={r}:aggregator.damping=0.3:server.lr=0.3"
        for r in (10, 20, 50)
    },
    "FedAvg, 1500 rounds": "fedavg:rounds=1500:server.lr=0.3",
    "FedAdam, 1500 rounds": "fedavg:rounds=1500:server.optimizer=adam:server.lr=0.001",
}
CIFAR10 = {f"FIPA with past rounds, {words}": f"fipa_memory:{spec}" for words, spec in SAVING.items()} | FIRST_ORDER


WARM = Run("cifar10", {"fipa.rounds": 0}, seeds=(0,))
OFTEN = {"fipa.rounds": 50, "eval.every": 2}


def _runs():
    yield "cifar10", Run("cifar10", OFTEN | {"compare": tuple(CIFAR10.values())}, start=WARM)
    for which, tried in TUNING.items():
        fields = {"eval.every": 10, "eval.clients_every": 0, "compare": every(tried)}
        yield f"tune{which}", Run("cifar10", fields, seeds=(9,), start=WARM)
    warm = Run("tiny_imagenet:cpu", {"fipa.rounds": 0}, seeds=(0,))
    yield "tiny_imagenet", Run("tiny_imagenet:cpu", {"compare": tuple(HEAD.values())}, start=warm)


def _chosen(found):
    """{label: (run, its method as tuned)}."""
    return {
        label: (f"tuned{which}", spec)
        for which, tried in TUNING.items()
        for label, spec in chosen(found, f"tune{which}", tried, "holdout_accuracy", 6).items()
        if spec
    }


def then(found):
    """What is tuned for as many rounds as it takes."""
    methods: dict[str, list[str]] = {}
    for run, spec in _chosen(found).values():
        methods.setdefault(run, []).append(spec)
    return {run: Run("cifar10", OFTEN | {"compare": tuple(specs)}, start=WARM) for run, specs in methods.items()}


def tables(found):
    """Accuracy and bytes of each."""
    made = []
    on_cifar10 = {label: ("cifar10", spec) for label, spec in CIFAR10.items()} | _chosen(found)
    on_heads = {label: ("tiny_imagenet", spec) for label, spec in HEAD.items()}
    for name, lines in (("cifar10", on_cifar10), ("tiny_imagenet", on_heads)):
        rows = [
            {
                "method": label + (f", `{spec.rpartition(':')[2]}`" if "tuned" in run else ""),
                "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=6), percent),
                "test loss": Spread(final(found, run, spec, "test_loss", last=6), number),
                "megabytes": Spread(sent(found, run, spec) / 1e6, number),
            }
            for label, (run, spec) in lines.items()
        ]
        made.append(
            Table(f"{name}: mean of the last six evaluations, and the standard deviation over the seeds.", rows)
        )
    return made


def draw(found, path):
    """The accuracy on CIFAR-10 by bytes: what FIPA may save, and all as tuned for as many bytes."""
    ranks = {words: f"fipa_memory:{spec}" for words, spec in SAVING.items() if words[:4] in ("rank", "bflo")}
    panels = {
        "CIFAR-10, FIPA with past rounds": [("cifar10", spec, label) for label, spec in ranks.items()],
        "tuned for as many bytes": [(*of, label) for label, of in _chosen(found).items()],
    }
    draw_lines(panels, "test_accuracy", path, found, by=curves.SENT)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    draw=draw,
    caption="CIFAR-10, alpha 0.1: test accuracy by all that is sent, up and down; mean and deviation over the seeds",
    data=("cifar10", "tiny_imagenet"),
    reduced=fewer_images(", 60 rounds of warm-up, one seed", {"warmup.rounds": 60}, seeds=(0,)),
    gigabytes=4,
    hours=9,
)
