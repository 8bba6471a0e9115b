"""At equal bytes up, with updates in 4 or 3 bits in place of 8: who makes more of the rounds that it saves?

The tasks of {doc}`equal_bytes`: CIFAR-10 with a CNN of 24k parameters and Tiny-ImageNet-50 with one of 203k, five of
100 clients a round, balanced Dirichlet splits, all from the last model of the same warm-up, until clients have sent
what plain FedAvg sends in 50 rounds on CIFAR-10, in 60 on Tiny-ImageNet-50. FIPA in the span of gradients (`fipa_span`)
keeps every client's last gradient at the server (`term.name=varp`); its gradients are of the images as they are or, in
a row of its own, of random views, on which FedVARP trains (`local.views`). FedVARP was the best compressed first-order
rule in 8 bits, and has the rates that were chosen for it there. (The runs called "tune" try others in 4 bits, for half
as many bytes on the held-out images of seed 9 of Tiny-ImageNet-50 at alpha 0.1.) A block of 256 entries is turned
before it is rounded (Suresh et al. 2017), which in {doc}`equal_bytes` it was not yet. Beside each rule's last
models the average of its models is evaluated (`server.average`), one of j rounds before the last counting 0.95^j.
"""

from typing import Any, NamedTuple

from evidence.records import Run, Spread, Study, Table, draw_lines, final, number, own_fields, percent, usual_row

SPAN, VIEWS = "FIPA in the span of gradients, kept", "FIPA in the span of gradients, random views, kept"
VARP = "FedVARP"
RULES = {
    SPAN: "fipa_span:term.name=varp:",
    VIEWS: "fipa_span:local.views=True:term.name=varp:",
    VARP: "fedavg:term.name=varp:local.compress.name=few_bits:local.lr=0.03:",
}
OF_SPAN = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5:"  # one direction of a loss
AVERAGE = "server.average=0.95:"  # evaluated beside the last model
OWN = ("local.compress.bits", "server.lr")  # what was tried
LAST, BITS, RATE = 3, (8, 4, 3), 0.3  # evaluations; of an entry; of FedVARP's server


class Place(NamedTuple):
    """What is trained: a config on one split, and for how many bytes."""

    config: str
    alpha: float
    most: float  # bytes that all clients may send
    shared: str = ""  # fields of all methods
    of_span: str = ""  # fields of FIPA


CIFAR, IMAGENET = "CIFAR-10, alpha {:g}", "Tiny-ImageNet-50, alpha {:g}"
PLACES = {CIFAR.format(alpha): Place("cifar10", alpha, 23.71e6) for alpha in (0.1, 0.05)} | {
    IMAGENET.format(alpha): Place("tiny_imagenet:cpu", alpha, 244e6, "trainable=.*:cache_body=False:", OF_SPAN)
    for alpha in (0.1, 0.05)
}
TUNED, TUNED_ON, HALF = IMAGENET.format(0.1), 9, 0.5  # a place; a seed; of the bytes
TRIED = {VIEWS: ((8, 0), (4, 0)), VARP: ((8, RATE), (4, RATE), (4, 0.1))}  # a rule -> bits and server rates


def _method(place, rule, bits, rate=RATE, part=1.0):
    """A compared method, for a part of the bytes."""
    own = f"server.lr={rate:g}:" if rule == VARP else place.of_span
    own += AVERAGE if part == 1 else ""
    return f"{RULES[rule]}local.compress.bits={bits}:{place.shared}{own}rounds=3000:most_bytes_up={part * place.most:g}"


def _tried(rule):
    return [_method(PLACES[TUNED], rule, *how, HALF) for how in TRIED[rule]]


def _run(place, methods, **others):
    """From a warm-up, one for each split."""
    fields: dict[str, Any] = {"partition.alpha": place.alpha, "eval.every": 10, "eval.clients_every": 0}
    warm = Run(place.config, fields | {"fipa.rounds": 0}, seeds=(0,))
    return Run(place.config, fields | {"compare": tuple(methods)}, start=warm, **others)


def _lines(of):
    """{rule and bits: (its run, its method)} at a place."""
    labels = {f"{rule}, {bits} bits": (rule, bits) for rule in RULES for bits in BITS}
    return {label: (f"{of}, {label}", _method(PLACES[of], *how)) for label, how in labels.items()}


def _runs():
    for rule in TRIED:
        yield f"tune, {rule}", _run(PLACES[TUNED], _tried(rule), seeds=(TUNED_ON,))
    for of, place in PLACES.items():
        yield from ((run, _run(place, [method])) for run, method in _lines(of).values())


def tables(found):
    """What was tried; accuracy, loss, bytes and seconds at each place."""
    rows = [
        {"method": rule, "setting": own_fields(method, OWN), "held-out accuracy, %": Spread(values, percent)}
        for rule in TRIED
        for method in _tried(rule)
        if (values := final(found, f"tune, {rule}", method, "holdout_accuracy", last=LAST)).size
    ]
    made = [Table(f"{TUNED}, half of the bytes, seed {TUNED_ON}: what was tried.", rows)]
    for of in PLACES:
        rows = []
        for label, line in _lines(of).items():
            mean, loss = (final(found, *line, f"test_average_{figure}", last=LAST) for figure in ("accuracy", "loss"))
            if mean.size:
                averages = {"accuracy of the average": Spread(mean, percent), "its loss": Spread(loss, number)}
                rows.append(usual_row(found, *line, label, LAST) | averages)
        words = f"{of}: mean of the last three evaluations, and the standard deviation over seeds."
        made.append(Table(words, rows))
    return [table for table in made if table.rows] or made[:1]


def draw(found, path):
    """The accuracies by what the clients send."""
    panels = {
        of: [(*line, label) for label, line in _lines(of).items() if final(found, *line, "test_accuracy").size]
        for of in PLACES
    }
    panels = {of: lines for of, lines in panels.items() if lines} or {"nothing": []}
    draw_lines(panels, "test_accuracy", path, found, by=("bytes_up",))


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="Test accuracy by the bytes that clients send up, mean and one standard deviation over the seeds",
    data=("cifar10", "tiny_imagenet"),
    gigabytes=5,
    hours=30,
)
