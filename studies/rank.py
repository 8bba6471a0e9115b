"""How many eigenpairs does FIPA need: do 20 suffice for compact networks, and 200 for ResNet-20, as published?

Small networks: Levenberg-Marquardt by clients and server. CIFAR-10: the CNN of 23.7k parameters, alpha 0.05, 5 of 100
clients, FIPA in the authors' form (`fipa`) and with past rounds (`fipa_memory`), each as tuned at rank 50, beside
FedAvg and FedVARP as tuned; and all as published (`configs/cifar10.py:published`). ResNet-20: its head on
Tiny-ImageNet-50, after FedAvg.
"""

from evidence.records import Run, Spread, Study, Table, error, fewer_images, final, legend, number, percent, sent, ticks

SMALL = {  # config -> (figure, rounds)
    "sine": ("test_mse", 300),
    "poisson_1d": ("test_relative_l2", 200),
    "poisson_2d": ("test_relative_l2", 200),
    "fisher_kpp": ("test_relative_l2", 200),
    "burgers": ("test_relative_l2", 400),
    "helmholtz": ("test_relative_l2", 400),
    "gaussians_2d": ("test_mse", 200),
}
RANKS = (5, 10, 20, 50)
LARGE = (*RANKS, 100, 200)
METHODS = ("fipa", "fipa_memory")
CONTROLS = ("fedavg:local.lr=0.1:server.lr=0.08", "fedavg:term.name=varp:local.lr=0.03:server.lr=0.1")
PLAIN = "fedavg:server.lr=1"  # as published
HEAD = "fipa_damped:sketch.rank={}:aggregator.damping=0.1:server.lr=0.3:local.lr=0.3"
WARM = Run("cifar10", {"partition.alpha": 0.05, "fipa.rounds": 0}, seeds=(0,))
WARM_PUBLISHED = Run("cifar10:published", {"partition.alpha": 0.05, "fipa.rounds": 0}, seeds=(0,))
# FedRCL from a random start stays at chance.
BY_FEDAVG = {"fipa.rounds": 0, "warmup.term.name": "none", "warmup.local.lr": 0.3}
WARM_HEAD = Run("tiny_imagenet:resnet20", BY_FEDAVG, seeds=(0,))


def _spec(method, rank):
    return f"{method}:sketch.rank={rank}"


def _runs():
    for config, (_, rounds) in SMALL.items():
        fields = {"compare": tuple(_spec("fipa", rank) for rank in RANKS), "fipa.rounds": rounds}
        yield config, Run(config, fields, seeds=(0, 1, 2))
    specs = tuple(_spec(method, rank) for method in METHODS for rank in LARGE)
    fields = {"partition.alpha": 0.05, "eval.every": 2, "fipa.rounds": 50, "compare": (*specs, *CONTROLS)}
    yield "cifar10", Run("cifar10", fields, start=WARM)
    fields = {"partition.alpha": 0.05, "eval.every": 2, "compare": (*(_spec("fipa", rank) for rank in LARGE), PLAIN)}
    yield "as published", Run("cifar10:published", fields, start=WARM_PUBLISHED)
    heads = (*(HEAD.format(rank) for rank in LARGE), "fedavg:server.lr=0.1:local.lr=0.03")
    yield "resnet20", Run("tiny_imagenet:resnet20", {"compare": heads}, start=WARM_HEAD)


def tables(found):
    """Errors of small networks by rank, then accuracies of larger ones with what they send."""
    small = []
    for config, (figure, rounds) in SMALL.items():
        if not found.runs.get(config):
            continue
        row = {"task, rounds": f"{config}, {rounds}"}
        for rank in RANKS:
            row[f"rank {rank}"] = Spread(final(found, config, _spec("fipa", rank), figure), error)
        small.append(row)
    made = [Table("Errors by rank: median over the seeds 0 to 2, then the lowest and the highest.", small)]
    lines = {
        "cifar10": [*((_spec(method, rank)) for method in METHODS for rank in LARGE), *CONTROLS],
        "as published": [*(_spec("fipa", rank) for rank in LARGE), PLAIN],
        "resnet20": [*(HEAD.format(rank) for rank in LARGE), "fedavg:server.lr=0.1:local.lr=0.03"],
    }
    for run, specs in lines.items():
        if not found.runs.get(run):
            continue
        rows = [
            {
                "method": f"`{spec}`",
                "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=5), percent),
                "test loss": Spread(final(found, run, spec, "test_loss", last=5), number),
                "megabytes": Spread(sent(found, run, spec) / 1e6, number),
            }
            for spec in specs
        ]
        made.append(
            Table(f"{run}: means of the last five evaluations, and the standard deviation over the seeds.", rows)
        )
    return made


def draw(found, path):
    """The errors of small networks by rank, and the accuracy on CIFAR-10 by bytes, where there are some."""
    from fipa_jax.reporting import plots

    shown = [panel for panel, runs in ((_small, SMALL), (_large, ["cifar10"])) if any(map(found.runs.get, runs))]
    with plots.picture(path, 3.6 * max(len(shown), 1), 3.2, 1, max(len(shown), 1)) as (_, axes):
        for axis, panel in zip(axes[0], shown, strict=False):
            panel(axis, found)
            axis.grid(alpha=0.25)
            legend(axis, fontsize=6)


def _small(axis, found):
    from fipa_jax.reporting import plots

    for (config, (figure, _)), color in zip(SMALL.items(), plots.CLIENTS, strict=False):
        ends = [final(found, config, _spec("fipa", rank), figure) for rank in RANKS]
        if all(values.size for values in ends):
            axis.loglog(RANKS, [sorted(values)[len(values) // 2] for values in ends], ".-", color=color, label=config)
    axis.set(xlabel="rank", ylabel="error", title="small networks")
    ticks(axis, RANKS)


def _large(axis, found):
    from fipa_jax.reporting import curves

    for method in METHODS:
        specs = [_spec(method, rank) for rank in LARGE]
        ends = [(sent(found, "cifar10", s), final(found, "cifar10", s, "test_accuracy", last=5)) for s in specs]
        ends = [(size.mean() / 1e6, 100 * values.mean()) for size, values in ends if values.size]
        if ends:
            name, color = curves.KNOWN[method][:2]
            axis.semilogx(*zip(*ends, strict=True), ".-", color=color, label=name)
    axis.set(xlabel="megabytes", ylabel="test accuracy, %", title="CIFAR-10, alpha 0.05")


REDUCED = fewer_images(
    " of CIFAR-10, 60 rounds of warm-up and 20 of each method, for ResNet-20 40 and 20 with all images, one seed; "
    "nothing as published, where a round at rank 5 takes half a minute of a core even so",
    {"warmup.rounds": 60, "fipa.rounds": 20},
    seeds=(0,),
    runs={name: run for name, run in _runs() if name != "as published"},
)
STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="The median error of small networks by rank, and the accuracy on CIFAR-10 by bytes at ranks 5 to 200",
    data=("cifar10", "tiny_imagenet"),
    reduced=REDUCED._replace(fields=REDUCED.fields | {"tiny_imagenet": {"warmup.rounds": 40, "fipa.rounds": 20}}),
    gigabytes=6,
    hours=20,
)
