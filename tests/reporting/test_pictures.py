"""The pictures of a run: what they show, and that a user's own matplotlib stays as it was."""

import copy
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fipa_jax.reporting import curves, plots

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.figure")
SUMMARISE = Path(__file__).resolve().parents[2] / "scripts" / "summarise.py"
METHODS = ["fipa", "fedavg", "fedavg:server.lr=0.5", "fedavg:server.optimizer=adam", "centralised", "fipa_memory"]


def rows_of(values, run="fipa", figure="test_mse", first=0):
    """A row for each value."""
    return [{"run": run, "round": first + k, figure: x, "bytes_up": 10, "bytes_down": 5} for k, x in enumerate(values)]


def svg(path):
    return path.with_suffix(".svg").read_text()


def test_axes_say_in_words_what_they_show():
    """The unit too, of an average of models and of a belief as of the last model."""
    names = ["test_accuracy", "test_average_accuracy", "holdout_belief_calibration_error", "client_loss_std", "damping"]
    assert [curves.words_of(name) for name in names] == [
        "test accuracy (%)",
        "test average accuracy (%)",
        "holdout belief calibration error",
        "client loss std",
        "damping",
    ]


def test_a_method_looks_the_same_in_any_order_and_company():
    looks = curves.looks(METHODS)
    assert looks == curves.looks(METHODS[::-1]) and list(curves.looks(METHODS[::-1])) == METHODS[::-1]
    assert len({look[:2] for look in looks.values()}) == len({look.label for look in looks.values()}) == len(METHODS)
    for name in METHODS:
        assert curves.looks([name])[name].color == looks[name].color
    assert curves.looks(["mine"])["mine"].label == "mine"


def test_variations_of_a_method_share_its_name_and_are_told_apart():
    tuned = [f"fedavg:local.lr={rate}:server.lr=1" for rate in (0.1, 0.2, 0.3)]
    looks = curves.looks([*tuned, "fedavg"])
    assert looks["fedavg"].label == "FedAvg" and looks[tuned[0]].label == "FedAvg local.lr=0.1"
    assert len({look.dash for look in looks.values()}) == 4
    assert curves.looks(tuned[:1])[tuned[0]].label == "FedAvg"


def test_the_line_over_seeds_is_mean_and_deviation_of_their_rows():
    draw = np.random.default_rng(0)
    values = draw.uniform(1, 2, [4, 6])
    seeds = [rows_of(row) for row in values]
    seeds[2] = seeds[2][:5]  # one that is not as far
    line = curves.line(seeds, "fipa", "test_mse")
    mean, std = values[:, :5].mean(axis=0), values[:, :5].std(axis=0)
    np.testing.assert_allclose(line.mean, mean)
    np.testing.assert_allclose(line.low, np.maximum(mean - std, values[:, :5].min(axis=0)))
    np.testing.assert_allclose(line.high, np.minimum(mean + std, values[:, :5].max(axis=0)))
    np.testing.assert_array_equal(line.x, [1, 2, 3, 4, 5])  # rounds that are done
    np.testing.assert_array_equal(curves.line(seeds, "fipa", "test_mse", sent=curves.SENT).x, 15 * line.x)


def test_curves_begin_at_the_first_model_and_the_ceiling_is_dashed_above_all(tmp_path):
    rows = rows_of([4.0], curves.START, first=-1)
    for name, last in (("centralised", 1e-3), ("fipa", 1e-3), ("fedavg", 1e-1)):
        rows += rows_of([1.0, last], name)
    with plots.picture(tmp_path / "picture", 4, 3) as (_, ((axis,),)):
        curves._draw_panel(axis, [rows], "test_mse", curves.looks(["centralised", "fipa", "fedavg"]), False, True)
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert axis.get_yscale() == "log"
    for name in ("FIPA", "FedAvg", "centralised"):
        assert (lines[name].get_xdata()[0], lines[name].get_ydata()[0]) == (0, 4.0)
    assert lines["centralised"].get_linestyle() == "--"
    assert lines["centralised"].get_zorder() > max(lines["FIPA"].get_zorder(), lines["FedAvg"].get_zorder())


def test_labels_beside_lines_do_not_overlap():
    places = curves._pushed_apart([0.5, 0.5, 0.01, 0.0, 0.52, 1.0], 0.1)
    assert np.all(np.diff(sorted(places)) >= 0.1 - 1e-9) and min(places) >= 0
    assert np.argsort(places).tolist() == [3, 2, 1, 0, 4, 5]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("figures", "by_bytes"), [(["test_mse"], False), (["test_mse"], True), (["test_mse"] * 2, False)]
)
def test_many_names_that_are_long_lie_over_no_panel(figures, by_bytes, tmp_path, monkeypatch):
    """As a run has them that tunes: matplotlib warns where panels have no room left, and names are drawn over them."""
    names = [f"fedavg:local.compress.name=few_bits:local.compress.bits={k}:term.name=feedback" for k in range(2, 38)]
    rows = [row for k, name in enumerate(names) for row in rows_of([1.0, 0.5 + k], name)]
    kept = []

    class Kept(matplotlib.figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    curves.draw([rows], figures, tmp_path / "many.png", by_bytes=by_bytes)
    (picture,) = kept
    panel = picture.axes[0].get_window_extent()
    assert panel.height > 0.7 * 3.3 * picture.dpi
    for drawn in picture.legends:
        assert drawn.get_window_extent().y1 <= panel.y0


def test_curves_of_a_run_that_diverged_are_drawn(tmp_path):
    rows = rows_of([1.0, 1e30, None]) + rows_of([1.0, 0.5, 0.2], "fedavg")
    rows += [{"run": "fipa", "round": 0, "test_loss": None, "test_accuracy": 0.1}]
    curves.draw([rows], ["test_mse", "test_loss", "test_accuracy"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    curves.draw([rows], ["test_mse"], tmp_path / "bytes.png", by_bytes=True)
    curves.draw([[]], [], tmp_path / "nothing.png")
    assert ">FedAvg<" in svg(tmp_path / "bytes")  # text is text


@pytest.mark.parametrize("names", [("y",), ("price", "size, standardised")], ids=len)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_picture_of_a_prediction_is_drawn(dim, names, tmp_path):
    rng = np.random.default_rng(dim)
    x, truth = rng.random((9, dim)), rng.random((9, len(names)))
    plots.prediction(x, truth, truth + 0.1, [x[:4], x[4:]], tmp_path / "model.png", names)
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert (f"predicted {name}" in svg(tmp_path / "model")) == (dim == 3 or len(names) > 1)


@pytest.mark.parametrize("clients", [4, 100])
def test_a_split_names_its_classes(clients, tmp_path):
    counts = np.random.default_rng(0).integers(0, 9, [clients, 3])
    plots.split_by_class(counts, tmp_path / "split.png", ["cat", "dog & <b>", "ship"])
    assert ">cat<" in svg(tmp_path / "split") and "dog &amp; &lt;b&gt;" in svg(tmp_path / "split")


@pytest.mark.parametrize("clients", [3, 30])
def test_a_split_of_a_regression_says_what_it_shows(clients, tmp_path):
    draw = np.random.default_rng(0)
    x, y, owned = draw.random((60, 1)), draw.random((60, 1)), np.array_split(np.arange(60), clients)
    plots.split_by_position(x, y, owned, tmp_path / "position.png", "right-hand side f")
    plots.split_by_target(y, owned, tmp_path / "target.png")
    assert ">right-hand side f<" in svg(tmp_path / "position")
    assert f"{clients} clients" in svg(tmp_path / "target")


def test_a_users_own_matplotlib_stays_as_it_was(tmp_path):
    """Back end and settings, also where a picture cannot be drawn; and the same picture is the same file."""
    with matplotlib.rc_context({"font.size": 23.0, "lines.linewidth": 9.0}):
        before = copy.deepcopy(dict(matplotlib.rcParams))
        curves.draw([rows_of([1.0, 0.5])], ["test_mse"], tmp_path / "theirs.png")
        with pytest.raises(ZeroDivisionError), plots.picture(tmp_path / "none.png", 2, 2):
            raise ZeroDivisionError
        assert dict(matplotlib.rcParams) == before
    curves.draw([rows_of([1.0, 0.5])], ["test_mse"], tmp_path / "ours.png")
    assert svg(tmp_path / "theirs") == svg(tmp_path / "ours") and not (tmp_path / "none.png").exists()


def test_runs_of_other_seeds_are_drawn_by_a_command(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        rows = [row for name in METHODS for row in rows_of([2.0 + seed, 1.0], name)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "config.json").write_text(json.dumps({"seed": seed, "cohort": 5 * seed}))
    command = ["summarise.py", *map(str, sorted(tmp_path.glob("run-*"))), f"--plot={tmp_path / 'new' / 'seeds.svg'}"]
    monkeypatch.setattr(sys, "argv", [*command, "--metric=test_mse", "--methods=fipa,fedavg"])
    runpy.run_path(str(SUMMARISE), run_name="__main__")
    said = capsys.readouterr()
    assert "fedavg:server.lr=0.5" in said.out and "differ in more than their seeds: config.cohort\n" in said.err
    drawn = svg(tmp_path / "new" / "seeds")
    assert (tmp_path / "new" / "seeds.png").is_file() and ">FIPA<" in drawn and ">FedAdam<" not in drawn
    monkeypatch.setattr(sys, "argv", [*command, "--metric=test_accuracy"])
    with pytest.raises(SystemExit, match=r"--metric: no \['test_accuracy'\] in these runs; there are: .*test_mse"):
        runpy.run_path(str(SUMMARISE), run_name="__main__")


def test_bytes_are_on_a_logarithmic_axis_where_methods_differ_by_a_decade(tmp_path):
    rows = rows_of([4.0], curves.START, first=-1) + rows_of([1.0, 0.5]) + rows_of([1.0, 0.5], "fedavg")
    rows += [row | {"run": "fipa_memory", "bytes_up": 5000} for row in rows_of([1.0, 0.5])]
    ceiling = "fedavg:pooled=True"  # which sends nothing, and is a line across
    rows += [row | {"run": ceiling, "bytes_up": 0, "bytes_down": 0} for row in rows_of([0.5, 0.25])]
    for names, scale in ((("fipa", "fedavg", ceiling), "linear"), (("fipa", ceiling, "fipa_memory"), "log")):
        with plots.picture(tmp_path / "picture", 4, 3) as (_, ((axis,),)):
            curves._draw_panel(axis, [rows], "test_mse", curves.looks(names), True, True)
        assert axis.get_xscale() == scale and 4.0 in np.concatenate([line.get_ydata() for line in axis.get_lines()])
        (across,) = (line for line in axis.get_lines() if 0.25 in line.get_ydata())
        assert list(across.get_ydata()) == [0.25, 0.25]


def test_no_two_methods_that_are_known_have_one_colour():
    published = [known for values in curves.PUBLISHED.values() for known in values.values()]
    colours = [color.lower() for _, color in (*curves.KNOWN.values(), *published)]
    assert len(set(colours)) == len(colours)
