"""How long must the warm-up be, and what happens without one?

After 0 to 1000 rounds of it FIPA takes the rounds that are left of 1050: on CIFAR-10 with the CNN of 23.7k parameters,
on Tiny-ImageNet-50 with the last layer of a CNN, and with all of it. FIPA and FedAvg are as tuned after a long warm-up
(`configs/cifar10.py`, `configs/tiny_imagenet.py:cpu`); FedAvg goes on beside.
"""

from evidence.records import Run, Size, Spread, Study, Table, final, percent

ROUNDS, TOTAL, EARLY = (0, 10, 30, 100, 300, 1000), 1050, 50
WHOLE = "fipa_memory:local.micro_batch=-1:trainable=.*:cache_body=false"
TASKS = {  # what is shown -> (config, FIPA, FedAvg)
    "CIFAR-10, whole CNN": ("cifar10", "fipa_memory", "fedavg:local.lr=0.1:server.lr=0.08"),
    "Tiny-ImageNet-50, last layer": (
        "tiny_imagenet:cpu",
        "fipa_damped:sketch.rank=50:aggregator.damping=0.3:server.lr=0.3",
        "fedavg:server.lr=0.3",
    ),
    "Tiny-ImageNet-50, whole CNN": (
        "tiny_imagenet:cpu",
        f"{WHOLE}:sketch.rank=50:sketch.loss_rank=3:sketch.examples=250:sketch.micro_batch=5",
        "fedavg:server.lr=0.3:trainable=.*:cache_body=false:term.name=rcl",
    ),
}


def _runs():
    for title, (config, *methods) in TASKS.items():
        for rounds in ROUNDS:
            fields = {"fipa.rounds": TOTAL - rounds, "compare": tuple(methods), "eval.every": 10}
            warm = Run(config, {"warmup.rounds": rounds, "fipa.rounds": 0}, seeds=(0,)) if rounds else None
            yield f"{title}, {rounds}", Run(config, fields | {"warmup.rounds": rounds}, start=warm)


def tables(found):
    """Accuracy by the warm-up's length, soon after it and at the end."""
    made = []
    for title, (_, *methods) in TASKS.items():
        rows = []
        for rounds in ROUNDS:
            row = {"rounds of warm-up": str(rounds)}
            for label, method in zip(("FIPA", "averaging"), methods, strict=True):
                for words, after in ((f"{EARLY} rounds on", EARLY), (f"round {TOTAL}", TOTAL - rounds)):
                    values = final(found, f"{title}, {rounds}", method, "test_accuracy", last=3, rounds=after)
                    row[f"{label}, {words}"] = Spread(values, percent)
            rows.append(row)
        made.append(Table(f"{title}: test accuracy in %, mean and standard deviation over the seeds.", rows))
    return made


def draw(found, path):
    """The accuracy at the end by the warm-up's length."""
    from fipa_jax.reporting import plots

    with plots.picture(path, 3.2 * len(TASKS), 3.0, 1, len(TASKS)) as (_, axes):
        for axis, (title, (_, *methods)) in zip(axes[0], TASKS.items(), strict=True):
            for label, method in zip(("FIPA", "averaging"), methods, strict=True):
                ends = [final(found, f"{title}, {rounds}", method, "test_accuracy", last=3) for rounds in ROUNDS]
                axis.plot(
                    ROUNDS, [100 * values.mean() if values.size else float("nan") for values in ends], ".-", label=label
                )
            axis.set_xscale("symlog", linthresh=10)
            axis.set(title=title, xlabel="rounds of warm-up", ylabel="test accuracy, %")
            axis.legend()


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="Test accuracy at equal total rounds by the length of the warm-up, mean over the seeds",
    data=("cifar10", "tiny_imagenet"),
    reduced=Size(
        "a fifth of the training images, one seed.",
        {"data.train_split": "train[:20%]"},
        (0,),
    ),
    gigabytes=4,
    hours=40,
)
