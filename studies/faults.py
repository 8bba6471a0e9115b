"""What do lost, broken and lying uploads cost?

Faults are injected on the sine task with eight clients, each with its own damping (`configs/sine.py:gauss_newton`).
FedAvg takes FIPA's local steps with the damping that suits it best without faults, of three, by seed 9. One faulty
upload alone is what `scripts/benchmark.py robust` measures.
"""

from evidence.records import Benchmark, Run, Spread, Study, Table, best, draw_lines, error, final

FAULTS = {
    "none": "",
    "a fifth lost": ":faults.drop=0.2",
    "a tenth NaN": ":faults.nan=0.1",
    "a tenth with the update's sign changed": ":faults.flip=0.1",
    "a tenth with eigenvalues times a million": ":faults.scale=0.1",
}
FEDAVG = tuple(f"fedavg:local.damping={value:g}" for value in (1e-4, 1e-2, 1.0))
FIELDS = {"task.num_clients": 8, "warmup.rounds": 30, "fipa.rounds": 120}


def then(found):
    """Both methods under each fault."""
    fedavg = best(found, "tune", FEDAVG, "test_mse", 10)
    if not fedavg:
        return {}
    specs = tuple(f"{method}{fault}" for method in ("fipa", fedavg) for fault in FAULTS.values())
    return {"faults": Run("sine:gauss_newton", FIELDS | {"compare": specs})}


def tables(found):
    """The error under each fault; then one faulty upload's pull on a single step."""
    fedavg, rows = best(found, "tune", FEDAVG, "test_mse", 10), []
    for words, fault in FAULTS.items():
        cells = {
            label: Spread(final(found, "faults", method + fault, "test_mse", last=10), error)
            for label, method in (("FIPA", "fipa"), ("FedAvg, tuned", fedavg))
        }
        rows.append({"of the uploads": words} | cells)
    made = [
        Table("Test MSE, mean of the last ten rounds: median over the seeds, then the lowest and the highest.", rows)
    ]
    for figures in found.runs.get("one upload", {}).values():
        one = [{name: _cell(value) for name, value in row.items()} for row in figures["faults"]]
        words = (
            "One faulty client of five: how far the step is from the one without it, over its length; 0 is left out."
        )
        made.append(Table(words, one))
    return made


def _cell(value):
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def draw(found, path):
    """The errors by round under each fault."""
    fedavg = best(found, "tune", FEDAVG, "test_mse", 10)
    panels = {
        label: [("faults", method + fault) for fault in FAULTS.values()]
        for label, method in (("FIPA", "fipa"), ("FedAvg, tuned", fedavg))
    }
    draw_lines(panels, "test_mse", path, found)


STUDY = Study(
    words=__doc__,
    runs={
        "tune": Run("sine:gauss_newton", FIELDS | {"compare": FEDAVG}, seeds=(9,)),
        "one upload": Benchmark("robust", seeds=(0,), debug=("--size=20", "--rank=4")),
    },
    then=then,
    tables=tables,
    draw=draw,
    caption="Eight clients, test MSE by round under each fault, mean and one standard deviation over the seeds",
    hours=0.1,
)
