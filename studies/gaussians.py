"""Six clients have one bump of a surface each: how do FIPA and first-order methods fit all of it?

First-order methods get as many bytes as FIPA, so 26 times its rounds, of 10 full-batch steps. Each has four settings,
chosen by seed 9 at a quarter of the rounds, which the table does not see. All clients take part in every round.
"""

from evidence.records import Run, Spread, Study, Table, chosen, draw_lines, error, every, final, number, sent

ADAM = "local.optimizer=adam:local.steps=10:local.lr={}"
SGD = "local.optimizer=sgd:local.steps=10:local.lr={}"
TRIED = {
    "FedAvg, Adam": [f"fedavg:{ADAM.format(lr)}" for lr in (0.03, 0.01, 0.003, 0.001)],
    "FedProx, Adam": [
        f"fedavg:term.name=prox:term.mu={mu}:{ADAM.format(lr)}" for mu in (0.1, 0.01) for lr in (0.01, 0.003)
    ],
    "FedAdam, Adam": [
        f"fedavg:server.optimizer=adam:server.lr={server}:{ADAM.format(lr)}"
        for server in (0.01, 0.003)
        for lr in (0.01, 0.003)
    ],
    "SCAFFOLD": [f"fedavg:term.name=scaffold:{SGD.format(lr)}" for lr in (1.0, 0.3, 0.1, 0.03)],
}
ROUNDS, EQUAL_BYTES = 200, 5200
SECOND_ORDER = {
    "FIPA, rank 50": "fipa",
    "FedAvg, FIPA's local steps": "fedavg",
    "all data in one place, FIPA's local steps": "centralised",
}
OFTEN = {"eval.every": 20, "rounds_per_call": 20}
SELDOM = {"eval.every": 200, "rounds_per_call": 200}


def then(found):
    """The first-order methods as tuned."""
    settings = tuple(filter(None, chosen(found, "tune", TRIED, "test_mse").values()))
    fields = {"compare": settings, "fipa.rounds": EQUAL_BYTES, **SELDOM}
    return {"first order": Run("gaussians_2d", fields)} if settings else {}


def tables(found):
    """Every method's error and what it sends."""
    rows = []
    first_order = {label: ("first order", spec) for label, spec in chosen(found, "tune", TRIED, "test_mse").items()}
    second_order = {label: ("second order", spec) for label, spec in SECOND_ORDER.items()}
    for label, (run, spec) in (second_order | first_order).items():
        rows.append(
            {
                "method": label,
                "rounds": str(ROUNDS if run == "second order" else EQUAL_BYTES),
                "test MSE": Spread(final(found, run, spec, "test_mse"), error),
                "megabytes": Spread(sent(found, run, spec) / 1e6, number),
                "tuned": f"`{spec.partition(':')[2]}`" if run == "first order" else "",
            }
        )
    return [Table("Test MSE: median over the seeds, then the lowest and the highest. All clients take part.", rows)]


def draw(found, path):
    """The errors by round, the first-order methods apart."""
    first_order = chosen(found, "tune", TRIED, "test_mse").values()
    panels = {
        "second order": [("second order", spec) for spec in SECOND_ORDER.values()],
        "first order": [("first order", spec) for spec in first_order],
    }
    draw_lines(panels, "test_mse", path, found)


STUDY = Study(
    words=__doc__,
    runs={
        "second order": Run("gaussians_2d", {"compare": tuple(SECOND_ORDER.values()), "fipa.rounds": ROUNDS, **OFTEN}),
        "tune": Run(
            "gaussians_2d",
            {"compare": every(TRIED), "fipa.rounds": EQUAL_BYTES // 4, **SELDOM},
            seeds=(9,),
        ),
    },
    then=then,
    tables=tables,
    draw=draw,
    caption="Test MSE by round, mean and one standard deviation over the seeds",
    hours=0.7,
)
