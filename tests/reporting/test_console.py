"""What a person sees: it fits a terminal and a log file, and no result hangs on it."""

import contextlib
import re

import pytest

from fipa_jax.reporting import console

FIGURES = ("test_loss", "test_accuracy", "holdout_average_calibration_error", "holdout_loss")


def summary(names, figures=FIGURES):
    values = {figure: 10.0 ** (3 * place) for place, figure in enumerate(figures)}
    return {"runs": {name: {"final": values, "best": values} for name in names}}


@pytest.mark.parametrize("names", [("fipa",), ("fipa", "x" * 300), ("m" * 300 + "a", "m" * 300 + "b")])
def test_the_table_fits_80_columns_and_loses_no_figure(names):
    text = console.table(summary(names))
    told_apart = len({name[:20] for name in names}) == len(names)
    if told_apart:
        assert max(map(len, text.splitlines())) <= 80
    for figure in FIGURES:
        assert figure in text
    assert len(re.findall(r"1e\+09", text)) == 2 * len(names)  # the last figure of each method, final and best


def test_a_figure_that_one_method_alone_has_is_shown():
    """Such as its belief's, or those of an average of models, whichever method comes first."""
    of_both, of_one = summary(["a"], ["test_loss"])["runs"]["a"], summary(["a"], ["test_loss", "test_average_loss"])
    for runs in ({"a": of_one["runs"]["a"], "b": of_both}, {"b": of_both, "a": of_one["runs"]["a"]}):
        blocks = console.table({"runs": runs}).replace("\n\n", "\n").splitlines()
        assert any("test_average_loss" in line for line in blocks)
        (line,) = (line for line in blocks if line.startswith("b"))
        assert line.split() == ["b", "1", "1", "-", "-"]


def test_each_clients_own_figures_are_shown_where_they_are_few():
    figures = {f"client_test_{name}": 0.5 for name in ("accuracy_mean", "loss_std")}
    found = {f"client_test_{name}/{client}": 0.25 for client in ("bern", "y" * 99) for name in ("accuracy", "loss")}
    shown = console.clients_table({"runs": {"fipa": {"final": figures | found}}}).splitlines()
    assert [line.split()[1:] for line in shown if line.startswith("  ")] == [["0.25", "0.25"]] * 2
    assert shown[1] == "fipa" and "bern" in shown[3] and max(map(len, shown)) <= 80
    assert console.clients_table({"runs": {"fipa": {"final": figures}}}) == ""


@pytest.mark.parametrize(
    "error", [ValueError("bad\nticks"), OverflowError("1e284"), OSError(28, "full"), KeyError("x")]
)
def test_what_cannot_be_shown_is_a_warning(error, caplog):
    def draw():
        raise error

    assert console.attempt("a picture", draw) is None
    assert "a picture cannot be shown" in caplog.text and type(error).__name__ in caplog.text
    assert console.attempt("three", lambda: 3) == 3
    with pytest.raises(KeyboardInterrupt):
        console.attempt("nothing", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with console.Progress("fipa" * 30, 100, 40) as bar:
        for _ in range(60):
            bar.advance(1, {"test_loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("40 of 100 rounds, compiling") and lines[-1].endswith("100 of 100 rounds, loss=1")
    assert 3 < len(lines) < 60 and all(len(line) <= 80 and "\r" not in line for line in lines)
    assert all(" left, " in line for line in lines[2:-1])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_last_line_is_of_the_last_round_wherever_it_ends(capsys, monkeypatch, error):
    """Before its rounds are over, say as the bytes are spent, or it is stopped."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with contextlib.suppress(KeyboardInterrupt), console.Progress("fipa", 20, 0) as bar:
        for k in range(5):
            bar.advance(1, {"test_loss": 5.0 - k})
        if error:
            raise error
    assert re.match(r"fipa: 5 of 20 rounds.*, loss=1$", capsys.readouterr().err.splitlines()[-1])


def test_progress_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with console.Progress("fipa", 2, 0) as bar:
        bar.advance(2, {})
    assert not capsys.readouterr().err


def test_the_time_that_is_left_does_not_count_the_first_rounds(monkeypatch, capsys):
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
    now = [0.0]
    with console.Progress("fipa", 10, 0) as bar:
        bar._bar._time, bar._bar.start_t, bar._bar.last_print_t = lambda: now[0], 0.0, 0.0
        now[0] += 1000  # of compilation
        bar.advance(1, {"test_a": 1.0})
        now[0] += 2
        bar.advance(1, {"test_a": 1.0})
        rate = bar._bar.format_dict["elapsed"] / (bar._bar.n - bar._bar.initial)
    assert rate == pytest.approx(2, abs=0.5)
    assert "compiling" in capsys.readouterr().err


@pytest.mark.parametrize("width", [0, 5, 24, 80])
def test_figures_of_progress_are_as_many_as_there_is_room_for(width):
    row = {"test_loss": 1.23456, "test_accuracy": None, "test_calibration_error": 0.5, "step_ratio": 2.0, "seed": 1}
    line = console.progress(row, width)
    whole = "loss=1.23, calibration_error=0.5, step=2"
    assert len(line) <= width and whole.startswith(line) and (line == whole or width < len(whole))


def test_what_is_logged_fits_a_terminal():
    record = console.logging.ABSLLogger("x").makeRecord(
        "x", 30, "f.py", 1, "clients %s: %s\nsecond", ([*range(40)], "w" * 90), None
    )
    lines = console.InLines().format(record).splitlines()
    assert lines[0].startswith("warning: clients [0, 1,") and lines[-1] == "second"
    assert all(len(line) <= 80 for line in lines if "w" * 90 not in line)
