"""Figures of several runs: what diverged shows, what was stopped is named, and nothing counts twice."""

import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
VALUES = {0: [0.5, 0.25], 1: [0.75, 0.5]}  # seed -> of each round


def write(folder, seed, **changes):
    """A run of two methods, with the figures of `VALUES` or others."""
    folder.mkdir()
    methods = {"fedavg": VALUES[seed], "fipa": VALUES[seed]} | changes
    rows = [{"run": run, "round": k, "test_mse": x} for run, values in methods.items() for k, x in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


class Done(NamedTuple):
    """What a call has printed, and its one line of error."""

    stdout: str
    stderr: str
    error: str | None


@pytest.fixture
def summarise(monkeypatch, capsys):
    """(arguments) -> what the script makes of them."""

    def call(*given):
        monkeypatch.setattr(sys, "argv", ["summarise.py", *given])
        error = None
        try:
            runpy.run_path(str(ROOT / "scripts/summarise.py"), run_name="__main__")
        except SystemExit as left:
            error = left.code
        return Done(*capsys.readouterr(), error)

    return call


def test_a_run_that_diverged_is_not_a_number_and_the_others_are(summarise, tmp_path):
    done = summarise(write(tmp_path / "0", 0, fedavg=[0.5, None]), write(tmp_path / "1", 1))
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:]}
    assert done.error is None
    assert rows["fedavg"][2:6] == ["nan"] * 4
    found = [0.25, 0.5]
    wanted = [np.median(found), np.mean(found), np.std(found), max(found)]
    assert [float(x) for x in rows["fipa"][2:6]] == pytest.approx(wanted)


def test_runs_of_unlike_lengths_are_named(summarise, tmp_path):
    done = summarise(write(tmp_path / "0", 0, fipa=[0.5]), write(tmp_path / "1", 1))
    assert done.error is None and "the runs of 'fipa' differ in their rounds: 1 in" in done.stderr
    assert "'fedavg'" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{0}"], "a folder is given twice"),
        (["--last=0"], "--last: needs at least 1"),
        (["--last=-1"], "--last: needs at least 1"),
        (["--figures=nope"], "--figures: no row has a figure"),
    ],
)
def test_what_would_say_nothing_is_refused(options, words, summarise, tmp_path):
    folder = write(tmp_path / "0", 0)
    done = summarise(folder, *[option.format(folder) for option in options])
    assert words in done.error


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "{", "config.json is no JSON"),
        ("start.json", "", "start.json is no JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl: line 1 is no row of metrics: it needs a run and a round"),
    ],
)
def test_a_file_that_is_broken_is_named(summarise, tmp_path, file, content, said):
    folders = [write(tmp_path / str(seed), seed) for seed in VALUES]
    (tmp_path / "0" / file).write_text(content)
    assert said in summarise(*folders).error


@pytest.mark.parametrize("option", ["--rounds=0", "--seconds=nan", "--width=-3", "--megabytes=-1"])
def test_limits_and_widths_are_above_zero(summarise, tmp_path, option):
    error = summarise(write(tmp_path / "0", 0), option).error
    assert error.startswith(f"error: {option.partition('=')[0]}: needs a number above 0")


def test_a_run_that_wrote_no_row_is_named(summarise, tmp_path):
    folders = [write(tmp_path / str(seed), seed) for seed in VALUES]
    (tmp_path / "1" / "metrics.jsonl").write_text("")
    assert "0 in" in summarise(*folders).stderr


def test_what_is_no_number_is_not_drawn(summarise, tmp_path):
    error = summarise(write(tmp_path / "0", 0), f"--plot={tmp_path / 'drawn'}", "--metric=run").error
    assert error.startswith("error: --metric: no ['run'] in these runs; there are: round, test_mse")
