"""What does a person see of a run? Its description, its progress line, its warnings, its tables and its split."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.aggregate.filters import FALLBACKS
from fipa_jax.aggregate.screening import REASONS
from fipa_jax.curvature import sketch
from fipa_jax.data import partition
from fipa_jax.reporting import plots
from fipa_jax.tasks import task as tasks

REPEATS = 10  # of a warning in one phase
SHOWN = 1000  # clients that are drawn, and whose classes are counted
# What is said of clients besides those left out: field of `info` -> words.
NOTED = {
    "absent": "take no part: nothing of them arrived, or they have no examples",
    "stale": "take no part: their answers have moved by more than aggregator.late.max_drift since they began",
    "capped": "eigenvalues scaled down, their sum being above aggregator.limits.trace_cap times the median client's",
}
CELL = 11  # characters of a figure in the table of methods


class Compilations:
    """How many programs were compiled from now on, how long that took, and how many came from the cache on the disk."""

    def __init__(self):
        self._events, self._programs, self._seconds = Counter(), 0, 0.0
        jax.monitoring.register_event_listener(self._count)
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _count(self, event: str, **_):
        self._events[event.rpartition("/")[2]] += 1

    def _add(self, event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":  # or loading from the cache
            self._programs, self._seconds = self._programs + 1, self._seconds + seconds

    def __str__(self) -> str:
        folder, hits = jax.config.jax_compilation_cache_dir, self._events["cache_hits"]
        where = f", {hits} of them from the cache in {folder}" if folder else ""
        return f"{self._programs} programs in {self._seconds:.1f} s{where}"


def warn(name: str, k: int, info: dict, said: Counter) -> None:
    """Says who was left out, capped or flagged and why, and what the round made of it: a fallback is never silent.

    Each kind is said `REPEATS` times at most, as `said` counts; all cases are in metrics.jsonl.
    """
    # A rule of one's own may give no reasons.
    reasons = info.get("reasons") or {"by the rule": info["rejected"]}
    kinds = {f"left out: {REASONS.get(reason, reason)}": clients for reason, clients in reasons.items()}
    kinds |= {words: info[field] for field, words in NOTED.items() if field in info}
    # A rank beyond the curvature's own is no fault: its surplus pairs are not even sent.
    kinds |= {
        sketch.FLAGS[flag]: clients for flag, clients in info.get("flags", {}).items() if flag != "rank_deficient"
    }
    for words, clients in kinds.items():
        if clients.any():
            _say(f"{name}, round {k}: clients {info['ids'][clients].tolist()}: ", words, said)
    if info.get("fallback"):
        taken = FALLBACKS[info["fallback"]]
        _say(f"{name}, round {k}: ", f"the step was not finite or exploded: {taken} is taken instead", said)
    if info.get("skipped"):
        _say(f"{name}, round {k}: ", "skipped: too few clients are left, or the parameters would not be finite", said)


def _say(where: str, words: str, said: Counter) -> None:
    said[words] += 1
    if said[words] <= REPEATS:
        last = " (said no more; all cases are in metrics.jsonl)" if said[words] == REPEATS else ""
        logging.warning("%s%s%s", where, words, last)


def figures(info: dict) -> dict:
    """The numbers of a round's `info` that go into its metrics row; of what is said of each client, the count."""
    groups = {"flags": "sketches", "reasons": "rejected", "faults": "faults"}
    counts = {"clients_rejected": info["rejected"]}
    counts |= {f"clients_{field}": info[field] for field in NOTED if field in info}
    for group, prefix in groups.items():
        counts |= {f"{prefix}_{name}": clients for name, clients in info.get(group, {}).items()}
    row = {key: value for key, value in info.items() if key not in ("ids", "rejected", *NOTED, *groups)}
    return row | {name: int(clients.sum()) for name, clients in counts.items()}


def progress(row: dict) -> str:
    """The round's figures in one line."""
    shown = {name: value for name, value in row.items() if name.startswith(("test_", "step_ratio"))}
    return ", ".join(f"{name}={value:.3g}" for name, value in shown.items() if value is not None)


def table(summary: dict) -> str:
    """The compared methods side by side, as printed at the end of a run: each figure's final and best value."""
    runs = summary["runs"]
    names = [name for name in next(iter(runs.values()))["final"] if name.startswith(("test_", "holdout_"))]
    width = max(len(name) for name in ["method", *runs])
    columns = [max(len(name), 2 * CELL) for name in names]
    above = "".join(f"  {name:>{column}}" for name, column in zip(names, columns, strict=True))
    heads = "".join(f"  {'final':>{column - CELL}}{'best':>{CELL}}" for column in columns)
    lines = [" " * width + above, f"{'method':<{width}}" + heads]
    number = lambda value: f"{math.nan if value is None else value:.4g}"
    for run_name, result in runs.items():
        pairs = [(number(result["final"][name]), number(result["best"][name])) for name in names]
        cells = [f"  {final:>{c - CELL}}{best:>{CELL}}" for (final, best), c in zip(pairs, columns, strict=True)]
        lines.append(f"{run_name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def describe(config: ConfigDict, problem: tasks.Problem, params) -> None:
    """Prints what is about to run: data, clients, parameters and which of them the FIPA phase trains."""
    counts = [len(own) for own in problem.clients]
    sizes = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    platform = jax.devices()[0].platform
    print(f"{config.task.name}: {len(counts)} clients with {sizes} examples each, on {platform}")
    by_class = class_counts(problem)
    if by_class is not None:
        spread = partition.heterogeneity(by_class)
        which = "clients" if len(counts) <= SHOWN else f"the first {SHOWN} clients"
        print(", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in spread.items()) + f" over {which}")
    print(f"\n{parameter_table(params, config.fipa.trainable)}\n")


def parameter_table(params, trainable: str) -> str:
    """How many parameters each layer has, and how many of them a phase trains, `trainable` being its pattern."""
    chosen, rows = trees.select(params, trainable), {}
    for path, leaf in trees.paths(params).items():
        row = rows.setdefault(path.partition("/")[0], [0, 0])
        row[0] += leaf.size
        row[1] += leaf.size * (path in chosen)
    total, trained = (sum(column) for column in zip(*rows.values(), strict=True))
    width = max(map(len, ["layer", *rows]))
    line = lambda name, *cells: f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells)
    lines = [line("layer", "parameters", "share", "in FIPA phase")]
    for name, (size, part) in rows.items():
        lines.append(line(name, f"{size:,}", f"{size / total:.1%}", f"{part:,}" if part else "-"))
    return "\n".join([*lines, line("all", f"{total:,}", "", f"{trained:,}") + f" ({trained / total:.1%})"])


def class_counts(problem: tasks.Problem):
    """[T, K], how many examples of each class clients own, the first `SHOWN`; None for a task without classes."""
    if "label" not in problem.train:
        return None
    labels = np.asarray(problem.train["label"])
    return partition.class_counts(shown(problem.clients), labels, int(labels.max()) + 1)


def shown(clients: Sequence) -> list:
    """The clients that a person is shown: all, or the first of very many."""
    return [clients[client] for client in range(min(len(clients), SHOWN))]


def draw_split(problem: tasks.Problem, workdir: Path) -> None:
    """Draws who owns which data, where there are classes or at most two inputs to draw."""
    train, clients, counts = problem.train, shown(problem.clients), class_counts(problem)
    if counts is not None:
        plots.split_by_class(counts, workdir / "split.png")
    elif {"x", "y"} <= set(train) and train["x"].ndim == 2 and train["x"].shape[1] <= 2:
        plots.split_by_position(train["x"], train["y"], clients, workdir / "split.png")


def draw_prediction(problem: tasks.Problem, params, path: Path) -> None:
    """Draws what the model says of a regression task, or of an equation, with at most two inputs and one output."""
    test = problem.test
    truth = test.get("solution", test.get("y"))
    if truth is None or test["x"].ndim != 2 or test["x"].shape[1] > 2 or truth.size != len(test["x"]):
        return
    found = np.asarray(jax.jit(problem.task.outputs)(params, test)[0]).reshape(-1)
    x = np.asarray(problem.train["x"])
    plots.prediction(test["x"], np.asarray(truth).reshape(-1), found, [x[own] for own in shown(problem.clients)], path)
