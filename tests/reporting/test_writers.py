"""Rows go to the writers that the config names, and are what the libraries themselves read back."""

import ast
import csv
import json
import math
import os
import struct
from pathlib import Path

import jax
import pytest
from helpers.runs import tiny

from fipa_jax.reporting import console, hooks, metrics, writers
from fipa_jax.run import whole_run
from fipa_jax.saving import journal

LIBRARIES = [name for name, kind in writers.WRITERS.items() if kind.needs]
# A warm-up of two rounds, then two methods of three; a file's name is not always the method's.
LAST = {"warmup": 1, "fipa:local.lr=0.1": 4, "fedavg": 4}
RUNS = {name: writers.Run(name, name.replace(":", "_"), last, {"a": {"b": 1}, "c": "x"}) for name, last in LAST.items()}


def made_up(name, k):
    """A row: of all kinds of values, and with columns that come up later."""
    row = {"run": name, "round": k, "test_mse": 1 / (k + 3), "condition": None if k == 3 else 2.0**k, "skipped": k == 1}
    row |= {"spectrum": [1.0, 0.5], "word": "left out", "bytes_up": 10**6 + k}
    return row | ({"client_mse_mean": 0.1 * k} if k == LAST[name] else {})


ROWS = [made_up(name, k) for name in LAST for k in range(0 if name == "warmup" else 2, LAST[name] + 1)]


def is_said(name, k):
    """What a library of curves is to say of a round: {panel: value}."""
    row = {key: value for key, value in made_up(name, k).items() if key not in ("run", "round", "spectrum", "word")}
    return {
        key.replace("_", "/", 1): math.nan if value is None else pytest.approx(float(value))
        for key, value in row.items()
    }


def need(name):
    """Skips where the library of a writer is missing."""
    try:
        writers.check((name,))
    except ImportError as error:
        pytest.skip(str(error))


def curves_of_tensorboard(folder):
    """{run: {round: {tag: value}}}, as TensorBoard reads its event files."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs = {}
    for path in folder.joinpath("tensorboard").iterdir():
        read = module.EventAccumulator(str(path), size_guidance={module.SCALARS: 0}).Reload()
        points = [(event.step, tag, event.value) for tag in read.Tags()["scalars"] for event in read.Scalars(tag)]
        runs[path.name] = {}
        for k, tag, value in points:
            assert tag not in runs[path.name].setdefault(k, {}), "a round is there twice"
            runs[path.name][k][tag] = value
    return {name: runs[run.stem] for name, run in RUNS.items() if run.stem in runs}


def records_of_wandb(path):
    """The records of a run that W&B has written on the disk: framed as in LevelDB's log, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # the rest of a block
            place += 2**15 - place % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, last
            yield Record.FromString(whole)
            whole = b""


def curves_of_wandb(folder):
    """{run: {round: {key: value}}}, by W&B's own records."""
    runs = {}
    for path in folder.joinpath("wandb").glob("offline-run-*/*.wandb"):
        records, lines = list(records_of_wandb(path)), {}
        (name,) = {record.run.display_name for record in records if record.WhichOneof("record_type") == "run"}
        assert name not in runs, "a run is there twice"
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                k = items.pop("_step")
                assert k not in lines, "a round is there twice"
                lines[k] = {key: float(value) for key, value in items.items() if not key.startswith("_")}
        runs[name] = lines
    return runs


def curves_of_mlflow(folder):
    """{run: {round: {metric: value}}}, by MLflow's client."""
    from mlflow import MlflowClient

    client, runs = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"), {}
    experiment = client.get_experiment_by_name("fipa_jax").experiment_id
    for run in client.search_runs([experiment]):
        assert run.info.run_name not in runs, "a run is there twice"
        lines = runs[run.info.run_name] = {}
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                assert name not in lines.setdefault(point.step, {}), "a round is there twice"
                lines[point.step][name] = point.value
        assert all(line.pop("round") == k for k, line in lines.items())
    return runs


CURVES = {"tensorboard": curves_of_tensorboard, "wandb": curves_of_wandb, "mlflow": curves_of_mlflow}


def write(folder, name, rows):
    """Tells a writer of rows, from its opening to its end."""
    writer = writers.WRITERS[name].open(folder, RUNS)
    for row in rows:
        writer.write(row)
    writer.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Without what the environment may say to the libraries, in a folder of the test's own."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_file_has_all_columns_and_the_numbers_exactly(tmp_path):
    write(tmp_path, "csv", ROWS)
    lines = table(tmp_path)
    assert [(line["run"], int(line["round"])) for line in lines] == [(row["run"], row["round"]) for row in ROWS]
    columns = ["run", "round", "test_mse", "condition", "skipped", "bytes_up", "client_mse_mean"]
    for line, row in zip(lines, ROWS, strict=True):
        assert list(line) == columns
        assert (line["client_mse_mean"] == "") == ("client_mse_mean" not in row)
        assert (line["condition"] == "nan") == (row["condition"] is None)
        assert float(line["test_mse"]) == row["test_mse"] and int(line["skipped"]) == row["skipped"]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_read_back_each_round_of_each_method_once_also_after_a_resume(name, tmp_path):
    """A run is stopped in its second method, and goes on a round earlier, from its checkpoint."""
    need(name)
    write(tmp_path, name, ROWS[:4])
    write(tmp_path, name, ROWS)
    curves = CURVES[name](tmp_path)
    assert set(curves) == set(RUNS)
    for run, lines in curves.items():
        assert sorted(lines) == [row["round"] for row in ROWS if row["run"] == run]
        for k, line in lines.items():
            wanted = is_said(run, k)
            assert set(line) == set(wanted)
            assert all(
                line[key] == value or (value is math.nan and math.isnan(line[key])) for key, value in wanted.items()
            )
    assert {path.name for path in tmp_path.iterdir()} == {writers.WRITERS[name].leaves}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named_before_anything_is_done(name, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_installed", lambda module: False)
    packages = list(writers.WRITERS[name].needs.values())
    with pytest.raises(
        ImportError, match=rf"config.writers: '{name}' needs .*pip install {' '.join(packages)} "
    ) as error:
        whole_run.run(tiny(writers=("csv", name)), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_is_no_library(tmp_path, monkeypatch):
    """W&B leaves a folder `wandb`, which Python could take for a package."""
    (tmp_path / "just_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not writers._installed("just_a_folder") and writers._installed("json")


@pytest.mark.parametrize(
    "names, words",
    [(("cvs",), "config.writers: unknown 'cvs'; known: csv, mlflow, tensorboard, wandb"), (("csv", "csv"), "twice")],
)
def test_mistakes_in_the_names(names, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        whole_run.run(tiny(writers=names), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.writers: needs a tuple such as"):
        whole_run.run(tiny(writers=(1,)), tmp_path / "run")


def test_libraries_are_imported_by_their_own_writer_alone():
    top = [
        node
        for node in ast.parse(Path(writers.__file__).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
    assert not names & {module for kind in writers.WRITERS.values() for module in kind.needs}


@pytest.fixture
def told(tmp_path):
    """(rows that were written before) -> a context in which rows are told, with a hook and writers of any name."""

    def begin(before, hook=None, names=()):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
        return hooks.told(tmp_path, names, RUNS, hook)

    return begin


def test_a_hook_is_told_rows_of_before_and_then_each_as_it_comes(told):
    rows = []
    with told(ROWS[:3], rows.append) as tell:
        assert rows == ROWS[:3]
        for n, row in enumerate(ROWS[3:], 4):
            tell(row)
            assert rows == ROWS[:n]


def test_a_hook_cannot_change_a_row(told, tmp_path):
    def spoil(row):
        row["spectrum"].clear()
        row.clear()

    row = made_up("fedavg", 2)
    with told([], spoil, ("csv",)) as tell:
        tell(row)
    assert row == made_up("fedavg", 2) and float(table(tmp_path)[0]["bytes_up"]) == row["bytes_up"]


def test_what_a_hook_raises_is_said_once_and_it_is_called_for_all_rows(told, caplog):
    seen = []

    def fails(row):
        seen.append(row["round"])
        raise KeyError("test_accuracy")

    with told(ROWS[:2], fails) as tell:
        for row in ROWS[2:]:
            tell(row)
    assert seen == [row["round"] for row in ROWS]
    (record,) = caplog.records
    assert "on_row" in record.message and "KeyError: 'test_accuracy'" in record.message


def test_ctrl_c_in_a_hook_ends_the_run_and_closes_the_writers(told, monkeypatch):
    closed = []
    kind = writers.WRITERS["csv"]._replace(open=lambda *_: writers.Writer(print, lambda: closed.append(True)))
    monkeypatch.setitem(writers.WRITERS, "csv", kind)

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), told([], interrupt, ("csv",)) as tell:
        tell(ROWS[0])
    assert closed == [True]


@pytest.mark.parametrize("broken", ["open", "write", "close"])
def test_a_writer_that_fails_is_one_warning_and_left_alone(broken, told, monkeypatch, caplog):
    calls, seen = [], []

    def call(part, *_):
        calls.append(part)
        if part == broken:
            raise OSError("no room")

    def begin(*_):
        call("open")
        return writers.Writer(lambda row: call("write"), lambda: call("close"))

    monkeypatch.setitem(writers.WRITERS, "csv", writers.WRITERS["csv"]._replace(open=begin))
    order = ["open", *(["write"] * len(ROWS)), "close"]
    with told(ROWS[:2], seen.append, ("csv",)) as tell:
        for row in ROWS[2:]:
            tell(row)
    assert seen == ROWS
    assert calls == order[: order.index(broken) + 1]
    (record,) = caplog.records
    assert "config.writers" in record.message and "'csv'" in record.message and "no room" in record.message


def test_only_the_first_process_tells(told, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    rows = []
    with told(ROWS[:2], rows.append, ("csv",)) as tell:
        tell(ROWS[2])
    assert not rows and not (tmp_path / "metrics.csv").exists()


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def no_pictures(monkeypatch):
    """And every program from the cache."""
    for module, name in ((whole_run, "draw_curves"), (console, "draw_split"), (console, "draw_prediction")):
        monkeypatch.setattr(module, name, lambda *_: None)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_a_run_that_is_killed_and_goes_on_has_each_row_once(tmp_path, monkeypatch, no_pictures):
    """Then it is told again, with nothing left to do; then moved aside, with what its writers have left."""
    methods = ("fedavg:server.lr=0.5", "fedavg")
    config = tiny(writers=("csv",), compare=methods, checkpoint={"seconds": 1e6, "keep": 3})
    config.warmup.rounds = 1
    keep, seen, built = journal.Journal.keep, [], whole_run.build(config)
    monkeypatch.setattr(whole_run, "build", lambda _: built)  # once for all, with its compiled programs

    def dying(self, phase, state, row, note, ended):
        keep(self, phase, state, row, note, ended)  # at a phase's end only
        if row["run"] == "fedavg":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "keep", dying)
        with pytest.raises(Killed):
            whole_run.run(config, tmp_path / "run", on_row=seen.append)
    assert seen == metrics.read(tmp_path / "run" / "metrics.jsonl") and seen[-1]["run"] == "fedavg"
    (tmp_path / "run" / "notes.txt").write_text("a stranger's")
    for number_of_writers in (1, 0):  # which may be others as a run goes on
        config.writers = config.writers[:number_of_writers]
        again = []
        whole_run.run(config, tmp_path / "run", on_row=again.append)
        assert again == metrics.read(tmp_path / "run" / "metrics.jsonl")
        places = [(row["run"], row["round"]) for row in again]
        assert places == [("warmup", 0), *((name, k) for name in methods for k in (1, 2))]
        assert [(line["run"], int(line["round"])) for line in table(tmp_path / "run")] == places
    monkeypatch.setattr(whole_run, "run_phases", lambda *_: {})
    whole_run.run(config, tmp_path / "run", "no")
    assert len(table(tmp_path / "run" / "previous-1")) == 5
    assert not (tmp_path / "run" / "metrics.csv").exists() and (tmp_path / "run" / "notes.txt").exists()


def test_a_strangers_file_is_not_written_over(tmp_path, no_pictures):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"would write over 'metrics.csv'"):
        whole_run.run(tiny(writers=("csv",)), tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "mine"
