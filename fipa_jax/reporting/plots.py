"""Pictures of a run: its curves, who owns which data, and what the model says. Needs matplotlib (extra `plots`)."""

import importlib.util
from pathlib import Path

import numpy as np


def check() -> None:
    """Checks that there is matplotlib, without the time that its import takes.

    Raises:
      ImportError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a run draws its curves and needs matplotlib: pip install 'fipa_jax[plots]'")


def pyplot():
    """matplotlib.pyplot, drawing to files; raises as `check` does."""
    check()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as module

    return module


def curves(rows: list[dict], figures: list[str], path: Path) -> None:
    """Draws each figure against the round, one line a method; the warm-up leads into all of them.

    Args:
      rows: of the metrics file.
      figures: names of columns, one panel each; an error or loss that spans a decade on a logarithmic axis.
      path: of the PNG.
    """
    plt = pyplot()
    fig, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.8), squeeze=False, layout="constrained")
    for axis, figure in zip(axes[0], figures, strict=True):
        points = _points(rows, figure)
        _draw_curves(axis, points)
        _style_of_curves(axis, figure, [value for line in points.values() for _, value in line])
    lines, labels = axes[0][0].get_legend_handles_labels()
    if lines:  # below all panels: the names of tuned methods are long
        columns = 1 if max(map(len, labels)) > 30 else len(labels)
        fig.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _points(rows: list[dict], figure: str) -> dict[str, list]:
    """{run: [(round, value), ...]} of the rounds in which a figure has a value."""
    points = {row["run"]: [] for row in rows}
    for row in rows:
        if row.get(figure) is not None:
            points[row["run"]].append((row["round"], row[figure]))
    return points


def _draw_curves(axis, points: dict[str, list]) -> None:
    """Draws the line of each run; those of the methods begin where the warm-up ends."""
    end_of_warmup = points.get("warmup", [])[-1:]
    for run, line in points.items():
        if run == "warmup":
            _draw_line(axis, run, line, color="0.6")
        else:
            _draw_line(axis, run, end_of_warmup + line)


def _draw_line(axis, run: str, line: list, **style) -> None:
    """Draws (round, value) pairs, if there are any; so few that no line shows are marked."""
    if line:
        axis.plot(*zip(*line, strict=True), label=run, marker="." if len(line) < 3 else "", **style)


def _style_of_curves(axis, figure: str, values: list) -> None:
    """Scales and labels a panel of curves, of which all values are given."""
    if "accuracy" not in figure and values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    axis.set(xlabel="round", ylabel=figure.replace("_", " "))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def split_by_class(counts: np.ndarray, path: Path) -> None:
    """Draws how many examples of each class every client owns, from counts [T, K]."""
    plt = pyplot()
    clients, classes = counts.shape
    fig, axis = plt.subplots(figsize=(min(3 + 0.09 * clients, 12), min(2 + 0.18 * classes, 9)), layout="constrained")
    image = axis.imshow(counts.T, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(xlabel="client", ylabel="class")
    fig.colorbar(image, label="examples")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def split_by_position(x: np.ndarray, y: np.ndarray, clients: list[np.ndarray], path: Path) -> None:
    """Draws the clients' examples of a regression task: x [N, 1] against y [N, 1], or x [N, 2] in the plane."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(5, 3.8), layout="constrained")
    on_a_line = x.shape[1] == 1
    vertical = y[:, 0] if on_a_line else x[:, 1]
    for number, indices in enumerate(clients):
        axis.scatter(x[indices, 0], vertical[indices], s=8, label=f"client {number}")
    axis.set(xlabel="x" if on_a_line else "x1", ylabel="y" if on_a_line else "x2")
    axis.spines[["top", "right"]].set_visible(False)
    fig.legend(frameon=False, fontsize="small", loc="outside right upper")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def prediction(x: np.ndarray, truth: np.ndarray, model: np.ndarray, clients: list[np.ndarray], path: Path) -> None:
    """Draws a model of one or two inputs on the test points beside what is true, and the error.

    Args:
      x: [N, 1] or [N, 2], the test points.
      truth, model: [N], the true values and the model's outputs.
      clients: per client, the inputs [N_m, 1] or [N_m, 2] of its examples, of which the extent is drawn.
      path: of the PNG.
    """
    plt = pyplot()
    draw, panels = (_draw_on_a_line, 2) if x.shape[1] == 1 else (_draw_in_the_plane, 3)
    fig, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.6), layout="constrained")
    draw(axes, x, truth, model, clients)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _draw_on_a_line(axes, x, truth, model, clients) -> None:
    """Two panels of functions of one input; where a client's examples end is a dotted line."""
    order = np.argsort(x[:, 0])
    axes[0].plot(x[order, 0], truth[order], color="0.6", linewidth=3, label="truth")
    axes[0].plot(x[order, 0], model[order], label="model")
    axes[0].legend(frameon=False)
    axes[1].plot(x[order, 0], model[order] - truth[order])
    axes[0].set(xlabel="x", title="truth and model")
    axes[1].set(xlabel="x", title="model minus truth")
    for inputs in clients:
        for axis in axes:
            axis.axvline(inputs[:, 0].max(), color="0.8", linestyle=":")


def _draw_in_the_plane(axes, x, truth, model, clients) -> None:
    """Three panels of functions of two inputs, by colour; the extent of each client's examples is a dotted box."""
    plt = pyplot()
    panels = {"truth": truth, "model": model, "model minus truth": model - truth}
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bound = np.abs(values).max() or 1
        size = max(1, 3e4 / len(x))
        image = axis.scatter(
            x[:, 0], x[:, 1], c=values, s=size, marker="s", cmap="RdBu_r", vmin=-bound, vmax=bound, linewidths=0
        )
        axis.figure.colorbar(image, ax=axis)
        axis.set(xlabel="x1", ylabel="x2", title=title)
        for inputs in clients:
            low, high = inputs.min(axis=0), inputs.max(axis=0)
            axis.add_patch(plt.Rectangle(low, *(high - low), fill=False, edgecolor="0.3", linestyle=":"))
