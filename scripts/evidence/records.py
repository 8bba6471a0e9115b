"""What is a study? A question, the runs that answer it, and what is made of their figures."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fipa_jax.reporting import curves, metrics

NOTHING: Mapping = MappingProxyType({})
SENT = curves.SENT  # columns of bytes, up and down
IN_A_ROW = 4  # panels of a picture at most


class Run(NamedTuple):
    """A run of `scripts/train.py` for every seed."""

    config: str  # a name in configs/, or NAME:VARIANT
    fields: Mapping[str, Any] = NOTHING  # of the config, that are overridden: {"fipa.rounds": 50}
    seeds: tuple[int, ...] = ()  # () for the study's own
    seeded: tuple[str, ...] = ("seed",)  # fields that take the seed
    start: "Run | None" = None  # the run whose warm-up's last model it begins with, in the round in which that ended


class Benchmark(NamedTuple):
    """A command of `scripts/benchmark.py` for every seed."""

    command: str
    options: tuple[str, ...] = ()  # filled in: {seed}, {configs}, {data}, and {start}, the folder of `start`
    seeds: tuple[int, ...] = ()
    start: Run | None = None
    debug: tuple[str, ...] = ()  # options that make it tiny


Runs = Mapping[str, Run | Benchmark]  # what a study calls them, which is not shown -> runs


class Found(NamedTuple):
    """What the runs of a study have left."""

    runs: dict[str, dict[int, Any]]  # run -> seed -> rows of its metrics file, or a benchmark's figures
    made: list[dict]  # of each run: machine, versions, date and seconds
    missing: list[str]  # one line for each run that failed
    planned: int = 0  # runs, of which `made` are done


class Spread(NamedTuple):
    """A cell of a table: a figure of each seed."""

    values: np.ndarray  # [S]
    show: Callable[[np.ndarray], str]  # `error` or `percent`


class Table(NamedTuple):
    """A table of a page: each row a dictionary of texts and `Spread`s."""

    words: str
    rows: list[dict[str, str | Spread]]


class Size(NamedTuple):
    """A study that is made smaller."""

    words: str  # in which way, for the page
    fields: Mapping[str, Mapping[str, Any]] = NOTHING  # data set -> fields of its runs that are overridden
    seeds: tuple[int, ...] = ()  # () for the study's own
    configs: Mapping[str, str] = NOTHING  # configs that stand in for others
    runs: Runs = NOTHING  # in place of the study's own


def fewer_images(words: str, fields: Mapping[str, Any] = NOTHING, **others) -> Size:
    """A size with a tenth of the training images and 2,000 test images, and further `fields` of such runs."""
    tests = {"cifar10": "test[:2000]", "tiny_imagenet": "validation[:2000]"}
    few = {name: {"data.train_split": "train[:10%]", "data.test_split": test} for name, test in tests.items()}
    words = f"a tenth of the training images and 2,000 test images{words}."
    return Size(words, {name: first | dict(fields) for name, first in few.items()}, **others)


class Study(NamedTuple):
    """What `studies/NAME.py` gives as `STUDY`."""

    words: str  # the file's docstring: a question, and below it what is run and how controls were tuned
    runs: Runs
    tables: Callable[[Found], list[Table]]
    then: Callable[[Found], Runs] | None = None  # further runs, with what the first have tuned
    draw: Callable[[Found, Path], None] | None = None
    caption: str = ""  # of the picture
    seeds: tuple[int, ...] = (0, 1, 2)
    reduced: Size | None = None  # what --size=reduced runs
    data: tuple[str, ...] = ()  # sets that `scripts/prepare_data.py` prepares
    gigabytes: float = 2.0  # of memory that one run takes
    hours: float = 0.1  # about, at full size
    machine: str = "one core"  # of which


def question(study: Study) -> str:
    """What it asks, in one line."""
    return " ".join(study.words.partition("\n\n")[0].split())


def final(found: Found, run: str, method: str, figure: str, *, last: int = 1, rounds: int = 0) -> np.ndarray:
    """[S], a method's figure at its end, of each seed that has it.

    Args:
      last: the mean over so many last evaluations.
      rounds: of the method, after which the figure is taken; 0 for all.
    """
    values = []
    for rows in found.runs.get(run, {}).values():
        mine = [row for row in rows if row["run"] == method]
        if rounds:
            first = mine[0]["round"] if mine else 0
            mine = [row for row in mine if row["round"] < first + rounds]
        series = [row[figure] for row in mine if figure in row]
        if series:
            values.append(np.mean([math.nan if value is None else value for value in series[-last:]]))
    return np.array(values)


def sent(found: Found, run: str, method: str, columns: Sequence[str] = SENT) -> np.ndarray:
    """[S], bytes that a method's clients and server have sent, or those of some columns."""
    mine = [[row for row in rows if row["run"] == method] for rows in found.runs.get(run, {}).values()]
    return np.array([sum(row[column] for row in rows for column in columns) for rows in mine if rows])


def seconds(found: Found, run: str, method: str) -> float:
    """Median seconds of a round's stages without its evaluation, of all rounds of all seeds; NaN where none was run."""
    rows = [row for rows in found.runs.get(run, {}).values() for row in rows if row["run"] == method]
    stages = ("fetch", "train", "sketch", "aggregate")
    each = [sum(row.get(f"seconds_{stage}", 0) for stage in stages) for row in rows]
    return float(np.median(each)) if each else math.nan


def usual_row(found: Found, run: str, method: str, label: str, last: int) -> dict[str, str | Spread]:
    """A row of a table: the mean over a method's last evaluations, what was sent in all, and how long a round took."""
    return {
        "method": label,
        "test accuracy, %": Spread(final(found, run, method, "test_accuracy", last=last), percent),
        "test loss": Spread(final(found, run, method, "test_loss", last=last), number),
        "megabytes up": Spread(sent(found, run, method, ("bytes_up",)) / 1e6, number),
        "up and down": Spread(sent(found, run, method) / 1e6, number),
        "seconds of a round": f"{seconds(found, run, method):.2g}",
    }


def of_average(found: Found, run: str, method: str, last: int) -> dict[str, Spread]:
    """A table's further cells: the figures of the mean of past models (`server.average`)."""
    names = {"accuracy of the average": ("accuracy", percent), "its loss": ("loss", number)}
    return {
        words: Spread(final(found, run, method, f"test_average_{figure}", last=last), show)
        for words, (figure, show) in names.items()
    }


def after_bytes(
    found: Found, run: str, method: str, most: float, last: int, columns: Sequence[str] = SENT
) -> dict[str, Spread]:
    """A table's further cell: the accuracy after the rounds that so many bytes allow on every seed, up and down."""
    each = [[row for row in rows if row["run"] == method] for rows in found.runs[run].values()]
    sizes = [np.cumsum([sum(row[column] for column in columns) for row in rows]) for rows in each if rows]
    rounds = min(int(np.searchsorted(of_seed, most, side="right")) for of_seed in sizes)
    reached = final(found, run, method, "test_accuracy", last=last, rounds=rounds)
    return {f"after {most / 1e6:.3g} MB {'up and down' if len(columns) > 1 else 'up'}": Spread(reached, percent)}


def own_fields(method: str, names: Sequence[str]) -> str:
    """Of a method's fields those of these names, in a table's cell: "nothing" where it has none."""
    fields = [field for field in method.split(":") if field.partition("=")[0] in names]
    return f"`{':'.join(fields)}`" if fields else "nothing"


def best(found: Found, run: str, methods: Iterable[str], figure: str, last: int = 1) -> str:
    """The method with the best mean figure over the seeds of a run made for tuning: geometric for errors.

    One that diverges on any seed is not chosen, unless all do; "" where none was run.
    """

    def score(method):
        values = final(found, run, method, figure, last=last)
        if not values.size or not np.isfinite(values).all():
            return -math.inf
        return values.mean() if metrics.direction(figure) > 0 else -np.log(np.maximum(values, 1e-300)).mean()

    run_ones = [method for method in methods if final(found, run, method, figure).size]
    return max(run_ones, key=score, default="")


def every(tried: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All settings of {label: settings that are tried}."""
    return tuple(itertools.chain.from_iterable(tried.values()))


def chosen(found: Found, run: str, tried: Mapping[str, Sequence[str]], figure: str, last: int = 1) -> dict[str, str]:
    """{label: the best of its settings} by a run made for tuning, of {label: settings that were tried}."""
    return {label: best(found, run, settings, figure, last) for label, settings in tried.items()}


def error(values: np.ndarray) -> str:
    """Of errors over seeds, which may span decades: median, then the lowest and the highest."""
    if not np.isfinite(values).all():
        return f"diverges on {int((~np.isfinite(values)).sum())} of {values.size}"
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{short(middle)} ({short(low)} to {short(high)})" if values.size > 1 else short(middle)


def short(value: float) -> str:
    """A number to two digits: 0.012, 1.8e-11."""
    if value and not 1e-3 <= abs(value) < 1e4:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:.2g}"


def percent(values: np.ndarray) -> str:
    """Of accuracies over seeds: mean and standard deviation, in %."""
    return f"{100 * values.mean():.1f}" + (f" +- {100 * values.std():.1f}" if values.size > 1 else "")


def number(values: np.ndarray) -> str:
    """Of other figures over seeds: mean and standard deviation, unless they are all the same."""
    mean, std = values.mean(), values.std()
    return f"{mean:.3g}" + (f" +- {std:.2g}" if std > 1e-9 * abs(mean) else "")


def draw_lines(
    panels: Mapping[str, Sequence[tuple]], figure: str, path: Path, found: Found, by: Sequence[str] = ()
) -> None:
    """Draws a figure by rounds, one panel for each group of lines, with a band of one standard deviation over seeds.

    Args:
      panels: {title: [(run, method), ...]}, or (run, method, label): lines of one label look alike in all panels.
      figure: name of a column.
      path: of the picture, which is written as PNG and SVG.
      found: what there is.
      by: columns of bytes, whose running sum stands in for the rounds.
    """
    from matplotlib import ticker

    from fipa_jax.reporting import plots

    panels = {
        title: [line for line in lines if final(found, line[0], line[1], figure).size]
        for title, lines in panels.items()
    }
    looks = _looks([line for lines in panels.values() for line in lines])
    rows = math.ceil(len(panels) / IN_A_ROW)
    columns = math.ceil(len(panels) / rows)
    with plots.picture(path, 3.4 * columns, 3.2 * rows, rows, columns) as (picture, axes):
        shown, empty = np.split(axes.ravel(), [len(panels)])
        for axis in empty:
            axis.remove()
        for axis, (title, lines) in zip(shown, panels.items(), strict=True):
            drawn = []
            for run, method, *label in lines:
                line = curves.line(list(found.runs.get(run, {}).values()), method, figure, by)
                x, look = line.x / (1e6 if by else 1), looks[(method, *label)]
                axis.plot(x, line.mean, label=look.label, linewidth=1.7, color=look.color, linestyle=look.dash)
                axis.fill_between(x, line.low, line.high, color=look.color, alpha=0.18, linewidth=0)
                drawn.append(line)
            axis.set(
                title=textwrap.fill(title, 42), xlabel="megabytes" if by else "rounds", ylabel=curves.words_of(figure)
            )
            if metrics.direction(figure) < 0:
                _logarithmic(axis, drawn)
            if "accuracy" in figure:
                axis.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, symbol=""))
            axis.grid(alpha=0.25, linewidth=0.6)
        pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in shown]
        handles = {label: line for line, label in itertools.chain.from_iterable(pairs)}
        curves.legend(picture, list(handles.values()), list(handles))


def _logarithmic(axis, lines: Sequence[curves.Line]) -> None:
    """A logarithmic axis on which one that diverges leaves the panel, instead of making all others flat."""
    shown = [line for line in lines if line.mean.size and np.isfinite(line.mean[0])]
    if shown:
        low = min(np.min(line.low[line.low > 0], initial=np.inf) for line in shown)
        high = max(np.max(line.high[np.isfinite(line.high)], initial=0) for line in shown)
        axis.set_ylim(low / 2, min(2 * high, 10 * np.median([line.mean[0] for line in shown])))
    axis.set_yscale("log")


def _looks(lines: Sequence[tuple]) -> dict[tuple, curves.Look]:
    """{(method,) or (method, label): its look}: by its label where it has one, else by its name."""
    from fipa_jax.reporting import plots

    labels = list(dict.fromkeys(line[2] for line in lines if len(line) > 2))
    colors = itertools.cycle(plots.CLIENTS)
    own = {label: curves.Look(label, color, "-") for label, color in zip(labels, colors, strict=False)}
    by_name = curves.looks(list(dict.fromkeys(line[1] for line in lines if len(line) == 2)))
    return {tuple(line[1:]): own[line[2]] if len(line) > 2 else by_name[line[1]] for line in lines}


def ticks(axis, values) -> None:
    """Marks just these values below an axis: a logarithmic one marks others too, and their names overlap."""
    axis.set_xticks(list(values), labels=[f"{value:g}" for value in values])
    axis.set_xticks([], minor=True)


def legend(axis, **options) -> None:
    """Names an axis's lines, where there are any: of runs that are missing there are none."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**options)
