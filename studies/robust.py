"""Do rules that a few liars cannot steer pay where clients have different data, and what does FIPA with its caps do?

`configs/digits.py` with 10 of 20 clients a round, reduced to 10 rounds of warm-up and 25 of each rule. A sign flip
turns a client's update round. All but FIPA with past rounds take the same local steps, at the learning rate that
`configs/digits.py` has found for FedAvg; Krum and the trimmed mean are told that three of ten may be at fault.
"""

from evidence.records import Run, Spread, Study, Table, draw_lines, final, number, percent

FLIPS = (0.0, 0.1, 0.3)
SGD = "local.lr=0.1:server.lr=1"
RULES = {
    "FedAvg": f"fedavg:{SGD}",
    "coordinate median": f"fedavg:aggregator.name=median:{SGD}",
    "trimmed mean": f"fedavg:aggregator.name=trimmed_mean:aggregator.faulty=0.3:{SGD}",
    "Krum": f"fedavg:aggregator.name=krum:aggregator.faulty=0.3:{SGD}",
    "multi-Krum": f"fedavg:aggregator.name=multi_krum:aggregator.faulty=0.3:{SGD}",
    "geometric median": f"fedavg:aggregator.name=geometric_median:{SGD}",
    "FIPA with past rounds, capped": (
        "fipa_memory:aggregator.damping=0.003:aggregator.limits.max_divergence=0.005:aggregator.limits.trace_cap=3"
    ),
    "FIPA, capped": f"fipa:aggregator.damping=0.01:aggregator.limits.trace_cap=3:{SGD}",
}
FIELDS = {"cohort": 10, "warmup.rounds": 10, "fipa.rounds": 25, "eval.every": 5, "eval.clients_every": 0}


def _with(method, flip):
    return f"{method}:faults.flip={flip:g}" if flip else method


def tables(found):
    """Accuracy and loss of each rule under each share of flips."""
    made = []
    for words, figure, show in (("Test accuracy, %", "test_accuracy", percent), ("Test loss", "test_loss", number)):
        rows = []
        for label, method in RULES.items():
            cells = {
                f"{flip:.0%} flipped": Spread(final(found, "flips", _with(method, flip), figure, last=3), show)
                for flip in FLIPS
            }
            rows.append({"rule": label} | cells)
        made.append(Table(f"{words}: mean of the last three evaluations, mean and spread over the seeds.", rows))
    return made


def draw(found, path):
    """The accuracies by round."""
    panels = {
        f"{flip:.0%} of the updates flipped": [("flips", _with(method, flip), label) for label, method in RULES.items()]
        for flip in FLIPS
    }
    draw_lines(panels, "test_accuracy", path, found)


STUDY = Study(
    words=__doc__,
    runs={"flips": Run("digits", FIELDS | {"compare": tuple(_with(m, f) for m in RULES.values() for f in FLIPS)})},
    tables=tables,
    draw=draw,
    caption="Digits, 10 of 20 clients a round: test accuracy by round under sign flips, mean and standard deviation",
    hours=0.7,
)
