"""Four clients own strips of an equation's domain: does the model solve the equation in all of them?

FedAvg with FIPA's local steps has four dampings. First-order methods take 100 rounds of 300 steps; each has four
settings, tried for 25 rounds. All are chosen by seed 9, which the table does not see.
"""

from evidence.records import Run, Size, Spread, Study, Table, chosen, draw_lines, error, every, final

ROUNDS = {"poisson_1d": 800, "poisson_2d": 800, "fisher_kpp": 800, "burgers": 400, "helmholtz": 400}  # of FIPA
FIGURE = "test_relative_l2"
GAUSS_NEWTON = {
    "FedAvg, FIPA's local steps": [f"fedavg:rounds=100:local.damping={d:g}" for d in (1e-4, 1e-2, 1.0, 100.0)]
}
RATES = (1e-3, 1e-4)
TRIED = {
    "FedAvg, Adam": [f"fedavg:server.lr={s}:local.lr={lr}" for lr in RATES for s in (1, 0.5)],
    "FedProx, Adam": [
        f"fedavg:server.lr=1:term.name=prox:term.mu={mu}:local.lr={lr}" for lr in RATES for mu in (1, 0.1)
    ],
    "FedAdam, Adam": [
        f"fedavg:server.optimizer=adam:server.lr={s}:local.lr={lr}" for lr in RATES for s in (0.01, 0.001)
    ],
    "SCAFFOLD, Adam": [f"fedavg:term.name=scaffold:server.lr={s}:local.lr={lr}" for lr in RATES for s in (1, 0.5)],
}
CEILING = "centralised:rounds=200"


def _runs(equations, adam):
    """Levenberg-Marquardt on some equations, and what tunes the first-order methods on some."""
    for name in equations:
        yield f"{name} tune", Run(name, {"compare": every(GAUSS_NEWTON), "fipa.rounds": 100}, seeds=(9,))
        fipa = f"fipa:rounds={ROUNDS[name]}"
        yield name, Run(name, {"compare": (fipa, *every(GAUSS_NEWTON), CEILING), "fipa.rounds": 200})
    for name in adam:
        fields = {"compare": every(TRIED), "fipa.rounds": 25}
        yield f"{name} Adam tune", Run(f"{name}:published", fields, seeds=(9,))


def then(found):
    """The first-order methods as tuned, beside FIPA as published."""
    runs = {}
    for name in ROUNDS:
        settings = tuple(filter(None, chosen(found, f"{name} Adam tune", TRIED, FIGURE).values()))
        if not settings:
            continue
        runs[f"{name} Adam"] = Run(f"{name}:published", {"compare": ("fipa", *settings), "fipa.rounds": 100})
    return runs


def tables(found):
    """A row for each method, a column for each equation."""
    rows = {}

    def enter(label, name, run, method, rounds=0):
        values = Spread(final(found, run, method, FIGURE, rounds=rounds), error)
        rows.setdefault(label, {"method": label})[name.replace("_", " ")] = values

    for name, most in ROUNDS.items():
        if name not in found.runs:
            continue
        for rounds in (100, 200, 400, 800):
            if rounds <= most:
                label = f"FIPA, Levenberg-Marquardt, rank 50, {rounds} rounds"
                enter(label, name, name, f"fipa:rounds={most}", rounds)
        enter("all data in one place, Levenberg-Marquardt, 200 rounds", name, name, CEILING)
        for label, spec in chosen(found, f"{name} tune", GAUSS_NEWTON, FIGURE).items():
            enter(f"{label}, 100 rounds", name, name, spec)
        enter("FIPA as published: Adam, `pinv`, 100 rounds", name, f"{name} Adam", "fipa")
        for label, spec in chosen(found, f"{name} Adam tune", TRIED, FIGURE).items():
            enter(f"{label}, 100 rounds", name, f"{name} Adam", spec)
    words = "Relative L2 error: median over the seeds, then the lowest and the highest. A dash: not asked for."
    return [Table(words, list(rows.values()))]


def draw(found, path):
    """The errors by round."""
    panels = {}
    for name, most in [(name, most) for name, most in ROUNDS.items() if name in found.runs][:3]:
        fedavg = chosen(found, f"{name} tune", GAUSS_NEWTON, FIGURE).values()
        panels[name.replace("_", " ")] = [
            (name, f"fipa:rounds={most}"),
            *((name, spec) for spec in fedavg),
            (name, CEILING),
        ]
    draw_lines(panels, FIGURE, path, found)


STUDY = Study(
    words=__doc__,
    runs=dict(_runs(ROUNDS, ROUNDS)),
    then=then,
    tables=tables,
    draw=draw,
    caption="Relative L2 error by round, mean and one standard deviation over the seeds",
    reduced=Size(
        "Poisson's equation in one and two dimensions and Fisher-KPP; the first-order methods on the first alone.",
        runs=dict(_runs(list(ROUNDS)[:3], list(ROUNDS)[:1])),
    ),
    hours=4.0,
)
