"""What a person sees of a run: its description, progress line, warnings, tables and pictures.

A round's `info` is for people alone, and ends here: in warnings and in the columns of the metrics file.
"""

import functools
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from fipa_jax import trees
from fipa_jax.aggregate.screening import REASONS
from fipa_jax.aggregate.solvers import FALLBACKS
from fipa_jax.curvature import sketch
from fipa_jax.data import partition
from fipa_jax.reporting import metrics, plots
from fipa_jax.tasks import task as tasks

REPEATS = 10  # times that a kind of warning is written in one phase
SHOWN = 1000  # clients that are drawn, and whose classes are counted
# Fields of `info` that mark clients, besides those left out, and what a warning says of them.
NOTED = {
    "absent": "take no part: nothing of them arrived, or they have no examples",
    "stale": "take no part: their answers have moved by more than aggregator.late.max_drift since they began",
    "capped": "eigenvalues scaled down, their sum being above aggregator.limits.trace_cap times the median client's",
}
CELL = 11  # characters of a figure in the table of methods
WIDTH, NAME = 80, 32  # characters of a line, and of a phase's name in one on its progress
OWNER = 15  # characters of a client's name in a table
BESIDE = 56  # characters of a phase's name, its bar and its times in such a line, as most are
LINE_SECONDS = 30.0  # between two lines on how far a phase is, where there is no terminal


def attempt(what: str, show: Callable, *args: Any) -> Any:
    """What show(*args) returns; an error in it is a warning alone, as no result may hang on how it is shown.

    Args:
      what: is shown, for the warning.
    """
    try:
        return show(*args)
    except Exception as error:
        words = " ".join(str(error).split())
        logging.warning("%s cannot be shown (%s: %.300s); the run goes on", what, type(error).__name__, words)
        return None


class InLines(logging.PythonFormatter):
    """Formats what is logged for a terminal of 80 columns: level and text, without time and place."""

    def format(self, record) -> str:
        """The record's lines, each wrapped; a word that is longer, such as a path, stays whole."""
        lines = f"{record.levelname.lower()}: {record.getMessage()}".splitlines()
        wrap = functools.partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)
        return "\n".join(map(wrap, lines))


class Progress:
    """How far a phase is, on the standard error: a bar on a terminal, else a line now and then.

    The first rounds, in which programs are compiled, do not count for the time that is left. `TQDM_DISABLE=1` turns
    it off.

    Args:
      name: of the phase.
      total: its rounds.
      done: of them, before this run goes on.
    """

    def __init__(self, name: str, total: int, done: int):
        self._name, self._total, self._done, self._lines = shortened(name, NAME), total, done, not sys.stderr.isatty()
        quiet = bool(jax.process_index()) or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        self._quiet, self._said, self._timed, self._unsaid = quiet, -math.inf, None, ""
        form = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._bar = tqdm(
            desc=f"{self._name:<12}", total=total, initial=done, bar_format=form, dynamic_ncols=True, smoothing=0,
            disable=quiet or self._lines,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        self._bar.set_postfix_str("compiling")
        self._say("compiling")
        return self

    def __exit__(self, *_) -> None:
        if self._unsaid:  # it ended before its rounds were over
            self._say(self._unsaid)
        self._bar.close()

    def advance(self, rounds: int, row: dict) -> None:
        """Shows that so many more rounds are done, and the test figures of the last one's row."""
        first, now, figures = self._timed is None, time.monotonic(), progress(row, WIDTH - BESIDE)
        self._done += rounds
        if first:  # time counts from here
            self._timed = now, self._done
            self._bar.unpause()
            self._bar.initial = self._done
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(rounds)
        self._unsaid = figures or "ended"
        if first or self._done >= self._total or now - self._said >= LINE_SECONDS:
            self._say(figures)

    def _say(self, words: str) -> None:
        """A line of its own, where there is no terminal to draw a bar on."""
        if self._quiet or not self._lines:
            return
        self._said, self._unsaid = time.monotonic(), ""
        print(f"{self._name}: {self._done} of {self._total} rounds{self._left()}, {words}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """How long the other rounds will take, in words; nothing where that is not known."""
        if self._timed is None or self._done in (self._timed[1], self._total):
            return ""
        seconds = (time.monotonic() - self._timed[0]) / (self._done - self._timed[1])
        return f", {tqdm.format_interval(seconds * (self._total - self._done))} left"


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else f"{name[: most - 3]}..."


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


def warn(name: str, k: int, info: dict, times: Counter) -> None:
    """Warns of clients that were left out, capped or flagged, and of a round that fell back or was skipped.

    Each kind of warning is written `REPEATS` times at most; all cases are in metrics.jsonl.

    Args:
      name: of the phase.
      k: number of the round.
      info: of the round, on the host.
      times: {kind of warning: how often it occurred in the phase}, which is counted on.
    """
    where = f"{name}, round {k}: "
    for words, clients in _marked(info).items():
        if clients.any():
            _warn_of(words, f"{where}clients {info['ids'][clients].tolist()}: ", times)
    if info.get("fallback"):
        fallback = FALLBACKS[info["fallback"]]
        _warn_of(f"the step was not finite or exploded: {fallback} is taken instead", where, times)
    if info.get("skipped"):
        _warn_of("skipped: too few clients are left, or the parameters would not be finite", where, times)


def _marked(info: dict) -> dict:
    """{what a warning says: [C] bool, the clients of whom it says so}."""
    marked = {f"left out: {REASONS[reason]}": clients for reason, clients in info.get("reasons", {}).items()}
    marked |= {words: info[field] for field, words in NOTED.items() if field in info}
    # A rank beyond the curvature's own is no fault: its surplus pairs are not even sent.
    flags = {flag: clients for flag, clients in info.get("flags", {}).items() if flag not in sketch.EXPECTED}
    return marked | {sketch.FLAGS[flag]: clients for flag, clients in flags.items()}


def _warn_of(words: str, where: str, times: Counter) -> None:
    """Counts a kind of warning, and writes it unless it has been written often enough."""
    times[words] += 1
    if times[words] <= REPEATS:
        last = " (said no more; all cases are in metrics.jsonl)" if times[words] == REPEATS else ""
        logging.warning("%s%s%s", where, words, last)


def figures(info: dict) -> dict:
    """The figures of a round's `info` for its metrics row: its numbers, and how many clients each mark is on."""
    groups = {"flags": "sketches", "reasons": "rejected", "faults": "faults"}
    counts = {"clients_rejected": info["rejected"]} if "rejected" in info else {}
    counts |= {f"clients_{field}": info[field] for field in NOTED if field in info}
    for group, prefix in groups.items():
        counts |= {f"{prefix}_{name}": clients for name, clients in info.get(group, {}).items()}
    row = {key: value for key, value in info.items() if key not in ("ids", "rejected", *NOTED, *groups)}
    return row | {name: int(clients.sum()) for name, clients in counts.items()}


def progress(row: dict, width: int) -> str:
    """The round's test figures, and how long its step was, as many of them as so many characters hold."""
    values = {name.removeprefix("test_"): value for name, value in row.items() if name.startswith("test_")}
    values |= {"step": row.get("step_ratio")}
    line = ""
    for name, value in values.items():
        longer = f"{line}{', ' * bool(line)}{name}={value:.3g}" if value is not None else line
        if len(longer) > width:
            break
        line = longer
    return line


def show_table(summary: dict, compilations: Compilations) -> None:
    """Prints the compared methods side by side, and what was compiled."""
    further = clients_table(summary) + personal_table(summary) + spent(summary)
    print(f"\n{table(summary)}\n{further}\ncompiled {compilations}")


def table(summary: dict) -> str:
    """The compared methods side by side, as printed at the end of a run: each figure's final and best value."""
    runs = summary["runs"]
    found = dict.fromkeys(name for result in runs.values() for name in result["final"])  # not all have a belief, say
    names = [name for name in found if name.startswith(("test_", "holdout_"))]
    most = WIDTH - 2 - max(map(_column, names), default=0)
    cut = {shortened(name, most): result for name, result in runs.items()}
    runs = cut if len(cut) == len(runs) else runs  # else they differ only where they are cut
    width = max(len(name) for name in ["method", *runs])
    return "\n\n".join(_block(runs, width, block) for block in _side_by_side(names, WIDTH - width))


def _side_by_side(names: list[str], width: int) -> list[list[str]]:
    """The table's figures, as many beside each other as so many characters hold; one at least."""
    blocks, left = [[]], width
    for name in names:
        left -= 2 + _column(name)
        if left < 0 and blocks[-1]:
            blocks, left = [*blocks, []], width - 2 - _column(name)
        blocks[-1].append(name)
    return blocks


def _column(name: str) -> int:
    """The characters that a figure takes in the table, its final and its best value side by side."""
    return max(len(name), 2 * CELL)


def clients_table(summary: dict) -> str:
    """Each client's figures on its own test set, as printed at the end of a run; "" where clients are many."""
    text = ""
    for run, result in summary["runs"].items():
        found = metrics.each_client(result["final"])
        for client, figures in found.items():
            if client == next(iter(found)):
                heads = "".join(f"{shortened(name, CELL):>{CELL + 2}}" for name in figures)
                text += f"\n{shortened(run, WIDTH)}\n{'own test set':<{OWNER}}{heads}\n"
            cells = "".join(f"{_number(value):>{CELL + 2}}" for value in figures.values())
            text += f"  {shortened(client, OWNER - 2):<{OWNER - 2}}{cells}\n"
    return text


def personal_table(summary: dict) -> str:
    """The clients' own models, way beside way, as printed at the end of a run; "" where there are none."""
    text = ""
    for run, result in summary["runs"].items():
        above = None
        for metric, way, number, values in metrics.personal(result["final"]):
            if above != (above := (metric, number)):
                whose = f"own models, {number or 'all'} own examples"
                heads = "".join(f"{head:>{CELL + 2}}" for head in (shortened(metric, CELL), "worst tenth", "spread"))
                text += f"\n{shortened(run, WIDTH)}\n{whose:<{NAME}}{heads}\n"
            text += f"  {way:<{NAME - 2}}" + "".join(f"{_number(value):>{CELL + 2}}" for value in values) + "\n"
    return text


def spent(summary: dict) -> str:
    """What each private method has spent, as printed at the end of a run; "" where nothing is private."""
    lines = [
        f"{shortened(run, WIDTH)}\n  has spent epsilon {result['epsilon']:.3g} at delta {result['delta']:g}\n"
        for run, result in summary["runs"].items()
        if "epsilon" in result
    ]
    return "".join(["\n", *lines]) if lines else ""


def _block(runs: dict, width: int, names: list[str]) -> str:
    """The table's columns of these figures; the methods' names take `width` characters."""
    columns = [_column(name) for name in names]
    above = "".join(f"  {name:>{column}}" for name, column in zip(names, columns, strict=True))
    heads = "".join(f"  {'final':>{column - CELL}}{'best':>{CELL}}" for column in columns)
    lines = [" " * width + above, f"{'method':<{width}}" + heads]
    for run_name, result in runs.items():
        pairs = [(_cell(result["final"], name), _cell(result["best"], name)) for name in names]
        cells = [f"  {final:>{c - CELL}}{best:>{CELL}}" for (final, best), c in zip(pairs, columns, strict=True)]
        lines.append(f"{run_name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _cell(figures: dict, name: str) -> str:
    """A figure of a method in the table, or that it has none such."""
    return _number(figures[name]) if name in figures else "-"


def _number(value: float | None) -> str:
    """A figure in the table; nan where an evaluation gave no number."""
    return f"{math.nan if value is None else value:.4g}"


def describe(config: ConfigDict, problem: tasks.Problem, params) -> None:
    """Prints what is about to run: data, clients, parameters and which of them the FIPA phase trains."""
    counts = [len(indices) for indices in problem.clients]
    sizes = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    platform = jax.devices()[0].platform
    print(f"{config.task.name}: {len(counts)} clients with {sizes} examples each, on {platform}")
    if problem.baseline is not None:
        print(baseline(problem.baseline))
    by_class = class_counts(problem)
    if by_class is not None:
        spread = partition.heterogeneity(by_class)
        which = "clients" if len(counts) <= SHOWN else f"the first {SHOWN} clients"
        print(", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in spread.items()) + f" over {which}")
    print(f"\n{parameter_table(params, config.fipa.trainable)}\n")


def baseline(found: tuple[str, dict]) -> str:
    """What a constant answer has on the test set, as a line to compare with."""
    words, values = found
    shown_values = ", ".join(f"test_{name} {value:.3g}" for name, value in values.items())
    return "\n".join(textwrap.wrap(f"to compare with: {words}: {shown_values}", WIDTH))


def parameter_table(params, trainable: str) -> str:
    """A table of how many parameters each layer has, and how many of them the FIPA phase trains.

    Args:
      params: of the model.
      trainable: regular expression for the paths of those that are trained.
    """
    chosen, sizes, trained = trees.select(params, trainable), Counter(), Counter()
    for path, leaf in trees.paths(params).items():
        layer = path.partition("/")[0]
        sizes[layer] += leaf.size
        trained[layer] += leaf.size * (path in chosen)
    total, in_all, width = sizes.total(), trained.total(), max(map(len, ["layer", *sizes]))
    lines = [_line(width, "layer", "parameters", "share", "in FIPA phase")]
    for layer, size in sizes.items():
        part = f"{trained[layer]:,}" if trained[layer] else "-"
        lines.append(_line(width, layer, f"{size:,}", f"{size / total:.1%}", part))
    return "\n".join([*lines, _line(width, "all", f"{total:,}", "", f"{in_all:,}") + f" ({in_all / total:.1%})"])


def _line(width: int, name: str, *cells: str) -> str:
    """A line of the table of parameters, whose first column has `width` characters."""
    return f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells)


def class_counts(problem: tasks.Problem) -> np.ndarray | None:
    """[T, K], how many examples of each class clients own, the first `SHOWN`; None for a task without classes."""
    if "label" not in problem.train:
        return None
    labels = np.asarray(problem.train["label"])
    return partition.class_counts(shown(problem.clients), labels, int(labels.max()) + 1)


def shown(clients: Sequence) -> list:
    """The clients that a person is shown: all, or the first of very many."""
    return [clients[client] for client in range(min(len(clients), SHOWN))]


def draw_split(problem: tasks.Problem, workdir: Path) -> None:
    """Draws who owns which data: by class, by the inputs where there are at most two, else by the target."""
    train, clients, counts, path = problem.train, shown(problem.clients), class_counts(problem), workdir / "split.png"
    if counts is not None:
        plots.split_by_class(counts, path, problem.classes)
    elif {"x", "y"} <= set(train) and train["x"].ndim == 2:
        on_boundary = " inside, u on the boundary" if "boundary" in train else ""
        name = f"right-hand side f{on_boundary}" if "solution" in problem.test else problem.targets[0]
        if train["x"].shape[1] <= 2:
            plots.split_by_position(train["x"], train["y"], clients, path, name)
        else:
            plots.split_by_target(train["y"], clients, path, name)


def draw_prediction(problem: tasks.Problem, params, path: Path) -> None:
    """Draws what the model says of a regression task, or of an equation, beside what is true."""
    test = problem.test
    truth = test.get("solution", test.get("y"))
    if truth is None or test["x"].ndim != 2 or truth.size != len(problem.targets) * len(truth):
        return
    model = np.asarray(jax.jit(problem.task.outputs)(params, test)[0])
    x = np.asarray(problem.train["x"])
    inputs = [x[indices] for indices in shown(problem.clients)]
    truth, model = (np.reshape(values, [len(test["x"]), -1]) for values in (truth, model))
    plots.prediction(test["x"], truth, model, inputs, path, problem.targets)
