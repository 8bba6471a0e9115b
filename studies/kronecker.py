"""What is a client's curvature worth by eigenpairs, by layers' input factors, and by both Kronecker factors?

Few of many: `configs/digits.py`, 4 of 20 clients a round, and `configs/cifar10.py`, 5 of 100, both at Dirichlet 0.1.
CIFAR-10 is reduced to a fifth of its training and half of its test images, and one warm-up of 60 rounds. In each method
a client takes one step from the broadcast parameters, divided by what it sends, and the server remembers past rounds as
a decaying sum. Each message has four dampings on digits, and three, in 20 rounds, on CIFAR-10, chosen by seed 9's
held-out tenth. Five eigenpairs (CIFAR-10: eight) have nearly as many bytes as the factors of the layers. What is cheap
to compute goes on for more rounds, to be seen at equal seconds.
"""

from collections.abc import Mapping
from typing import NamedTuple

from evidence.records import NOTHING, Run, Spread, Study, Table, chosen, every, final, number, percent, seconds, sent

ONE_STEP = "local.lr=1:local.steps=1:local.batch_size=0:server.lr=1:aggregator.past.kind=prior"
BOUND = "aggregator.limits.max_divergence=0.005"
MANY, FEW, INPUTS, BOTH = "low rank, 50 pairs", "low rank, {} pairs", "input factors (`foof`)", "both factors (`kfac`)"

FIFTH = {"data.train_split": "train[:10000]"}


class Task(NamedTuple):
    """Where messages are compared."""

    rounds: dict[str, int]  # {message: rounds of the runs that the table shows}, `shown` at least
    tried: dict[str, tuple[str, ...]]  # {message: settings}
    fields: dict
    shown: int  # rounds after which all stand side by side
    tuning: int  # rounds by which settings are chosen
    base: int  # rounds of 50 pairs, in whose seconds all stand side by side
    shown_fields: Mapping = NOTHING  # of the runs that the table shows
    start: Run | None = None


def _tried(pairs: int, many, few, inputs, both) -> dict[str, tuple[str, ...]]:
    """{message: its settings}, of dampings."""
    low = "fipa_memory:aggregator.damping={}:" + BOUND
    return {
        MANY: tuple(low.format(beta) for beta in many),
        FEW.format(pairs): tuple(f"{low.format(beta)}:sketch.rank={pairs}" for beta in few),
        INPUTS: tuple(f"fedpm:{ONE_STEP}:aggregator.damping={beta}" for beta in inputs),
        BOTH: tuple(f"fedpm:aggregator.layers.kind=kfac:{ONE_STEP}:aggregator.damping={b}:{BOUND}" for b in both),
    }


TASKS = {
    "digits": Task(
        {MANY: 41, FEW.format(5): 41, INPUTS: 241, BOTH: 77},
        _tried(
            5, (0.03, 0.01, 0.003, 0.001), (0.03, 0.01, 0.003, 0.001), (1, 0.3, 0.1, 0.03), (0.1, 0.03, 0.01, 0.003)
        ),
        {"warmup.rounds": 20, "eval.every": 4, "eval.clients_every": 0},
        shown=41,
        tuning=40,
        base=17,
    ),
    "cifar10": Task(
        {MANY: 25, FEW.format(8): 29, INPUTS: 77, BOTH: 41},
        _tried(8, (0.3, 0.1, 0.03), (0.3, 0.1, 0.03), (1, 0.3, 0.1), (0.3, 0.1, 0.03)),
        FIFTH | {"eval.every": 4, "eval.clients_every": 0},
        shown=25,
        tuning=20,
        base=17,
        shown_fields={"data.test_split": "test[:5000]"},
        start=Run("cifar10", FIFTH | {"fipa.rounds": 0, "warmup.rounds": 60}, seeds=(0,)),
    ),
}


def _best(found, name):
    return chosen(found, f"{name} tune", TASKS[name].tried, "holdout_accuracy", 3)


def _lines(found, name):
    """{message: its method as tuned, for as many rounds as it is run}."""
    task = TASKS[name]
    return {
        label: spec and spec.replace(":", f":rounds={task.rounds[label]}:", 1)
        for label, spec in _best(found, name).items()
    }


def then(found):
    """Each message, as tuned."""
    lines = {name: tuple(_lines(found, name).values()) for name in TASKS}
    return {
        name: Run(name, task.fields | dict(task.shown_fields) | {"compare": lines[name]}, start=task.start)
        for name, task in TASKS.items()
        if all(lines[name])
    }


def _after(found, name, method, rounds):
    """Accuracy after so many rounds, or at the last evaluation before."""
    return Spread(final(found, name, method, "test_accuracy", rounds=rounds), percent)


def _table(found, name):
    """Each message after as many rounds, bytes and seconds."""
    task, rows = TASKS[name], []
    lines = {label: method for label, method in _lines(found, name).items() if sent(found, name, method).size}
    times = {label: seconds(found, name, method) for label, method in lines.items()}
    sizes = {label: sent(found, name, method).mean() / task.rounds[label] for label, method in lines.items()}
    for label, method in lines.items():
        by_bytes = round(task.shown * sizes.get(BOTH, 0) / sizes[label])
        by_seconds = min(int(task.base * times.get(MANY, 0) / times[label]), task.rounds[label])
        cells = {
            f"after {task.shown} rounds": _after(found, name, method, task.shown),
            f"bytes of {task.shown} rounds of `kfac`": _after(found, name, method, by_bytes),
            f"seconds of {task.base} rounds of 50 pairs": _after(found, name, method, by_seconds),
            "rounds in these": f"{by_bytes}, {by_seconds}",
        }
        loss = Spread(final(found, name, method, "test_loss", rounds=task.shown), number)
        cells |= {f"test loss after {task.shown}": loss, "kB of a round": f"{sizes[label] / 1e3:.0f}"}
        rows.append({"message": label} | cells | {"seconds of a round": f"{times[label]:.2g}"})
    words = (
        f"`configs/{name}.py`: test accuracy in %, mean and spread over the seeds; median seconds without evaluations."
    )
    return Table(words, rows)


def tables(found):
    """One of each task."""
    return [_table(found, name) for name in TASKS]


def _tuning(name, task):
    fields = task.fields | {"fipa.rounds": task.tuning, "compare": every(task.tried)}
    return Run(name, fields, seeds=(9,), start=task.start)


STUDY = Study(
    words=__doc__,
    runs={f"{name} tune": _tuning(name, task) for name, task in TASKS.items()},
    then=then,
    tables=tables,
    data=("cifar10",),
    hours=1.2,
)
