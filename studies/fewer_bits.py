"""At equal bytes up, with updates in 1 to 4 bits in place of 8: who makes more of the rounds that it saves?

The tasks of {doc}`equal_bytes`: CIFAR-10 with a CNN of 24k parameters and Tiny-ImageNet-50 with one of 203k, five of
100 clients a round, balanced Dirichlet splits, all from the last model of the same warm-up, until clients have sent
what plain FedAvg sends in 50 rounds on CIFAR-10, in 60 on Tiny-ImageNet-50. FIPA in the span of gradients (`fipa_span`)
keeps every client's last gradient at the server (`term.name=varp`); its gradients are of the images as they are or, in
a row of its own, of random views, on which FedVARP trains (`local.views`). FedVARP was the best compressed first-order
rule in 8 bits, and has the rates that were chosen for it there. A block of 256 entries is turned by an orthogonal
matrix before it is rounded ({doc}`/maths/bytes`), which in {doc}`equal_bytes` it was not yet. In 1 and 2
bits clients send the change since their last update, which the server has (`local.compress.name=change`). Beside each
rule's last models the average of its models is evaluated (`server.average`), one of j rounds before the last counting
0.95^j.
"""

from typing import Any, NamedTuple

from evidence.records import Run, Study, Table, draw_lines, final, of_average, usual_row

SPAN, VIEWS = "FIPA in the span of gradients, kept", "FIPA in the span of gradients, random views, kept"
VARP = "FedVARP"
RULES = {
    SPAN: "fipa_span:term.name=varp:",
    VIEWS: "fipa_span:local.views=True:term.name=varp:",
    VARP: "fedavg:term.name=varp:local.compress.name=few_bits:local.lr=0.03:",
}
OF_SPAN = "sketch.solver=rows:sketch.loss_rank=1:sketch.micro_batch=5:local.micro_batch=5:"  # one direction of a loss
AVERAGE = "server.average=0.95:"  # evaluated beside the last model
LAST = 3  # evaluations
BITS = {
    "4 bits": "local.compress.bits=4:",
    "3 bits": "local.compress.bits=3:",
    "changes in 2 bits": "local.compress.name=change:local.compress.bits=2:",
    "changes in 1 bit": "local.compress.name=change:local.compress.bits=1:",
}


class Place(NamedTuple):
    """What is trained: a config on one split, and for how many bytes."""

    config: str
    alpha: float
    most: float  # bytes that all clients may send
    rules: tuple[str, ...]
    shared: str = ""  # fields of all methods
    of_span: str = ""  # fields of FIPA


CIFAR, IMAGENET = "CIFAR-10, alpha {:g}", "Tiny-ImageNet-50, alpha {:g}"
WHOLE = "trainable=.*:cache_body=False:"
PLACES = {CIFAR.format(alpha): Place("cifar10", alpha, 23.71e6, (SPAN, VIEWS, VARP)) for alpha in (0.1, 0.05)} | {
    IMAGENET.format(alpha): Place("tiny_imagenet:cpu", alpha, 244e6, (VIEWS, VARP), WHOLE, OF_SPAN)
    for alpha in (0.1, 0.05)
}


def _method(place, rule, bits):
    """A compared method."""
    own = "server.lr=0.3:" if rule == VARP else place.of_span
    ends = f"{AVERAGE}rounds=3000:most_bytes_up={place.most:g}"
    return f"{RULES[rule]}{BITS[bits]}{place.shared}{own}{ends}"


def _run(place, method):
    """From a warm-up, one for each split."""
    fields: dict[str, Any] = {"partition.alpha": place.alpha, "eval.every": 10, "eval.clients_every": 0}
    warm = Run(place.config, fields | {"fipa.rounds": 0}, seeds=(0,))
    return Run(place.config, fields | {"compare": (method,)}, start=warm)


def _lines(of):
    """{rule and bits: (its run, its method)} at a place."""
    labels = {f"{rule}, {bits}": (rule, bits) for rule in PLACES[of].rules for bits in BITS}
    return {label: (f"{of}, {label}", _method(PLACES[of], *how)) for label, how in labels.items()}


def _done(found, of):
    """Those of `_lines` that have run."""
    return {label: line for label, line in _lines(of).items() if final(found, *line, "test_accuracy").size}


def tables(found):
    """Accuracy, loss, bytes and seconds at each place."""
    words = "mean of the last three evaluations, and the standard deviation over seeds."
    rows = {
        of: [
            usual_row(found, *line, label, LAST) | of_average(found, *line, LAST)
            for label, line in _done(found, of).items()
        ]
        for of in PLACES
    }
    return [Table(f"{of}: {words}", those) for of, those in rows.items() if those] or [Table("Nothing has run.", [])]


def draw(found, path):
    """The accuracies by what the clients send."""
    panels = {of: [(*line, label) for label, line in _done(found, of).items()] for of in PLACES}
    panels = {of: lines for of, lines in panels.items() if lines} or {"nothing": []}
    draw_lines(panels, "test_accuracy", path, found, by=("bytes_up",))


STUDY = Study(
    words=__doc__,
    runs={run: _run(PLACES[of], method) for of in PLACES for run, method in _lines(of).values()},
    tables=tables,
    draw=draw,
    caption="Test accuracy by the bytes that clients send up, mean and one standard deviation over the seeds",
    data=("cifar10", "tiny_imagenet"),
    gigabytes=5,
    hours=30,
)
