"""The script as a user starts it: what a run leaves behind, and what a mistake says."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from helpers.runs import tiny

from fipa_jax.curvature.sketch import FLAGS
from fipa_jax.reporting import metrics
from fipa_jax.run import whole_run

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("fipa", "fedavg:server.lr=0.5:trainable=Dense_1/")
TINY = (
    "--config.task.examples_per_client=8",
    "--config.model.widths=(3,)",
    "--config.fipa.local.optimizer=sgd",
    "--config.fipa.local.matched=False",
    "--config.fipa.aggregator.trust=False",
    "--config.rounds_per_call=1",
    "--config.fipa.sketch.rank=3",
    "--config.fipa.rounds=2",
)


def train(*flags, folder):
    """Runs the script without standard input; returns the finished process."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), *flags]
    # The tests' own flags, such as four devices, are not a user's.
    not_theirs = ("XLA_FLAGS", "TFDS_DATA_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in not_theirs}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # half of the time that compiling takes
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run twice into one directory, by the default config and work directory, and what the second printed."""
    folder = tmp_path_factory.mktemp("train")
    for _ in range(2):
        result = train(*TINY, "--config.warmup.rounds=1", f"--config.compare={METHODS}", "--resume=no", folder=folder)
        assert result.returncode == 0, result.stderr
    return folder / "runs/sine", folder / "runs/sine/previous-1", result


def figures(row):
    """What of a row does not depend on the machine's speed."""
    return {name: value for name, value in row.items() if not name.startswith("seconds_")}


def test_what_was_compiled_once_comes_from_the_cache(runs):
    said = re.search(r"compiled (\d+) programs in [\d.]+ s, (\d+) of them from the cache in (.+)", runs[2].stdout)
    assert said[1] == said[2] and int(said[1]) > 10
    assert said[3] == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_a_row_for_every_round_of_every_run(runs):
    rows = metrics.read(runs[0] / "metrics.jsonl")
    fipa, fedavg = METHODS
    assert [(row["run"], row["round"]) for row in rows] == [
        ("warmup", 0), (fipa, 1), (fipa, 2), (fedavg, 1), (fedavg, 2),
    ]  # fmt: skip
    for row in rows:
        assert {"test_mse", "step_ratio", "bytes_up", "bytes_down", "clients_rejected", "seconds_train"} <= set(row)
        assert row["test_mse"] > 0 and row["clients_rejected"] == 0
    assert {"spectrum", "condition", "effective_rank", "captured", "sketches_indefinite"} <= set(rows[1])
    assert 0 < rows[1]["captured"] <= 1 and rows[1]["sketches_not_finite"] == 0


def test_bytes_are_those_of_what_is_sent(runs):
    """Two clients, float64, 10 parameters: an update each, and for FIPA three eigenpairs and what the report says of

    them: residuals, products, whether they converged, the trace and its error, and its flags. One layer is four.
    """
    rows = {row["run"]: row for row in metrics.read(runs[0] / "metrics.jsonl")}
    report = 3 * 8 + 4 + 1 + 2 * 8 + len(FLAGS)
    assert [rows[name]["bytes_down"] for name in ("warmup", *METHODS)] == [2 * 8 * 10, 2 * 8 * 10, 2 * 8 * 4]
    assert [rows[name]["bytes_up"] for name in ("warmup", *METHODS)] == [160, 160 + 2 * (8 * 3 * (10 + 1) + report), 64]


def test_summary_names_every_rule_with_its_figures_and_config(runs):
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert list(summary) == ["runs"]
    assert list(summary["runs"]) == list(METHODS)
    rows = metrics.read(runs[0] / "metrics.jsonl")
    for name, result in summary["runs"].items():
        assert set(result) == {"final", "best", "config"}
        series = [row["test_mse"] for row in rows if row["run"] == name]
        assert (result["final"]["test_mse"], result["best"]["test_mse"]) == (series[-1], min(series))
        assert result["config"]["compare"] == [name]
    assert summary["runs"][METHODS[1]]["config"]["fipa"]["server"]["lr"] == 0.5


def test_config_and_pictures_are_there(runs):
    config = json.loads((runs[0] / "config.json").read_text())
    assert config["fipa"]["rounds"] == 2 and config["compare"] == list(METHODS)
    for name in ("curves.png", "split.png"):
        image = pytest.importorskip("PIL.Image").open(runs[0] / name)
        image.verify()
        assert min(image.size) > 300
    page = (runs[0] / "report.html").read_text()
    stems = ["curves", "bytes", "split", *(path.stem for path in runs[0].glob("f*.msgpack"))]
    assert page.count('<img src="data:image/svg+xml;base64,') == len(stems) == 5
    assert all((runs[0] / f"{stem}.svg").is_file() for stem in stems)
    start = json.loads((runs[0] / "start.json").read_text())
    assert start["round"] == -1 and start["test_mse"] > 0


def test_the_same_seed_gives_the_same_figures_and_the_first_run_is_kept(runs):
    second, first, _ = runs
    assert [figures(row) for row in metrics.read(second / "metrics.jsonl")] == [
        figures(row) for row in metrics.read(first / "metrics.jsonl")
    ]
    names = [sorted(path.name for path in folder.iterdir() if path != first) for folder in (first, second)]
    assert names[0] == names[1]
    assert {"warmup.msgpack", "fipa.msgpack", "fedavg_server.lr-0.5_trainable-Dense_1_.msgpack"} <= set(names[0])


def test_what_the_user_sees(runs):
    result = runs[2]
    for name in METHODS:
        assert name in result.stdout
    assert "test_mse" in result.stdout and "runs/sine" in result.stdout
    assert "moved to" in result.stderr, "a second run says where the first one's files went"
    assert "initialize backend" not in result.stderr, "the libraries' own reports are not shown"


def test_a_mistake_leaves_an_earlier_run_where_it_is(runs):
    """In this process: what the script says of mistakes is told in `test_mistakes`."""
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()}
    config = tiny()
    config.fipa.sketch.rank = 99
    for resume in ("yes", "no", "anyway"):
        with pytest.raises(ValueError, match="rank"):
            whole_run.run(config, runs[0], resume)
    assert {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "given",
    [("--process=1",), ("--coordinator=localhost:1",), ("--coordinator=auto", "--processes=2")],
    ids=" ".join,
)
def test_flags_of_processes_come_together(given, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("train")
    with flagsaver.flagsaver():
        flags.FLAGS(["train.py", *given])
        with pytest.raises(SystemExit, match=r"^error: --coordinator=.*, --processes and --process come together"):
            script.join()


@pytest.mark.parametrize("flag", [["--resume=no"], ["-resume", "no"], []])
def test_the_page_names_the_command_that_goes_on(flag):
    """With --resume=no it would move the run aside."""
    found = whole_run._goes_on_by(["scripts/train.py", "--config=sine", *flag, "--workdir=runs/a b"])
    assert found == "python scripts/train.py --config=sine '--workdir=runs/a b'"
    assert not whole_run._goes_on_by(["mine.py", *flag])
