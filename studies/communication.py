"""Accuracy against all bytes sent: what may be saved of the eigenpairs, and what do others do with as many bytes?

FIPA with past rounds at fixed ranks, with as many pairs as reach a share of the trace (`sketch.energy`), by the
published threshold (`sketch.gradient_scale`) and in bfloat16, for 50 rounds; FedAvg and FedAdam, as tuned for 50, take
500: a round of theirs costs a 26th of FIPA's bytes at rank 50.
"""

from evidence.records import Run, Spread, Study, Table, draw_lines, fewer_images, final, number, percent, sent

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
HEAD = {
    **{
        f"FIPA `damped`, rank {r}": f"fipa_damped:sketch.rank={r}:aggregator.damping=0.3:server.lr=0.3"
        for r in (10, 20, 50)
    },
    "FedAvg, 1500 rounds": "fedavg:rounds=1500:server.lr=0.3",
    "FedAdam, 1500 rounds": "fedavg:rounds=1500:server.optimizer=adam:server.lr=0.001",
}
CIFAR10 = {f"FIPA with past rounds, {words}": f"fipa_memory:{spec}" for words, spec in SAVING.items()} | FIRST_ORDER


def _runs():
    warm = Run("cifar10", {"fipa.rounds": 0}, seeds=(0,))
    yield (
        "cifar10",
        Run("cifar10", {"fipa.rounds": 50, "eval.every": 2, "compare": tuple(CIFAR10.values())}, start=warm),
    )
    warm = Run("tiny_imagenet:cpu", {"fipa.rounds": 0}, seeds=(0,))
    yield "tiny_imagenet", Run("tiny_imagenet:cpu", {"compare": tuple(HEAD.values())}, start=warm)


def tables(found):
    """Accuracy and bytes of each."""
    made = []
    for run, lines in (("cifar10", CIFAR10), ("tiny_imagenet", HEAD)):
        rows = [
            {
                "method": label,
                "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=6), percent),
                "test loss": Spread(final(found, run, spec, "test_loss", last=6), number),
                "megabytes": Spread(sent(found, run, spec) / 1e6, number),
            }
            for label, spec in lines.items()
        ]
        made.append(Table(f"{run}: mean of the last six evaluations, and the standard deviation over the seeds.", rows))
    return made


def draw(found, path):
    """The accuracy on CIFAR-10 by bytes, of what differs to the eye."""
    shown = {label: spec for label, spec in CIFAR10.items() if "trace" not in label and "threshold" not in label}
    panels = {"CIFAR-10, whole CNN": [("cifar10", spec, label) for label, spec in shown.items()]}
    draw_lines(panels, "test_accuracy", path, found, by=curves.SENT)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="CIFAR-10, alpha 0.1: test accuracy by all that is sent, up and down; mean and deviation over the seeds",
    data=("cifar10", "tiny_imagenet"),
    reduced=fewer_images(", 60 rounds of warm-up, one seed", {"warmup.rounds": 60}, seeds=(0,)),
    gigabytes=4,
    hours=9,
)
