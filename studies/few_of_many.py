"""Two of eight clients take part in a round: does the curvature of past rounds make up for those that are absent?

FedAvg takes FIPA's local steps; its damping is the best of four by the seeds 9 and 10, which the table does not see.
"""

from evidence.records import Run, Spread, Study, Table, best, draw_lines, error, final

CLIENTS, COHORT = 8, 2
PAST = "fipa:aggregator.past.kind={}:aggregator.past.rank={}"
FEDAVG = tuple(f"fedavg:local.damping={value:g}" for value in (1e-4, 1e-3, 1e-2, 1.0))
SPLIT = {"task.num_clients": CLIENTS}
TASKS = {  # config -> (figure, ranks of `targets` and `latest`, fields)
    "sine:gauss_newton": ("test_mse", (40, 20), {"warmup.rounds": 0, "fipa.rounds": 120} | SPLIT),
    "poisson_1d": (
        "test_relative_l2",
        (100, 50),
        {"fipa.rounds": 200, "fipa.aggregator.trust": False, "fipa.aggregator.damping": 0.001} | SPLIT,
    ),
}
LAST = 10  # evaluations


def _past(config):
    """{label: method} of FIPA with two of eight clients."""
    targets, latest = TASKS[config][1]
    return {
        "FIPA, no past rounds": "fipa",
        "FIPA, the last eight cohorts (`targets`)": PAST.format("targets", targets),
        "FIPA, each client's latest message (`latest`)": PAST.format("latest", latest),
        "FIPA, a decaying sum (`prior`)": PAST.format("prior", targets) + ":aggregator.past.decay=0.7",
    }


def _runs():
    for config, (_, _, fields) in TASKS.items():
        few = fields | {"cohort": COHORT}
        yield f"{config} few", Run(config, few | {"compare": (*_past(config).values(), *FEDAVG)})
        yield f"{config} all", Run(config, fields | {"compare": ("fipa", *FEDAVG)})
    for config, (_, _, fields) in TASKS.items():
        yield f"{config} few tune", Run(config, fields | {"cohort": COHORT, "compare": FEDAVG}, seeds=(9, 10))
        yield f"{config} all tune", Run(config, fields | {"compare": FEDAVG}, seeds=(9, 10))


def _lines(found, config):
    """{label: (run, method)} of a task."""
    figure = TASKS[config][0]
    few, full = (best(found, f"{config} {who} tune", FEDAVG, figure, LAST) for who in ("few", "all"))
    lines = {"FIPA, all 8": (f"{config} all", "fipa")}
    lines |= {f"{label}, 2 of 8": (f"{config} few", method) for label, method in _past(config).items()}
    return lines | {"FedAvg, tuned, all 8": (f"{config} all", full), "FedAvg, tuned, 2 of 8": (f"{config} few", few)}


def tables(found):
    """The error of each way to remember."""
    rows = {}
    for config, (figure, _, _) in TASKS.items():
        for label, (run, method) in _lines(found, config).items():
            values = Spread(final(found, run, method, figure, last=LAST), error)
            rows.setdefault(label, {"method": label})[f"{config}, {figure.removeprefix('test_')}"] = values
    return [
        Table(
            f"Mean of the last {LAST} rounds: median over the seeds, then the lowest and the highest.",
            list(rows.values()),
        )
    ]


def draw(found, path):
    """The errors of the first task by round."""
    config = next(iter(TASKS))
    lines = [(run, method, label.replace("`", "")) for label, (run, method) in _lines(found, config).items()]
    draw_lines({config: lines}, TASKS[config][0], path, found)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="The sine task with two of eight clients a round: test MSE by round, mean and one standard deviation",
    hours=0.5,
)
