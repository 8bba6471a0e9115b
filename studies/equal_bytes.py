"""With all images, at equal bytes up: is FIPA ahead of compressed first-order rules?

CIFAR-10 with a CNN of 24k parameters and Tiny-ImageNet-50 with one of 203k, five of 100 clients a round, balanced
Dirichlet splits, from the last model of a warm-up (by FedAvg on CIFAR-10, by FedRCL on Tiny-ImageNet-50). All rules
send their updates in 8 bits, and go on until clients have sent what plain FedAvg sends in 50 rounds on CIFAR-10, in 60
on Tiny-ImageNet-50; on CIFAR-10 also four times as many, on Tiny-ImageNet-50 twice. FIPA in the span of gradients
(`fipa_span`) has no setting that is tuned; its clients' gradients are of the images as they are or, in a row of its
own, of random views, on which the other rules train (`local.views`). In rows that say "kept" the server keeps every
client's last gradient for the rounds in which it is not asked, as FedVARP keeps updates (`term.name=varp`).
First-order rules were tried on the held-out images of seed 9 at alpha 0.1 for half as many bytes, around the settings
that {doc}`cifar10`, {doc}`few_bytes` and {doc}`larger_networks` have chosen by larger grids; the best rule and setting
run to the end. Beside each rule's last models the average of its models is evaluated (`server.average`), one of j
rounds before the last counting 0.95^j.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from evidence.records import (
    Run,
    Spread,
    Study,
    Table,
    after_bytes,
    best,
    draw_lines,
    every,
    final,
    of_average,
    own_fields,
    percent,
    sent,
    usual_row,
)

SPAN = "FIPA in the span of gradients"
VIEWS, KEPT = f"{SPAN}, random views", f"{SPAN}, kept"
KEPT_VIEWS = f"{VIEWS}, kept"
ADAM, VARP = "FedAdam in 8 bits", "FedVARP in 8 bits"
CIFAR, IMAGENET = "CIFAR-10, alpha {:g}", "Tiny-ImageNet-50, alpha {:g}"
WHOLE = "trainable=.*:cache_body=False:"
CHEAP = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5:"  # one direction of a loss
AVERAGE = "server.average=0.95:"  # evaluated beside the last model
RULES = {
    SPAN: "fipa_span:",
    VIEWS: "fipa_span:local.views=True:",
    KEPT: "fipa_span:term.name=varp:",
    KEPT_VIEWS: "fipa_span:local.views=True:term.name=varp:",
    ADAM: "fedavg:server.optimizer=adam:local.compress.name=few_bits:",
    VARP: "fedavg:term.name=varp:local.compress.name=few_bits:",
}
TUNED_AT, TUNED_ON, HALF, LAST = 0.1, 9, 0.5, 3  # alpha; a seed; of the bytes; evaluations
HELD_OUT = "holdout_accuracy"
OWN = ("local.lr", "server.lr")  # what is chosen


class Task(NamedTuple):
    """What is trained, at which splits, and for how many bytes."""

    config: str
    alphas: tuple[float, ...]
    most: float  # bytes that all clients may send
    shared: str  # fields of all methods
    of_span: str  # fields of FIPA
    tried: Mapping[str, tuple[tuple[float, float], ...]]  # a rule -> its local and server rates


TASKS = {
    CIFAR: Task(
        config="cifar10",
        alphas=(0.6, 0.1, 0.05),
        most=23.71e6,
        shared="",
        of_span="",
        tried={ADAM: ((0.1, 0.0003), (0.1, 0.0001)), VARP: ((0.03, 0.1), (0.03, 0.3))},
    ),
    IMAGENET: Task(
        config="tiny_imagenet:cpu",
        alphas=(0.3, 0.1, 0.05),
        most=244e6,
        shared=WHOLE,
        of_span=CHEAP,
        tried={VARP: ((0.03, 0.3), (0.03, 0.1), (0.01, 0.3))},
    ),
}
OWN_SPLITS = f"{CIFAR.format(TUNED_AT)}, another split and warm-up for each seed"
LONG, LONG_IMAGENET = f"{CIFAR}, four times the bytes", f"{IMAGENET}, twice the bytes"


class Place(NamedTuple):
    """What is shown: a task on one split, and for which part of its bytes."""

    task: Task
    alpha: float
    part: float = 1
    seeded: tuple[str, ...] = ("seed",)  # fields that take the seed


PLACES = {name.format(alpha): Place(task, alpha) for name, task in TASKS.items() for alpha in task.alphas}
PLACES[OWN_SPLITS] = Place(TASKS[CIFAR], TUNED_AT, seeded=("seed", "partition.seed"))
PLACES |= {LONG.format(alpha): Place(TASKS[CIFAR], alpha, 4) for alpha in TASKS[CIFAR].alphas}
PLACES |= {LONG_IMAGENET.format(alpha): Place(TASKS[IMAGENET], alpha, 2) for alpha in TASKS[IMAGENET].alphas}


def _method(task, rule, own, part=1.0):
    average = AVERAGE if part >= 1 else ""
    return f"{RULES[rule]}{task.shared}{own}{average}rounds=2000:most_bytes_up={part * task.most:g}"


def _tried(task, part):
    """{rule: its settings}, for a part of the bytes."""
    return {
        rule: [_method(task, rule, f"local.lr={local}:server.lr={server}:", part) for local, server in steps]
        for rule, steps in task.tried.items()
    }


def _run(place, methods, **others):
    """From a warm-up, one for each split."""
    task, alpha, _, seeded = place
    fields: dict[str, Any] = {"partition.alpha": alpha, "eval.every": 10, "eval.clients_every": 0}
    of_each = () if "partition.seed" in seeded else (0,)
    warm = Run(task.config, fields | {"fipa.rounds": 0}, seeds=of_each, seeded=seeded)
    return Run(task.config, fields | {"compare": tuple(methods)}, seeded=seeded, start=warm, **others)


def _tune(task):
    return f"tune, {task.config}"


def _of_fipa(place):
    """{its rule: the name of its run}"""
    names = {SPAN: "span", VIEWS: "views", KEPT: "kept", KEPT_VIEWS: "views kept"}
    return {rule: f"{place}, {name}" for rule, name in names.items()}


def _runs():
    for task in TASKS.values():
        yield _tune(task), _run(Place(task, TUNED_AT), every(_tried(task, HALF)), seeds=(TUNED_ON,))
    for name, place in PLACES.items():
        for rule, run in _of_fipa(name).items():
            yield run, _run(place, [_method(place.task, rule, place.task.of_span, place.part)])


def _best(found, place):
    """(the best first-order rule where it was tuned, its method for a place's bytes); ("", "") where none has run."""
    task, part = PLACES[place].task, PLACES[place].part
    half, whole = _tried(task, HALF), _tried(task, part)
    top = best(found, _tune(task), every(half), HELD_OUT, LAST)
    return next(((rule, whole[rule][tried.index(top)]) for rule, tried in half.items() if top in tried), ("", ""))


def then(found):
    """The best first-order rule as tuned."""
    methods = {place: _best(found, place)[1] for place in PLACES}
    return {place: _run(PLACES[place], [method]) for place, method in methods.items() if method}


def _lines(found, place):
    """{rule: (run, method)} of what has run at a place, FIPA first."""
    task, part = PLACES[place].task, PLACES[place].part
    rule, method = _best(found, place)
    lines = {fipa: (run, _method(task, fipa, task.of_span, part)) for fipa, run in _of_fipa(place).items()}
    return {rule: line for rule, line in (lines | {rule: (place, method)}).items() if sent(found, *line).size}


def tables(found):
    """What was tuned; accuracy, loss, bytes and seconds at each place."""
    made = []
    for name, task in TASKS.items():
        rows = [
            {"method": rule, "setting": own_fields(spec, OWN), "held-out accuracy, %": Spread(values, percent)}
            for rule, tried in _tried(task, HALF).items()
            for spec in tried
            if (values := final(found, _tune(task), spec, HELD_OUT, last=LAST)).size
        ]
        made.append(Table(f"{name.format(TUNED_AT)}, half of the bytes, seed {TUNED_ON}: what was tried.", rows))
    for place, (task, _, part, _) in PLACES.items():
        rows = []
        for rule, (run, spec) in _lines(found, place).items():
            reached: dict[str, Spread] = {}
            for share in [share for share in (1, 2, 4) if 1 < part >= share]:
                reached |= after_bytes(found, run, spec, share * task.most, LAST, ("bytes_up",))
            rows.append(
                usual_row(found, run, spec, rule, LAST)
                | reached
                | of_average(found, run, spec, LAST)
                | {"chosen": own_fields(spec, OWN)}
            )
        if rows:
            words = f"{place}: mean of the last three evaluations, and the standard deviation over seeds."
            made.append(Table(words, rows))
    return made


def draw(found, path):
    """The accuracies by what the clients send."""
    panels = {place: [(*line, rule) for rule, line in _lines(found, place).items()] for place in PLACES}
    panels = {place: lines for place, lines in panels.items() if lines} or {"nothing": []}
    draw_lines(panels, "test_accuracy", path, found, by=("bytes_up",))


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by the bytes that clients send up, mean and one standard deviation over the seeds",
    data=("cifar10", "tiny_imagenet"),
    gigabytes=5,
    hours=50,
)
