"""Pictures of a run: its curves, and who owns which data. Needs matplotlib (`pip install 'fipa_jax[plots]'`)."""

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
    """Draws each figure against the round, one line a compared run; the warm-up leads into all of them.

    Args:
      rows: of the metrics file.
      figures: names of columns, one panel each; an error or loss that spans a decade on a logarithmic axis.
      path: of the PNG.
    """
    plt = pyplot()
    fig, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.8), squeeze=False, layout="constrained")
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for axis, figure in zip(axes[0], figures, strict=True):
        points = {run: [] for run in runs}
        for row in rows:
            if row.get(figure) is not None:
                points[row["run"]].append((row["round"], row[figure]))
        before = points.get("warmup", [])[-1:]
        for run in runs:
            line = points[run] if run == "warmup" else before + points[run]
            if line:
                style = {"color": "0.6"} if run == "warmup" else {}
                axis.plot(*zip(*line, strict=True), label=run, marker="." if len(line) < 3 else "", **style)
        values = [value for line in points.values() for _, value in line]
        if "accuracy" not in figure and values and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
        axis.set(xlabel="round", ylabel=figure.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    lines, labels = axes[0][0].get_legend_handles_labels()
    if lines:  # below all panels: the names of tuned methods are long
        columns = 1 if max(map(len, labels)) > 30 else len(labels)
        fig.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    fig.savefig(path, dpi=150)
    plt.close(fig)


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
    for number, indices in enumerate(clients):
        horizontal, vertical = (x[indices, 0], y[indices, 0]) if x.shape[1] == 1 else (x[indices, 0], x[indices, 1])
        axis.scatter(horizontal, vertical, s=8, label=f"client {number}")
    axis.set(xlabel="x" if x.shape[1] == 1 else "x1", ylabel="y" if x.shape[1] == 1 else "x2")
    axis.spines[["top", "right"]].set_visible(False)
    fig.legend(frameon=False, fontsize="small", loc="outside right upper")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def prediction(x: np.ndarray, y: np.ndarray, found: np.ndarray, clients: list[np.ndarray], path: Path) -> None:
    """Draws a model of one or two inputs on the test points beside what is true, and the error.

    Args:
      x: [N, 1] or [N, 2], the test points.
      y, found: [N], the truth and the model's outputs.
      clients: per client, the inputs [n, d] of its own examples, of which the extent is drawn.
      path: of the PNG.
    """
    plt = pyplot()
    panels = 2 if x.shape[1] == 1 else 3
    fig, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.6), layout="constrained")
    if x.shape[1] == 1:
        order = np.argsort(x[:, 0])
        axes[0].plot(x[order, 0], y[order], color="0.6", linewidth=3, label="truth")
        axes[0].plot(x[order, 0], found[order], label="model")
        axes[0].legend(frameon=False)
        axes[1].plot(x[order, 0], found[order] - y[order])
        axes[0].set(xlabel="x", title="truth and model")
        axes[1].set(xlabel="x", title="model minus truth")
        for own in clients:
            for axis in axes:
                axis.axvline(own[:, 0].max(), color="0.8", linestyle=":")
    else:
        panels = {"truth": y, "model": found, "model minus truth": found - y}
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            bound = np.abs(values).max() or 1
            size = max(1, 3e4 / len(x))
            image = axis.scatter(
                x[:, 0], x[:, 1], c=values, s=size, marker="s", cmap="RdBu_r", vmin=-bound, vmax=bound, linewidths=0
            )
            fig.colorbar(image, ax=axis)
            axis.set(xlabel="x1", ylabel="x2", title=title)
            for own in clients:
                low, high = own.min(axis=0), own.max(axis=0)
                axis.add_patch(plt.Rectangle(low, *(high - low), fill=False, edgecolor="0.3", linestyle=":"))
    fig.savefig(path, dpi=150)
    plt.close(fig)
