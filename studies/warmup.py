"""How long must the warm-up be, and what happens without one?

After a warm-up of 0 to 1000 rounds every method takes the rounds that are left, so that all end in the same round: on
digits and CIFAR-10 with all of a small CNN, on Tiny-ImageNet-50 with the last layer of a CNN, and with all of it. FIPA
with past rounds (`fipa_memory`) takes one natural gradient a client; FIPA without them trains for five epochs: `damped`
at its defaults on digits, the authors' `tikhonov` elsewhere. All other steps and dampings are those that were tuned
after a long warm-up (`configs/digits.py`, `configs/cifar10.py`, `configs/tiny_imagenet.py:cpu`); averaging goes on
beside.
"""

from evidence.records import Run, Spread, Study, Table, fewer_images, final, percent

LENGTHS, TOTAL, EARLY = (0, 10, 30, 100, 300, 1000), 1050, 20
PAST, FIPA, MEAN = "FIPA with past rounds", "FIPA", "averaging"
WHOLE = "fipa_memory:local.micro_batch=-1:trainable=.*:cache_body=false"
DIGITS, CIFAR10, HEAD = "digits, whole CNN", "CIFAR-10, whole CNN", "Tiny-ImageNet-50, last layer"
TASKS = {  # what is shown -> (config, {label: method})
    DIGITS: (
        "digits",
        {
            PAST: "fipa_memory:aggregator.damping=0.003:aggregator.limits.max_divergence=0.005",
            FIPA: "fipa",
            MEAN: "fedavg:local.lr=0.1:server.lr=1",
        },
    ),
    CIFAR10: ("cifar10", {PAST: "fipa_memory", FIPA: "fipa", MEAN: "fedavg:local.lr=0.1:server.lr=0.08"}),
    HEAD: (
        "tiny_imagenet:cpu",
        {FIPA: "fipa_damped:sketch.rank=50:aggregator.damping=0.3:server.lr=0.3", MEAN: "fedavg:server.lr=0.3"},
    ),
    "Tiny-ImageNet-50, whole CNN": (
        "tiny_imagenet:cpu",
        {
            PAST: f"{WHOLE}:sketch.rank=50:sketch.examples=250:sketch.micro_batch=5",
            MEAN: "fedavg:server.lr=0.3:trainable=.*:cache_body=false:term.name=rcl",
        },
    ),
}
SHORT = {DIGITS: ((0, 10, 30, 100), 150), CIFAR10: ((0, 10, 30, 60), 90), HEAD: ((0, 10, 30, 60), 90)}


def _runs(plan):
    """Of {task: (lengths of the warm-up, the round in which all end)}."""
    for title, (lengths, total) in plan.items():
        config, methods = TASKS[title]
        for rounds in lengths:
            fields = {"fipa.rounds": total - rounds, "compare": tuple(methods.values()), "eval.every": 10}
            warm = Run(config, {"warmup.rounds": rounds, "fipa.rounds": 0}, seeds=(0,)) if rounds else None
            yield f"{title}, {rounds}", Run(config, fields | {"warmup.rounds": rounds}, start=warm)


def _lengths(found, title):
    """{rounds of warm-up: the run} of a task, of those that belong to this size."""
    return {int(name.rpartition(", ")[2]): name for name in found.runs if name.startswith(f"{title}, ")}


def tables(found):
    """Accuracy by the warm-up's length, soon after it and at the end."""
    made = []
    for title, (_, methods) in TASKS.items():
        rows = []
        for rounds, run in _lengths(found, title).items():
            row = {"rounds of warm-up": str(rounds)}
            for label, method in methods.items():
                early = final(found, run, method, "test_accuracy", rounds=EARLY)
                row[f"{label}, {EARLY} rounds on"] = Spread(early, percent)
                row[f"{label}, at the end"] = Spread(final(found, run, method, "test_accuracy", last=3), percent)
            rows.append(row)
        if rows:
            words = f"{title}: test accuracy in %, mean and standard deviation over the seeds."
            made.append(Table(words, rows))
    return made


def draw(found, path):
    """The accuracy at the end by the warm-up's length."""
    from fipa_jax.reporting import plots

    shown = {title: runs for title in TASKS if (runs := _lengths(found, title))}
    with plots.picture(path, 3.2 * len(shown), 3.0, 1, len(shown)) as (_, axes):
        for axis, (title, runs) in zip(axes[0], shown.items(), strict=True):
            for label, method in TASKS[title][1].items():
                ends = [final(found, run, method, "test_accuracy", last=3) for run in runs.values()]
                ends = [100 * values.mean() if values.size else float("nan") for values in ends]
                axis.plot(list(runs), ends, ".-", label=label)
            axis.set_xscale("symlog", linthresh=10)
            axis.set(title=title, xlabel="rounds of warm-up", ylabel="test accuracy, %")
            axis.set_xticks(list(runs), list(runs), minor=False)
            axis.legend(fontsize=7)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs(dict.fromkeys(TASKS, (LENGTHS, TOTAL)))),
    tables=tables,
    draw=draw,
    caption="Test accuracy at equal total rounds by the length of the warm-up, mean over the seeds",
    data=("cifar10", "tiny_imagenet"),
    reduced=fewer_images(
        " of CIFAR-10 and Tiny-ImageNet-50, where all ends after 90 rounds; digits end after 150; all of the CNN on "
        "Tiny-ImageNet-50 is left out",
        runs=dict(_runs(SHORT)),
    ),
    gigabytes=4,
    hours=40,
)
