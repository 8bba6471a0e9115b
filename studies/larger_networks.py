"""Five of a hundred clients and a network of 203k parameters: is FIPA ahead with nothing to tune?

Tiny-ImageNet-50, balanced Dirichlet splits, the whole CNN, from the last model of a FedRCL warm-up. Every first-order
rule has three settings of its step sizes, chosen on the held-out images of seed 9 after 40 rounds, at alpha 0.3 and
0.1; those of 0.1 serve at 0.05 too. FIPA in the span of gradients (`fipa_span`) has none: its damping is the least
curvature that it knows. To make its rounds cheap a client that is asked for curvature sees one direction of each
example's loss Hessian.
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
CHEAP = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5"
FIPA = {"FIPA in the span of gradients": f"fipa_span:{WHOLE}:{CHEAP}"}
RULES = {  # label -> method, of which two numbers are filled in
    "FedAvg": "local.lr={}:server.lr={}",
    "FedAvgM": "server.optimizer=momentum:local.lr={}:server.lr={}",
    "FedAdam": "server.optimizer=adam:local.lr={}:server.lr={}",
    "FedVARP": "term.name=varp:local.lr={}:server.lr={}",
    "FedRCL": "term.name=rcl:term.mu=1.0:local.lr={}:server.lr={}",
    "FedDyn": "term.name=dyn:server.lr=0.3:local.lr={}:term.mu={}",
    "SCAFFOLD": "term.name=scaffold:local.lr={}:server.lr={}",
}
GRIDS = {  # alpha -> what each rule is tried at, in the order of `RULES`
    0.3: (
        [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)],
        [(0.1, 0.1), (0.1, 0.03), (0.03, 0.1)],
        [(0.1, 0.003), (0.1, 0.001), (0.03, 0.001)],
        [(0.1, 0.3), (0.03, 0.3), (0.03, 1)],
        [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)],
        [(0.1, 0.1), (0.1, 0.01), (0.03, 0.01)],
        [(0.1, 0.3), (0.03, 0.3), (0.03, 1)],
    ),
    0.1: (
        [(0.1, 0.1), (0.03, 0.3), (0.01, 1)],
        [(0.1, 0.03), (0.03, 0.1), (0.01, 0.3)],
        [(0.1, 0.001), (0.03, 0.001), (0.01, 0.001)],
        [(0.1, 0.1), (0.03, 0.3), (0.01, 1)],
        [(0.1, 0.1), (0.03, 0.3), (0.01, 1)],
        [(0.03, 0.1), (0.03, 0.01), (0.01, 0.01)],
        [(0.1, 0.1), (0.03, 0.3), (0.01, 1)],
    ),
}
TUNED_AT = {0.3: 0.3, 0.1: 0.1, 0.05: 0.1}  # alpha -> of which split the settings are
OWN = ("local.lr", "server.lr", "term.mu")  # what is chosen
LAST, TUNING, ROUNDS = 3, 40, 60  # evaluations; rounds


def _place(alpha):
    return f"Tiny-ImageNet-50, alpha {alpha:g}"


def _nothing_tuned(alpha):
    return f"{_place(alpha)}, FIPA"


def _tried(alpha):
    """{label: its settings}."""
    return {
        label: [f"fedavg:{WHOLE}:{method.format(*numbers)}" for numbers in grid]
        for (label, method), grid in zip(RULES.items(), GRIDS[alpha], strict=True)
    }


def _run(alpha, methods, rounds, **others):
    fields = {"partition.alpha": alpha, "eval.every": 2, "eval.clients_every": 0}
    warm = Run("tiny_imagenet:cpu", fields | {"fipa.rounds": 0}, seeds=(0,))
    fields |= {"compare": tuple(methods), "fipa.rounds": rounds}
    return Run("tiny_imagenet:cpu", fields, start=warm, **others)


def _chosen(found, alpha):
    """{label: method} of the rules as tuned."""
    tuned_at = TUNED_AT[alpha]
    best = chosen(found, f"tune, alpha {tuned_at:g}", _tried(tuned_at), "holdout_accuracy", LAST)
    return {label: spec for label, spec in best.items() if spec}


def then(found):
    """Every rule as tuned."""
    tuned = {alpha: _chosen(found, alpha) for alpha in TUNED_AT}
    return {_place(alpha): _run(alpha, methods.values(), ROUNDS) for alpha, methods in tuned.items() if methods}


def _reaches(found, run, spec, target):
    """[S], rounds after which a method has an accuracy for the first time; infinite where it never does."""
    first = []
    for rows in found.runs.get(run, {}).values():
        mine = [row for row in rows if row["run"] == spec]
        there = [row["round"] - mine[0]["round"] + 1 for row in mine if row.get("test_accuracy", 0) >= target]
        first += [min(there, default=np.inf)] if mine else []
    return np.array(first)


def _words(rounds):
    """Of rounds over seeds: the mean, or on how many the accuracy is not reached."""
    never = int(np.isinf(rounds).sum())
    return number(rounds) if not never else f"not on {never} of {rounds.size}"


def _row(found, run, spec, label, target):
    own = ":".join(part for part in spec.split(":") if part.partition("=")[0] in OWN)
    return {
        "method": label,
        "test accuracy, %": Spread(final(found, run, spec, "test_accuracy", last=LAST), percent),
        "test loss": Spread(final(found, run, spec, "test_loss", last=LAST), number),
        f"rounds to {100 * target:.1f} %": Spread(_reaches(found, run, spec, target), _words),
        "seconds of a round": f"{seconds(found, run, spec):.2g}",
        "megabytes up": Spread(sent(found, run, spec, ("bytes_up",)) / 1e6, number),
        "up and down": Spread(sent(found, run, spec) / 1e6, number),
        "chosen": "nothing" if label in FIPA else f"`{own}`",
    }


def _lines(found, alpha):
    """{label: (run, method)} of what has run, FIPA first."""
    lines = {label: (_nothing_tuned(alpha), spec) for label, spec in FIPA.items()}
    lines |= {label: (_place(alpha), spec) for label, spec in _chosen(found, alpha).items()}
    return {label: line for label, line in lines.items() if sent(found, *line).size}


def tables(found):
    """Accuracy, loss, bytes and seconds; and how soon the best first-order rule's final accuracy is there."""
    made = []
    for alpha in TUNED_AT:
        lines = _lines(found, alpha)
        ends = {label: final(found, *line, "test_accuracy", last=LAST).mean() for label, line in lines.items()}
        target = max([end for label, end in ends.items() if label in RULES], default=np.inf)
        words = (
            f"{_place(alpha)}, {ROUNDS} rounds: mean of the last three evaluations, and the standard deviation over "
            "seeds. The rounds are those to the end of the best first-order rule, by evaluations in every second round."
        )
        rows = [_row(found, *line, label, target) for label, line in lines.items()]
        made += [Table(words, rows)] if rows or not made else []
    return made


def draw(found, path):
    """The accuracies by rounds."""
    panels = {
        _place(alpha): [(*line, label) for label, line in lines.items()]
        for alpha in TUNED_AT
        if (lines := _lines(found, alpha))
    }
    draw_lines(panels or {_place(0.3): []}, "test_accuracy", path, found)


STUDY = Study(
    words=__doc__,
    runs={f"tune, alpha {alpha:g}": _run(alpha, every(_tried(alpha)), TUNING, seeds=(9,)) for alpha in GRIDS}
    | {_nothing_tuned(alpha): _run(alpha, FIPA.values(), ROUNDS) for alpha in TUNED_AT},
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by round, mean and one standard deviation over the seeds",
    data=("tiny_imagenet",),
    gigabytes=5,
    hours=6,
)
