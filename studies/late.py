"""Half of a round's clients began one to ten rounds ago: what does each method make of what they send?

CIFAR-10 as in `configs/cifar10.py`. FedBuff and FedAsync have three server steps each, chosen by seed 9's held-out
images. FedAsync takes one client at a time and five times as many steps, so that all see equally many arrivals.
"""

from evidence.records import Run, Spread, Study, Table, best, draw_lines, fewer_images, final, number, percent

WARM = Run("cifar10", {"fipa.rounds": 0}, seeds=(0,))
LATE = "late.share=0.5"
FIPA = f"fipa_memory:{LATE}"
FEDBUFF = tuple(f"fedbuff:local.lr=0.1:server.lr={s}:{LATE}" for s in (0.04, 0.08, 0.16))
FEDASYNC = tuple(f"fedasync:local.lr=0.1:server.lr={s}:{LATE}:late.most=50" for s in (0.02, 0.04, 0.08))
BY_COHORTS = {"eval.every": 2, "fipa.rounds": 50}
ONE_BY_ONE = {"eval.every": 10, "fipa.rounds": 250, "cohort": 1}
HELD_OUT = "holdout_accuracy"


def _runs():
    yield "cohorts tune", Run("cifar10", BY_COHORTS | {"compare": FEDBUFF}, seeds=(9,), start=WARM)
    yield "one by one tune", Run("cifar10", ONE_BY_ONE | {"compare": FEDASYNC}, seeds=(9,), start=WARM)


def _chosen(found):
    return best(found, "cohorts tune", FEDBUFF, HELD_OUT, 6), best(found, "one by one tune", FEDASYNC, HELD_OUT, 6)


def then(found):
    """FIPA with and without late clients, and the others as tuned."""
    fedbuff, fedasync = _chosen(found)
    if not (fedbuff and fedasync):
        return {}
    runs = {"cohorts": Run("cifar10", BY_COHORTS | {"compare": (FIPA, "fipa_memory", fedbuff)}, start=WARM)}
    return runs | {"one by one": Run("cifar10", ONE_BY_ONE | {"compare": (fedasync,)}, start=WARM)}


def tables(found):
    """Accuracy and loss of each."""
    fedbuff, fedasync = _chosen(found)
    lines = {
        "FIPA with past rounds": ("cohorts", FIPA),
        "FedBuff, tuned": ("cohorts", fedbuff),
        "FedAsync, tuned": ("one by one", fedasync),
        "FIPA with past rounds, nobody late": ("cohorts", "fipa_memory"),
    }
    rows = []
    for label, (run, method) in lines.items():
        figures = [("test accuracy, %", "test_accuracy", percent), ("test loss", "test_loss", number)]
        figures.append(("calibration error", "test_calibration_error", number))
        cells = {name: Spread(final(found, run, method, figure, last=6), show) for name, figure, show in figures}
        rows.append({"method": label} | cells)
    return [Table("Mean of the last six evaluations, and the standard deviation over the seeds.", rows)]


def draw(found, path):
    """The accuracies by round."""
    fedbuff, _ = _chosen(found)
    draw_lines({"CIFAR-10": [("cohorts", FIPA), ("cohorts", fedbuff)]}, "test_accuracy", path, found)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by round with half of the clients late, mean and one standard deviation over the seeds",
    data=("cifar10",),
    reduced=fewer_images(", 60 rounds of warm-up", {"warmup.rounds": 60}),
    hours=1.5,
)
