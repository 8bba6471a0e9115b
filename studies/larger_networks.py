"""Five of a hundred clients and a network of 203k parameters: is FIPA ahead with nothing to tune?

Tiny-ImageNet-50, balanced Dirichlet splits, the whole CNN, from the last model of a FedRCL warm-up. Every first-order
rule has three settings of its step sizes, chosen on the held-out images of seed 9 after 40 rounds. FIPA in the span of
gradients (`fipa_span`) has none: its damping is the least curvature that it knows. To make its rounds cheap a fifth of
the clients is asked for curvature, by one direction of each example's loss Hessian.
"""

import numpy as np
from evidence.records import (
    Run,
    Spread,
    Study,
    Table,
    chosen,
    draw_lines,
    every,
    final,
    number,
    percent,
    seconds,
    sent,
)

WHOLE = "trainable=.*:cache_body=False"
CHEAP = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5:sketch.share=0.2"
SPAN = f"fipa_span:{WHOLE}:{CHEAP}"
RULES = {  # label -> (method, of which two numbers are filled in; what they are tried at)
    "FedAvg": ("local.lr={}:server.lr={}", [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)]),
    "FedAvgM": ("server.optimizer=momentum:local.lr={}:server.lr={}", [(0.1, 0.1), (0.1, 0.03), (0.03, 0.1)]),
    "FedAdam": ("server.optimizer=adam:local.lr={}:server.lr={}", [(0.1, 0.003), (0.1, 0.001), (0.03, 0.001)]),
    "FedVARP": ("term.name=varp:local.lr={}:server.lr={}", [(0.1, 0.3), (0.03, 0.3), (0.03, 1)]),
    "FedRCL": ("term.name=rcl:term.mu=1.0:local.lr={}:server.lr={}", [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)]),
    "FedDyn": ("term.name=dyn:server.lr=0.3:local.lr={}:term.mu={}", [(0.1, 0.1), (0.1, 0.01), (0.03, 0.01)]),
    "SCAFFOLD": ("term.name=scaffold:local.lr={}:server.lr={}", [(0.1, 0.3), (0.03, 0.3), (0.03, 1)]),
}
TRIED = {
    label: [f"fedavg:{WHOLE}:{method.format(*numbers)}" for numbers in grid] for label, (method, grid) in RULES.items()
}
OWN = ("local.lr", "server.lr", "term.mu")  # what is chosen
FIELDS = {"partition.alpha": 0.3, "eval.every": 2, "eval.clients_every": 0}
WARM = Run("tiny_imagenet:cpu", FIELDS | {"fipa.rounds": 0}, seeds=(0,))
LAST, TUNING = 3, 40  # evaluations; rounds


def _run(methods, rounds, **others):
    fields = FIELDS | {"compare": tuple(methods), "fipa.rounds": rounds}
    return Run("tiny_imagenet:cpu", fields, start=WARM, **others)


def _chosen(found):
    """{label: method}, FIPA first, then the rules as tuned."""
    best = chosen(found, "tune", TRIED, "holdout_accuracy", LAST)
    tuned = {label: spec for label, spec in best.items() if spec}
    return {"FIPA in the span of gradients": SPAN} | tuned if tuned else {}


def then(found):
    """Every rule as tuned, beside FIPA as it is."""
    methods = _chosen(found)
    return {"all": _run(methods.values(), 60)} if methods else {}


def _reaches(found, spec, target):
    """[S], rounds after which a method has an accuracy for the first time; infinite where it never does."""
    first = []
    for rows in found.runs.get("all", {}).values():
        mine = [row for row in rows if row["run"] == spec]
        there = [row["round"] - mine[0]["round"] + 1 for row in mine if row.get("test_accuracy", 0) >= target]
        first += [min(there, default=np.inf)] if mine else []
    return np.array(first)


def _words(rounds):
    """Of rounds over seeds: the mean, or on how many the accuracy is not reached."""
    never = int(np.isinf(rounds).sum())
    return number(rounds) if not never else f"not on {never} of {rounds.size}"


def tables(found):
    """Accuracy, loss, bytes and seconds; and how soon the best first-order rule's final accuracy is there."""
    methods = {label: spec for label, spec in _chosen(found).items() if sent(found, "all", spec).size}
    ends = {label: final(found, "all", spec, "test_accuracy", last=LAST).mean() for label, spec in methods.items()}
    target = max([end for label, end in ends.items() if label in RULES], default=np.inf)
    rows = []
    for label, spec in methods.items():
        reached, each = _reaches(found, spec, target), seconds(found, "all", spec)
        own = ":".join(part for part in spec.split(":") if part.partition("=")[0] in OWN)
        rows.append(
            {
                "method": label,
                "test accuracy, %": Spread(final(found, "all", spec, "test_accuracy", last=LAST), percent),
                "test loss": Spread(final(found, "all", spec, "test_loss", last=LAST), number),
                f"rounds to {100 * target:.1f} %": Spread(reached, _words),
                "seconds of a round": f"{each:.2g}",
                "megabytes up": Spread(sent(found, "all", spec, ("bytes_up",)) / 1e6, number),
                "up and down": Spread(sent(found, "all", spec) / 1e6, number),
                "chosen": f"`{own}`" if label in RULES else "nothing",
            }
        )
    words = (
        "60 rounds: mean of the last three evaluations, and the standard deviation over seeds. The rounds are those to "
        "the end of the best first-order rule, by evaluations in every second round."
    )
    return [Table(words, rows)]


def draw(found, path):
    """The accuracies and the losses by rounds."""
    lines = [("all", spec, label) for label, spec in _chosen(found).items()]
    draw_lines({"Tiny-ImageNet-50, CNN of 203k": lines}, "test_accuracy", path, found)


STUDY = Study(
    words=__doc__,
    runs={"tune": _run(every(TRIED), TUNING, seeds=(9,))},
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by round, mean and one standard deviation over the seeds",
    data=("tiny_imagenet",),
    gigabytes=5,
    hours=2,
)
