"""Pictures of the data and of the model: who owns what, and what the model says. Needs matplotlib.

Figures are matplotlib's objects, drawn to files: the back end and settings of a user's own pictures stay as they are.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fipa_jax import installed
from fipa_jax.files import write

ENDINGS = (".png", ".svg")  # of what is written of every picture
DPI = 300
DATA, GREY = "#0072B2", "#6b6b6b"  # of what is no method
CLIENTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999933", "#882255", "#6b6b6b")
FEW, NAMED, MANY = 40, 40, 3000  # clients drawn as bubbles; classes that are named; points that are drawn one by one
TARGETS = 6  # outputs of which the predictions are drawn
STYLE = {  # matplotlib's settings for these pictures, on top of its defaults
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fipa_jax",  # the same picture is the same file
}


def check() -> None:
    """Checks that there is matplotlib, without the time that its import takes.

    Raises:
      ImportError: it is not installed.
    """
    installed.check("experiments", "a run's pictures", "matplotlib")


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple]:
    """A figure to draw on and its axes [rows, columns], written as PNG and SVG as the block ends.

    Example:
      with picture(folder / "gap.png", 5, 3) as (figure, axes):
        axes[0, 0].plot(x, y)

    Args:
      path: of both, but for the ending.
      width, height: inches.

    Raises:
      ImportError: as `check` does.
    """
    check()
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)
        base = path.with_suffix("") if path.suffix in ENDINGS else path
        for ending in ENDINGS:
            content = io.BytesIO()
            metadata = {"Date": None} if ending == ".svg" else {}
            figure.savefig(content, format=ending[1:], dpi=DPI, bbox_inches="tight", pad_inches=0.06, metadata=metadata)
            write(base.with_name(base.name + ending), content.getvalue())


def split_by_class(counts: np.ndarray, path: Path, names: Sequence[str] = ()) -> None:
    """Draws how many examples of each class every client owns: as bubbles of few clients, as a heat map of many.

    Args:
      counts: [T, K], of T clients and K classes.
      path: of the pictures.
      names: of the classes; their numbers for none.
    """
    clients, classes = counts.shape
    draw = _bubbles if clients <= FEW else _heat_map
    height = min(1.2 + 0.17 * classes, 8)
    with picture(path, 7.2, height) as (figure, axes):
        draw(figure, axes[0, 0], counts)
        axes[0, 0].set(ylim=(classes - 0.5, -0.5), ylabel="" if len(names) else "class")
        if len(names) and classes <= NAMED:
            axes[0, 0].set_yticks(range(classes), [str(name) for name in names])


def _bubbles(figure, axis, counts: np.ndarray) -> None:
    """A disc for each client and class, whose area is the number of examples."""
    clients, classes = np.nonzero(counts)
    width = 72 * min(6 / len(counts), 0.15)  # points
    found = counts[clients, classes]
    axis.scatter(clients, classes, s=width**2 * found / counts.max(), color=DATA, linewidths=0, alpha=0.85)
    axis.set(xlabel=f"client (the largest disc: {counts.max()} examples)", xlim=(-0.7, len(counts) - 0.3))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.2, linewidth=0.5)
    axis.set_axisbelow(True)


def _heat_map(figure, axis, counts: np.ndarray) -> None:
    """A cell for each client and class; the clients are sorted by the class that they have most of."""
    from matplotlib.colors import PowerNorm

    order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    norm = PowerNorm(0.5, vmin=0, vmax=max(counts.max(), 1))
    image = axis.imshow(counts[order].T, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    axis.set(xlabel=f"{len(counts)} clients, sorted by the class that they have most of", xticks=[])
    axis.spines[["top", "right"]].set_visible(True)
    figure.colorbar(image, label="examples", pad=0.01)


def split_by_position(x: np.ndarray, y: np.ndarray, clients: Sequence[np.ndarray], path: Path, name: str = "y") -> None:
    """Draws the clients' examples of a regression task: x [N, 1] against y [N, 1], or x [N, 2] in the plane.

    Args:
      clients: of each, the indices of its examples.
      path: of the pictures.
      name: of y, what it is.
    """
    on_a_line = x.shape[1] == 1
    vertical = y[:, 0] if on_a_line else x[:, 1]
    owner = np.concatenate([np.full(len(indices), number) for number, indices in enumerate(clients)])
    indices = np.concatenate([np.asarray(indices) for indices in clients])
    few = len(clients) <= len(CLIENTS)
    with picture(path, 5.2, 3.4) as (figure, axes):
        axis = axes[0, 0]
        style = {"s": 9, "linewidths": 0, "rasterized": len(indices) > MANY}
        for number in range(len(clients)) if few else ():
            mine = indices[owner == number]
            axis.scatter(x[mine, 0], vertical[mine], color=CLIENTS[number], label=f"client {number}", **style)
        if few:
            figure.legend(loc="outside right upper", markerscale=1.5)
        else:
            image = axis.scatter(x[indices, 0], vertical[indices], c=owner, cmap="viridis", **style)
            figure.colorbar(image, label="client")
        axis.set(xlabel="x" if on_a_line else "x1", ylabel=name if on_a_line else "x2")


def split_by_target(y: np.ndarray, clients: Sequence[np.ndarray], path: Path, name: str = "y") -> None:
    """Draws what each client's examples say of y [N, 1]: median, middle half and middle nine tenths, in their order."""
    quantiles = np.array([np.quantile(y[indices, 0], (0.05, 0.25, 0.5, 0.75, 0.95)) for indices in clients])
    quantiles = quantiles[np.argsort(quantiles[:, 2])]
    place = np.arange(len(quantiles))
    with picture(path, 5.2, 3.0) as (_, axes):
        axis, thick = axes[0, 0], float(np.clip(200 / len(place), 1.5, 9))
        axis.vlines(place, quantiles[:, 0], quantiles[:, 4], color=DATA, linewidth=thick / 5, label="middle 90 %")
        axis.vlines(
            place, quantiles[:, 1], quantiles[:, 3], color=DATA, linewidth=thick, alpha=0.6, label="middle half"
        )
        axis.plot(place, quantiles[:, 2], "o", color="black", markersize=thick / 2, label="median")
        axis.set(xlabel=f"{len(place)} clients, sorted by their median", ylabel=name, xticks=[])
        axis.figure.legend(loc="outside lower center", ncols=3)


def prediction(
    x: np.ndarray,
    truth: np.ndarray,
    model: np.ndarray,
    clients: list[np.ndarray],
    path: Path,
    names: Sequence[str] = ("y",),
) -> None:
    """Draws a model on the test points beside what is true.

    One output is drawn over one or two inputs; of more inputs or outputs it is the true values against the predicted.

    Args:
      x: [N, d], the test points.
      truth, model: [N, K], the true values and the model's outputs.
      clients: per client, the inputs [N_m, d] of its examples, of which the extent is drawn.
      path: of the pictures.
      names: of the K outputs, of which the first `TARGETS` are drawn.
    """
    if x.shape[1] > 2 or len(names) > 1:
        names = names[:TARGETS]
        columns = min(len(names), 3)
        rows = -(-len(names) // columns)
        with picture(path, 3.6 * columns, 3.4 * rows, rows, columns) as (figure, axes):
            for axis in axes.flat[len(names) :]:
                axis.set_axis_off()
            for axis, name, true, predicted in zip(axes.flat, names, truth.T, model.T, strict=False):
                _draw_against_truth(axis, true, predicted, name)
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center")
        return
    draw, panels = (_draw_on_a_line, 2) if x.shape[1] == 1 else (_draw_in_the_plane, 3)
    with picture(path, 3.4 * panels, 2.9, 1, panels) as (_, axes):
        draw(axes[0], x, truth[:, 0], model[:, 0], clients)


def _draw_against_truth(axis, truth, model, name) -> None:
    """A point for each test example; a perfect model's lie on the diagonal."""
    both = np.concatenate([truth, model[np.isfinite(model)]])
    ends = [both.min(), both.max()]
    axis.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="predicted = true", zorder=3)
    axis.scatter(truth, model, s=10, color=DATA, alpha=0.5, linewidths=0, rasterized=len(truth) > MANY)
    error, spread = np.sqrt(np.mean((model - truth) ** 2)), np.std(truth)
    title = f"root mean squared error {error:.3g}\nstandard deviation {spread:.3g}"
    axis.set(xlabel=f"true {name}", ylabel=f"predicted {name}", aspect="equal", title=title)


def _draw_on_a_line(axes, x, truth, model, clients) -> None:
    """Two panels of functions of one input; where a client's examples end is a dotted line."""
    order = np.argsort(x[:, 0])
    axes[0].plot(x[order, 0], truth[order], color="0.65", linewidth=3, label="truth")
    axes[0].plot(x[order, 0], model[order], color=DATA, label="model")
    axes[1].axhline(0, color="0.65", linewidth=0.8)
    axes[1].plot(x[order, 0], model[order] - truth[order], color=DATA)
    axes[0].set(xlabel="x", ylabel="u or y", title="truth and model")
    axes[1].set(xlabel="x", title="model minus truth")
    for inputs in clients:
        for axis in axes:
            axis.axvline(inputs[:, 0].max(), color="0.8", linestyle=":", zorder=0)
    axes[0].figure.legend(loc="outside lower center", ncols=2)


def _draw_in_the_plane(axes, x, truth, model, clients) -> None:
    """Three panels of functions of two inputs, by colour; the extent of each client's examples is a dotted box."""
    from matplotlib.patches import Rectangle

    panels = {"truth": truth, "model": model, "model minus truth": model - truth}
    of_both = np.abs(truth).max() or 1
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bound = of_both if title != "model minus truth" else np.abs(values).max() or 1
        size = max(1, 2.4e4 / len(x))
        image = axis.scatter(
            x[:, 0], x[:, 1], c=values, s=size, marker="s", cmap="RdBu_r", vmin=-bound, vmax=bound, linewidths=0,
            rasterized=True,
        )  # fmt: skip
        axis.figure.colorbar(image, ax=axis)
        axis.set(xlabel="x1", ylabel="x2", title=title)
        for inputs in clients:
            low, high = inputs.min(axis=0), inputs.max(axis=0)
            axis.add_patch(Rectangle(low, *(high - low), fill=False, edgecolor="0.3", linestyle=":"))
