"""Two clients have a half of a curve each, sin(2 pi x): what do FIPA and averaging make of it?

FedAvg takes FIPA's local steps; its damping (the best of four) or its server's step (the best of three) is chosen by
the seeds 9 and 10 in float64, which the table does not see.
"""

from evidence.records import Run, Spread, Study, Table, best, draw_lines, error, final

TUNED = {  # variant of the config -> FedAvg's settings
    "sine": tuple(f"fedavg:local.damping={value:g}" for value in (1e-6, 1e-4, 1e-2, 1.0)),
    "sine:gauss_newton": tuple(f"fedavg:local.damping={value:g}" for value in (1e-6, 1e-4, 1e-2, 1.0)),
    "sine:sgd": tuple(f"fedavg:server.lr={value:g}" for value in (0.3, 0.7, 1.0)),
}
WORDS = {
    "sine": "Levenberg-Marquardt shared by clients and server, the default",
    "sine:gauss_newton": "clients choose their own damping, `:gauss_newton`",
    "sine:sgd": "clients descend in 500 steps, `:sgd`",
}


def _runs():
    for config, settings in TUNED.items():
        ceiling = ("centralised",) if config == "sine" else ()
        yield config, Run(config, {"compare": ("fipa", *settings, *ceiling)})
    for config, settings in TUNED.items():
        yield f"{config} tune", Run(config, {"compare": settings}, seeds=(9, 10))
        yield f"{config} float32", Run(config, {"compare": ("fipa", *settings), "precision": "float32"})


def tables(found):
    """FIPA beside the best FedAvg, for each local solver and precision."""
    rows = []
    for config, words in WORDS.items():
        fedavg = best(found, f"{config} tune", TUNED[config], "test_mse")
        for run, precision in ((config, "float64"), (f"{config} float32", "float32")):
            row = {"local work": words, "precision": precision}
            for label, method in (
                ("FIPA", "fipa"),
                ("FedAvg, tuned", fedavg),
                ("all data in one place", "centralised"),
            ):
                values = final(found, run, method, "test_mse")
                row[label] = Spread(values, error) if values.size or method != "centralised" else "-"
            rows.append(row)
    return [Table("Test MSE after 300 rounds: median over the seeds, then the lowest and the highest.", rows)]


def draw(found, path):
    """The errors by round."""
    panels = {}
    for config, words in WORDS.items():
        fedavg = best(found, f"{config} tune", TUNED[config], "test_mse")
        lines = [(config, "fipa"), (config, fedavg)]
        panels[words.partition(",")[0]] = [*lines, (config, "centralised")] if config == "sine" else lines
    draw_lines(panels, "test_mse", path, found)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    tables=tables,
    draw=draw,
    caption="Test MSE by round in float64, mean and one standard deviation over the seeds",
    hours=0.2,
)
