"""How do the compared methods get on? Their curves by rounds or by bytes, over seeds, and the looks of each method.

A method has the same name and colour in every picture, whatever it is compared with and in whatever order.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fipa_jax import files
from fipa_jax.reporting import plots
from fipa_jax.reporting.plots import GREY

WARMUP, START = "warmup", "start"  # runs in the rows that are no method: the first phase, the model before any round
CEILING = "centralised"  # the method that has all data in one place
# method -> (name, colour). The colours are those of Okabe and Ito, then Tol's: told apart by the colour-blind too.
KNOWN = {
    "fipa": ("FIPA", "#0072B2"),
    "fipa_memory": ("FIPA memory", "#56B4E9"),
    "fipa_pinv": ("FIPA pinv", "#332288"),
    "fipa_tikhonov": ("FIPA tikhonov", "#6699CC"),
    "fipa_damped": ("FIPA damped", "#004488"),
    "fedavg": ("FedAvg", "#D55E00"),
    "fedbuff": ("FedBuff", "#B58900"),
    "fedasync": ("FedAsync", "#994F00"),
    "fisher_diagonal": ("Fisher diagonal", "#117733"),
    CEILING: ("centralised", "#333333"),
    WARMUP: ("warm-up", "#9a9a9a"),
}
# Field of `fedavg` -> its value -> what averaging with it is known as.
PUBLISHED = {
    "server.optimizer": {
        "momentum": ("FedAvgM", "#E69F00"),
        "adam": ("FedAdam", "#009E73"),
        "yogi": ("FedYogi", "#999933"),
        "adagrad": ("FedAdagrad", "#661100"),
        "acg": ("FedACG", "#DDAA33"),
        "exp": ("FedExP", "#CC6677"),
    },
    "aggregator.name": {
        "geometric_median": ("geometric median", "#6C8EBF"),
        "krum": ("Krum", "#8C564B"),
        "median": ("median", "#7F7F00"),
        "multi_krum": ("multi-Krum", "#C49C94"),
        "trimmed_mean": ("trimmed mean", "#BCBD22"),
    },
    "term.name": {
        "prox": ("FedProx", "#CC79A7"),
        "scaffold": ("SCAFFOLD", "#9467BD"),
        "dyn": ("FedDyn", "#88CCEE"),
        "moon": ("MOON", "#882255"),
        "rcl": ("FedRCL", "#00A5B5"),
        "logit_adjustment": ("logit adjustment", "#DDCC77"),
        "mifa": ("MIFA", "#AA4499"),
        "varp": ("FedVARP", "#DC267F"),
    },
}
OTHERS = ("#CC79A7", "#44AA99", "#999933", "#AA4499", "#661100")  # for methods of a user's own
SHADES = (-0.35, -0.2, 0.2, 0.35)  # towards black or white: of a method's variations
DASHES: tuple = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
METRICS = {
    "accuracy": "accuracy (%)",
    "mse": "mean squared error",
    "relative_l2": "relative L2 error",
    "calibration_error": "calibration error",
}
BROKEN = (0, (3, 3))  # of the ceiling: what it lies on shows in between
LABEL = 7.5  # points
LINE, LETTERS = 1.3 * LABEL / 72, 18  # inches of height that a name takes; letters of it in an inch
SENT = ("bytes_up", "bytes_down")  # all that travels
TAIL = 3  # a warm-up that is longer than the methods' rounds is shown for a third of theirs


class Look(NamedTuple):
    """How a method looks, in pictures and tables."""

    label: str  # short, and no other method's of the same run
    color: str  # "#rrggbb"
    dash: Any  # matplotlib's line style


class Line(NamedTuple):
    """A figure of a method, evaluation by evaluation, over S seeds."""

    x: np.ndarray  # [E], rounds that are done, or bytes sent by then
    mean: np.ndarray  # [E]; NaN where an evaluation gave no number
    low: np.ndarray  # [E], one standard deviation below, though not below the lowest seed
    high: np.ndarray  # [E], one above, though not above the highest


def looks(names: Sequence[str]) -> dict[str, Look]:
    """{method: its look}, which does not depend on the methods' order.

    The colour is the name's alone: that of the method, and a shade of it for a variation such as
    `fedavg:server.lr=0.5`. Variations of one method have a line style each.

    Example:
      looks(["fipa", "fedavg:server.optimizer=adam"])["fipa"].color

    Args:
      names: as in `config.compare`.
    """
    families: dict[str, list] = {}
    for name in sorted(set(names), key=lambda name: (name.count(":"), name)):
        known, color, rest = _known_as(name)
        families.setdefault(known, []).append((name, color, rest))
    result = {}
    for known, members in families.items():
        labels = _told_apart(known, [rest for _, _, rest in members])
        for place, ((name, color, _), label) in enumerate(zip(members, labels, strict=True)):
            dash = BROKEN if name.partition(":")[0] == CEILING else DASHES[place % len(DASHES)]
            result[name] = Look(label, color, dash)
    return {name: result[name] for name in names}


def _known_as(name: str) -> tuple[str, str, list[str]]:
    """(what a method is known as, its colour, the overrides that this does not say)."""
    base, *overrides = name.split(":")
    label, color = KNOWN.get(base) or (base, OTHERS[_digest(base) % len(OTHERS)])
    for override in overrides if base == "fedavg" else ():
        field, _, value = override.partition("=")
        if value in PUBLISHED.get(field, ()):
            label, color = PUBLISHED[field][value]
            overrides = [other for other in overrides if other != override]
    shade = SHADES[_digest(":".join(overrides)) % len(SHADES)] if overrides else 0.0
    return label, shaded(color, shade), overrides


def _digest(text: str) -> int:
    """A number that is the same in every process, as Python's own hash is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def shaded(color: str, shade: float) -> str:
    """The colour "#rrggbb" mixed with so much white, or with so much black where `shade` is negative."""
    towards = 255 if shade > 0 else 0
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + abs(shade) * (towards - part)):02x}" for part in parts)


def _told_apart(known: str, overrides: list[list[str]]) -> list[str]:
    """Labels of the variations of a method: with as few of their overrides as tell them apart."""
    for count in range(max(map(len, overrides)) + 1):
        labels = [" ".join([known, *rest[:count]]) for rest in overrides]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{known} {place}" for place in range(len(overrides))]


def draw(
    seeds: Sequence[list[dict]],
    figures: Sequence[str],
    path: Path,
    *,
    methods: Sequence[str] = (),
    by_bytes: bool = False,
    training: bool = True,
    width: float = 0.0,
) -> None:
    """Draws each figure of every method, as PNG and SVG: its mean, and a band of one standard deviation over seeds.

    The ceiling is dashed and on top; the last figure of the warm-up, or of the first model, is where all begin.

    Example:
      draw([metrics.read("runs/sine/metrics.jsonl")], ["test_mse"], Path("curves.png"))

    Args:
      seeds: rows of the metrics file of each run; these differ in their seeds alone.
      figures: names of columns, a panel each; an error or loss that spans a decade on a logarithmic axis.
      path: of the pictures; its ending does not matter.
      methods: that are drawn; all for none.
      by_bytes: against what was sent instead of against the rounds.
      training: whether the clients' own figures, on what they train on, are dotted lines.
      width: of the picture in inches; 0 for what the panels need.
    """
    names = methods or list(dict.fromkeys(row["run"] for rows in seeds for row in rows))
    chosen = looks([name for name in names if name not in (WARMUP, START)])
    columns = min(max(len(figures), 1), 3)
    rows_of_panels = -(-len(figures) // columns) or 1
    width = width or (5.6 if columns == 1 else 3.6 * columns)
    with plots.picture(path, width, 3.3 * rows_of_panels, rows_of_panels, columns) as (picture, axes):
        for axis in axes.flat[len(figures) :]:
            axis.set_axis_off()
        for axis, figure in zip(axes.flat, figures, strict=False):
            _draw_panel(axis, seeds, figure, chosen, by_bytes, training)
        if len(figures) == 1 and not by_bytes:  # all lines end together
            _label_lines(axes[0, 0])
        else:
            legend(picture, *axes[0, 0].get_legend_handles_labels())


def start_of(workdir: Path) -> list[dict]:
    """The row of the model before any round, as a run leaves it in start.json; none for one that has not."""
    path = Path(workdir) / "start.json"
    return [files.read_json(path)] if path.is_file() else []


def line(seeds: Sequence[list[dict]], run: str, figure: str, sent: Sequence[str] = ()) -> Line:
    """A figure of one run over the seeds: in the rounds in which all of them that have this run evaluated it.

    Args:
      seeds: rows of each.
      sent: columns, such as `SENT`, of which x is the sum from the run's beginning, on average over the seeds; () for
        rounds.
    """
    found = [points for rows in seeds if (points := _points(rows, run, figure, sent))]
    rounds = sorted(set.intersection(*(set(points) for points in found))) if found else []
    x, values = (np.array([[points[k][part] for k in rounds] for points in found]) for part in (0, 1))  # [S, E]
    if not rounds:
        return Line(*np.zeros([4, 0]))
    with np.errstate(over="ignore", invalid="ignore"):  # of one that diverges
        mean, std = values.mean(axis=0), values.std(axis=0)
    return Line(
        x.mean(axis=0), mean, np.maximum(mean - std, values.min(axis=0)), np.minimum(mean + std, values.max(axis=0))
    )


def _points(rows: list[dict], run: str, figure: str, sent: Sequence[str]) -> dict[int, tuple[float, float]]:
    """{round: (x, value)} of a figure; the value is NaN where an evaluation gave no number."""
    points, total = {}, 0
    for row in rows:
        if row["run"] == run:
            total += sum(row.get(column, 0) for column in sent)
            if figure in row:
                value = np.nan if row[figure] is None else row[figure]
                points[row["round"]] = (total if sent else row["round"] + 1, value)
    return points


def _draw_panel(axis, seeds, figure: str, chosen: dict[str, Look], by_bytes: bool, training: bool) -> None:
    """Draws one figure of all methods, each from where all begin."""
    lines = {name: line(seeds, name, figure, SENT if by_bytes else ()) for name in chosen}
    lines = {name: points for name, points in lines.items() if points.x.size}
    before = _before(seeds, figure, lines.values(), by_bytes)
    beginning = Line(*(part[-1:] for part in before))
    if before.x.size > 1:
        _draw_line(axis, before, Look("", KNOWN[WARMUP][1], "-"), zorder=2)
        above = axis.get_xaxis_transform()
        axis.text(before.x.mean(), 1.01, KNOWN[WARMUP][0], transform=above, color=GREY, fontsize=LABEL, ha="center")
    sent = {name: points.x[-1] for name, points in lines.items() if by_bytes and points.x[-1] > 0}
    if _decades(np.array(list(sent.values()))) > 1:
        axis.set_xscale("log")  # which has no place for where all begin
        for start in beginning.mean:
            axis.axhline(start, color="0.25", linestyle=":", linewidth=0.9, label="start")
        beginning = Line(*np.zeros([4, 0]))
    axis.plot(beginning.x, beginning.mean, "o", color="0.25", markersize=3.5, zorder=6)
    for name, points in lines.items():
        ceiling = name.partition(":")[0] == CEILING
        if by_bytes and name not in sent:  # nothing is, where all data are in one place
            style = {"color": chosen[name].color, "linestyle": chosen[name].dash, "linewidth": 1.1}
            axis.axhline(points.mean[-1], label=chosen[name].label, **style)
            continue
        if training and not by_bytes and not ceiling:
            own = line(seeds, name, f"{figure.replace('test_', 'client_')}_mean")
            axis.plot(own.x, own.mean, color=chosen[name].color, linestyle=":", linewidth=0.9, alpha=0.8)
        _draw_line(axis, _joined(beginning, points), chosen[name], zorder=5 if ceiling else 3)
    _style(axis, figure, [before, *lines.values()], by_bytes)


def _before(seeds, figure: str, lines, by_bytes: bool) -> Line:
    """Where all methods begin, and the warm-up that leads there, or its end where it is longer than they are."""
    if by_bytes:
        start = Line(*(part[-1:] for part in _before(seeds, figure, lines, False)))
        return start._replace(x=0 * start.x)
    whole = _joined(line(seeds, START, figure), line(seeds, WARMUP, figure))
    if not whole.x.size:
        return whole
    length = max((points.x[-1] - whole.x[-1] for points in lines), default=np.inf)
    tail = length if whole.x[-1] - whole.x[0] <= length else length / TAIL
    return Line(*(part[whole.x >= whole.x[-1] - tail] for part in whole))


def _joined(first: Line, second: Line) -> Line:
    """One line after the other."""
    return Line(*map(np.concatenate, zip(first, second, strict=True)))


def _draw_line(axis, points: Line, look: Look, zorder: int) -> None:
    """Draws the mean with its band; points so few that no line shows are marked."""
    marker = "." if np.isfinite(points.mean).sum() < 3 else ""
    width = 1.3 if look.color in (KNOWN[CEILING][1], KNOWN[WARMUP][1]) else 1.9
    style = {"label": look.label, "linestyle": look.dash, "marker": marker, "linewidth": width}
    axis.plot(points.x, points.mean, color=look.color, zorder=zorder, **style)
    if np.any(points.high > points.low) and look.color != KNOWN[CEILING][1]:  # whose band would lie on another's
        style = {"color": look.color, "alpha": 0.18, "linewidth": 0}
        axis.fill_between(points.x, points.low, points.high, zorder=zorder - 1, **style)


def _style(axis, figure: str, lines: list[Line], by_bytes: bool) -> None:
    """Scales and labels a panel."""
    from matplotlib import ticker

    values = np.concatenate([points.mean for points in lines])
    values = values[np.isfinite(values)]
    if "accuracy" in figure:
        axis.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, symbol=""))
    elif _decades(values) > 1:
        axis.set_yscale("log")
    if "accuracy" not in figure and values.size:  # one that diverges would flatten all others
        first = max(points.mean[0] for points in lines if points.mean[:1].size and np.isfinite(points.mean[0]))
        axis.set_ylim(top=min(axis.get_ylim()[1], 10 * first))
    if by_bytes:
        axis.xaxis.set_major_formatter(ticker.EngFormatter(unit="B"))
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True))
    axis.set(xlabel="bytes sent, to and from the clients" if by_bytes else "rounds", ylabel=words_of(figure))
    axis.margins(x=0.01)
    axis.grid(alpha=0.25, linewidth=0.6)


def _decades(values: np.ndarray) -> float:
    """How many powers of ten the values span; 0 where some are not positive, which no logarithm shows."""
    return float(np.log10(values.max() / values.min())) if values.size and values.min() > 0 else 0.0


def words_of(figure: str) -> str:
    """A figure's name in words, for an axis: `test_mse` is "test mean squared error"."""
    for metric, words in METRICS.items():  # also of an average of models, or of a belief: `test_average_mse`
        if figure.endswith(f"_{metric}"):
            return f"{figure.removesuffix(metric).replace('_', ' ')}{words}"
    return figure.replace("_", " ")


def _label_lines(axis) -> None:
    """Writes each line's name beside its end, none over another."""
    labelled = [(line, np.asarray(line.get_ydata(), float)) for line in axis.get_legend_handles_labels()[0]]
    ends = [(line, values[np.isfinite(values)][-1]) for line, values in labelled if np.isfinite(values).any()]
    picture, longest = axis.figure, max((len(line.get_label()) for line, _ in ends), default=0)
    picture.set_size_inches(
        max(picture.get_figwidth(), 3.4 + longest / LETTERS), max(picture.get_figheight(), LINE * len(ends) / 0.8)
    )
    to_panel = axis.transData + axis.transAxes.inverted()
    places = [float(np.clip(to_panel.transform((axis.get_xlim()[1], end))[1], 0, 1)) for _, end in ends]
    gap = LINE / (0.8 * picture.get_figheight())
    for (line, _), place in zip(ends, _pushed_apart(places, gap), strict=True):
        color = shaded(line.get_color(), -0.2) if str(line.get_color()).startswith("#") else line.get_color()
        axis.text(1.01, place, line.get_label(), transform=axis.transAxes, color=color, fontsize=LABEL, va="center")


def _pushed_apart(places: list[float], gap: float) -> list[float]:
    """The places in their order, with a gap at least between each two, and none below the panel's foot, at 0."""
    result, from_the_top = list(places), sorted(range(len(places)), key=places.__getitem__, reverse=True)
    ceiling, floor = np.inf, 0.0
    for place in from_the_top:
        result[place] = min(result[place], ceiling)
        ceiling = result[place] - gap
    for place in reversed(from_the_top):
        result[place] = max(result[place], floor)
        floor = result[place] + gap
    return result


def legend(picture, handles: Sequence, labels: Sequence[str]) -> None:
    """Names lines below a picture's panels, which keep their size: the picture grows by what the names take."""
    if not handles:
        return
    longest = (max(map(len, labels)) + 5) / LETTERS  # inches
    width = max(picture.get_figwidth(), longest)
    columns = max(1, min(len(labels), int(width / longest)))
    picture.set_size_inches(width, picture.get_figheight() + LINE * -(-len(labels) // columns))
    picture.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=LABEL, labelspacing=0.3)
