"""Five of a hundred clients and a network of 200k parameters: is FIPA ahead with nothing to tune?

Tiny-ImageNet-50 and half of CIFAR-10, balanced Dirichlet splits, the whole CNN, from the last model of a warm-up (by
FedRCL on Tiny-ImageNet-50, by FedAvg on CIFAR-10). Every first-order rule has three settings of its step sizes, chosen
on the held-out images of seed 9 after 40 rounds; a split that was not tuned takes the settings of the one at alpha 0.1.
FIPA in the span of gradients (`fipa_span`) has none: its damping is the least curvature that it knows. To make its
rounds cheap a client that is asked for curvature sees one direction of each example's loss Hessian. At equal bytes all
rules go on until clients have sent what 60 rounds of plain FedAvg send, updates in 8 bits.

The ceiling is SGD with all clients' images in one place, an epoch a round, at the better of two step sizes on the same
held-out images.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from evidence.records import (
    Run,
    Spread,
    Study,
    Table,
    best,
    chosen,
    draw_lines,
    every,
    final,
    number,
    own_fields,
    sent,
    usual_row,
)

WHOLE = "trainable=.*:cache_body=False"
CHEAP = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5"
NOTHING_TUNED = "FIPA in the span of gradients"
FIPA = f"fipa_span:{WHOLE}:{CHEAP}"
RULES = {  # label -> method, of which two numbers are filled in
    "FedAvg": "local.lr={}:server.lr={}",
    "FedAvgM": "server.optimizer=momentum:local.lr={}:server.lr={}",
    "FedAdam": "server.optimizer=adam:local.lr={}:server.lr={}",
    "FedVARP": "term.name=varp:local.lr={}:server.lr={}",
    "FedRCL": "term.name=rcl:term.mu=1.0:local.lr={}:server.lr={}",
    "FedDyn": "term.name=dyn:server.lr=0.3:local.lr={}:term.mu={}",
    "SCAFFOLD": "term.name=scaffold:local.lr={}:server.lr={}",
}
WITH_ALL = "all images in one place"
CEILING = f"fedavg:pooled=True:least_clients=1:{WHOLE}:server.lr=1:local.epochs=1:local.lr={{}}"
IMAGENET, CIFAR = "Tiny-ImageNet-50, alpha {:g}", "Half of CIFAR-10, alpha {:g}"
STEPS = [(0.1, 0.1), (0.03, 0.3), (0.01, 1)]
GRIDS = {  # where it is tuned -> what each rule is tried at
    IMAGENET.format(0.3): {
        "FedAvg": [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)],
        "FedAvgM": [(0.1, 0.1), (0.1, 0.03), (0.03, 0.1)],
        "FedAdam": [(0.1, 0.003), (0.1, 0.001), (0.03, 0.001)],
        "FedVARP": [(0.1, 0.3), (0.03, 0.3), (0.03, 1)],
        "FedRCL": [(0.1, 0.3), (0.1, 0.1), (0.03, 0.3)],
        "FedDyn": [(0.1, 0.1), (0.1, 0.01), (0.03, 0.01)],
        "SCAFFOLD": [(0.1, 0.3), (0.03, 0.3), (0.03, 1)],
    },
    IMAGENET.format(0.1): {
        "FedAvg": STEPS,
        "FedAvgM": [(0.1, 0.03), (0.03, 0.1), (0.01, 0.3)],
        "FedAdam": [(0.1, 0.001), (0.03, 0.001), (0.01, 0.001)],
        "FedVARP": STEPS,
        "FedRCL": STEPS,
        "FedDyn": [(0.03, 0.1), (0.03, 0.01), (0.01, 0.01)],
        "SCAFFOLD": STEPS,
    },
    CIFAR.format(0.1): {
        "FedAvg": STEPS,
        "FedAvgM": [(0.1, 0.03), (0.03, 0.1), (0.01, 0.3)],
        "FedAdam": [(0.1, 0.003), (0.1, 0.001), (0.03, 0.001)],
        "FedVARP": STEPS,
        "FedRCL": STEPS,
        "FedDyn": [(0.03, 0.1), (0.03, 0.01), (0.01, 0.01)],
        "SCAFFOLD": STEPS,
    },
}


class Place(NamedTuple):
    """What is trained, and by which settings."""

    config: str
    fields: Mapping[str, Any]
    tuned_at: str  # a key of `GRIDS`


HALF = {  # of the images, and a network as large as that of Tiny-ImageNet-50
    "data.train_split": "train[:50%]",
    "data.test_split": "test[:2000]",
    "model.name": "cnn_200k",
    "warmup.rounds": 100,
}
PLACES = {
    IMAGENET.format(alpha): Place("tiny_imagenet:cpu", {"partition.alpha": alpha}, IMAGENET.format(tuned_at))
    for alpha, tuned_at in ((0.3, 0.3), (0.1, 0.1), (0.05, 0.1))
} | {
    CIFAR.format(alpha): Place("cifar10", HALF | {"partition.alpha": alpha}, CIFAR.format(0.1))
    for alpha in (0.3, 0.1, 0.05)
}
AT_EQUAL_BYTES = (IMAGENET.format(0.1),)
IN_8_BITS = ("FedVARP", "FedRCL")  # of the rules, those that go on there
BYTES = 2.44e8  # that all clients may send: those of 60 rounds of plain FedAvg
OWN = ("local.lr", "server.lr", "term.mu")  # what is chosen
LAST, TUNING, ROUNDS, EPOCHS = 3, 40, 60, 50  # evaluations; rounds; of the ceiling


def _nothing_tuned(place):
    return f"{place}, FIPA"


def _equal(place):
    return f"{place}, at equal bytes"


def _ceiling(place):
    return f"{place}, {WITH_ALL}"


def _tried(place):
    """{label: its settings}."""
    return {
        label: [f"fedavg:{WHOLE}:{RULES[label].format(*numbers)}" for numbers in grid]
        for label, grid in GRIDS[place].items()
    }


def _run(place, methods, rounds=ROUNDS, **others):
    config, fields, _ = PLACES[place]
    fields = {**fields, "eval.every": 2, "eval.clients_every": 0}
    warm = Run(config, fields | {"fipa.rounds": 0}, seeds=(0,))
    fields |= {"compare": tuple(methods), "fipa.rounds": rounds}
    return Run(config, fields, start=warm, **others)


def _runs():
    for place in GRIDS:
        yield f"tune, {place}", _run(place, every(_tried(place)), rounds=TUNING, seeds=(9,))
    for place in PLACES:
        yield _nothing_tuned(place), _run(place, [FIPA])
    for place in (IMAGENET.format(0.3), IMAGENET.format(0.1), CIFAR.format(0.1)):
        yield _ceiling(place), _run(place, _ceilings(), rounds=EPOCHS, seeds=(9,))


def _ceilings():
    return [CEILING.format(rate) for rate in (0.1, 0.03)]


def _chosen(found, place):
    """{label: method} of the rules as tuned."""
    tuned_at = PLACES[place].tuned_at
    tuned = chosen(found, f"tune, {tuned_at}", _tried(tuned_at), "holdout_accuracy", LAST)
    return {label: spec for label, spec in tuned.items() if spec}


def _long(found, place):
    """{label: method} that go on until so much is sent; FIPA's updates have 8 bits as it is."""
    most = f"rounds=2000:most_bytes_up={BYTES:g}"
    eight = {label: f"{spec}:local.compress.name=few_bits:{most}" for label, spec in _chosen(found, place).items()}
    long = {f"{label} in 8 bits": eight[label] for label in IN_8_BITS if label in eight}
    return long and {NOTHING_TUNED: f"{FIPA}:{most}"} | long


def then(found):
    """Every rule as tuned, and at equal bytes."""
    runs = {}
    for place in PLACES:
        if methods := _chosen(found, place):
            runs[place] = _run(place, methods.values())
        if place in AT_EQUAL_BYTES and (long := _long(found, place)):
            runs[_equal(place)] = _run(place, long.values())
    return runs


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
    reached = {f"rounds to {100 * target:.1f} %": Spread(_reaches(found, run, spec, target), _words)}
    nothing_sent = {"megabytes up": "", "up and down": ""} if label == WITH_ALL else {}
    row = usual_row(found, run, spec, label, LAST) | nothing_sent | reached
    return row | {"chosen": own_fields(spec, OWN)}


def _lines(found, place):
    """{label: (run, method)} of what has run, FIPA first."""
    lines = {NOTHING_TUNED: (_nothing_tuned(place), FIPA)}
    lines |= {label: (place, spec) for label, spec in _chosen(found, place).items()}
    lines[WITH_ALL] = _ceiling(place), best(found, _ceiling(place), _ceilings(), "holdout_accuracy", LAST)
    return _that_ran(found, lines)


def _lines_at_equal_bytes(found, place):
    return _that_ran(found, {label: (_equal(place), spec) for label, spec in _long(found, place).items()})


def _that_ran(found, lines):
    return {label: line for label, line in lines.items() if sent(found, *line).size}


def _table(found, words, lines):
    ends = {label: final(found, *line, "test_accuracy", last=LAST).mean() for label, line in lines.items()}
    target = max([end for label, end in ends.items() if label not in (NOTHING_TUNED, WITH_ALL)], default=np.inf)
    words = f"{words}: mean of the last three evaluations, and the standard deviation over seeds. "
    words += "The rounds are those to the end of the best first-order rule, by evaluations in every second round."
    return Table(words, [_row(found, *line, label, target) for label, line in lines.items()])


def tables(found):
    """Accuracy, loss, bytes and seconds; and how soon the best first-order rule's final accuracy is there."""
    made = []
    for place in PLACES:
        if (lines := _lines(found, place)) or not made:
            made.append(_table(found, f"{place}, {ROUNDS} rounds", lines))
        if place in AT_EQUAL_BYTES and (lines := _lines_at_equal_bytes(found, place)):
            made.append(_table(found, f"{place}, {BYTES / 1e6:g} MB up", lines))
    return made


def draw(found, path):
    """The accuracies by rounds."""
    panels = {place: _drawn(_lines(found, place)) for place in PLACES}
    panels |= {_equal(place): _drawn(_lines_at_equal_bytes(found, place)) for place in AT_EQUAL_BYTES}
    panels = {title: lines for title, lines in panels.items() if lines} or {IMAGENET.format(0.3): []}
    draw_lines(panels, "test_accuracy", path, found)


def _drawn(lines):
    """Without the ceiling, beside which the others would be flat; a rule looks alike in all panels."""
    return [(*line, label.removesuffix(" in 8 bits")) for label, line in lines.items() if label != WITH_ALL]


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by round, mean and one standard deviation over the seeds",
    data=("tiny_imagenet", "cifar10"),
    gigabytes=5,
    hours=12,
)
