"""FedRCL for a warm-up, then FIPA on the last layers: does that end ahead of FedRCL, as published (+2.36 points)?

At full size ResNet-18, 1000 rounds of FedRCL and 100 of each method, `configs/tiny_imagenet.py`, on a GPU: FIPA and
FedRCL at the published steps, which are not tuned here, and FedAvg on the same head; then the same as the authors' code
has it (`configs/tiny_imagenet.py:published`), from the same warm-up.
"""

from evidence.records import Run, Size, Spread, Study, Table, final, number, percent, sent

WARM = Run("tiny_imagenet", {"fipa.rounds": 0}, seeds=(0,))


def _methods(found, run):
    rows = [row for seeds in found.runs.get(run, {}).values() for row in seeds]
    return list(dict.fromkeys(row["run"] for row in rows))


def tables(found):
    """Every method's accuracy, and what it sends."""
    rows = [
        {
            "method": f"`{spec}`" + (", as published" if run == "published" else ""),
            "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=6), percent),
            "test loss": Spread(final(found, run, spec, "test_loss", last=6), number),
            "megabytes": Spread(sent(found, run, spec) / 1e6, number),
        }
        for run in ("phase", "published")
        for spec in _methods(found, run)
    ]
    return [Table("Mean of the last six evaluations, and the standard deviation over the seeds.", rows)]


def draw(found, path):
    """The accuracy by round."""
    from fipa_jax.reporting import curves

    curves.draw(list(found.runs["phase"].values()), ["test_accuracy"], path, training=False, width=7.2)


STUDY = Study(
    words=__doc__,
    runs={
        "phase": Run("tiny_imagenet", start=WARM),
        "published": Run("tiny_imagenet:published", start=WARM),
    },
    tables=tables,
    draw=draw,
    caption="Test accuracy by round after the warm-up, mean and one standard deviation over the seeds",
    data=("tiny_imagenet",),
    reduced=Size(
        "a CNN of 203k parameters on images of 32 x 32, `configs/tiny_imagenet.py:cpu`, with steps that were tuned.",
        configs={"tiny_imagenet": "tiny_imagenet:cpu", "tiny_imagenet:published": "tiny_imagenet:published_cpu"},
    ),
    gigabytes=8,
    hours=30,
    machine="a GPU, a guess",
)
