"""Studies: their records fit together, their runs are done once and go on, and their pages say what there is."""

import argparse
import contextlib
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "studies").glob("*.py"))
# Stands in for scripts/train.py: two rounds of one method; the seed 1 fails until there is a file `mended`.
TRAIN = """
import json, pathlib, sys
given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
folder, seed = pathlib.Path(given["workdir"]), int(given["config.seed"])
if seed == 1 and not (pathlib.Path(__file__).parent / "mended").exists():
    sys.exit("error: config.seed: this one is broken")
with (pathlib.Path(__file__).parent / "log").open("a") as log:
    log.write(f"{folder.name} {given.get('config.init_from', '')}\\n")
rows = [{"run": "fipa", "round": k, "test_mse": 0.1 ** (k + seed), "bytes_up": 5, "seconds_train": 1.0} for k in (0, 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "origin.json").write_text(json.dumps({"code": {"fipa_jax": "9.9", "jax": "1"}}))
"""


@pytest.fixture
def evidence(monkeypatch):
    """The modules, found as the script finds them."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return argparse.Namespace(
        **{name: importlib.import_module(f"evidence.{name}") for name in ("records", "running", "page")}
    )


def study_of(name):
    return runpy.run_path(str(ROOT / "studies" / f"{name}.py"))["STUDY"]


# It takes a quarter of the seconds of all.
LARGEST = pytest.param("few_bytes", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [LARGEST if name == "few_bytes" else name for name in NAMES])
def test_a_record_fits_together(name, evidence):
    """Its configs, fields and sizes exist; who begins with another's model comes later."""
    study, records, running = study_of(name), evidence.records, evidence.running
    for size in ("reduced", "debug"):
        options = running.Options(size=size)
        jobs = running.jobs_of(study, running.runs_of(study, options), options)
        before = set()
        for job in jobs:
            assert job.after is None or job.after in before
            before.add(job.folder)
        assert len(before) == len(jobs) and all(job.rounds for job in jobs)
    for size in ("full", "reduced"):
        runs = running.runs_of(study, running.Options(size=size))
        running.check(study, runs, running.Options(size=size))
        assert study.tables(records.Found({run: {} for run in runs}, [], []))
    nothing = records.Found({run: {} for run in study.runs}, [], [])
    assert all(isinstance(table, records.Table) for table in study.tables(nothing))
    if study.then:
        assert not study.then(nothing), "there is nothing that was tuned"
    assert records.question(study).endswith("?")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_is_nothing_else(name, evidence):
    """At no size does a run that others begin with compare methods."""
    study, running = study_of(name), evidence.running
    for size in ("full", "reduced"):
        options = running.Options(size=size)
        jobs = running.jobs_of(study, running.runs_of(study, options), options)
        others = {job.after for job in jobs if job.command[0].endswith("train.py")} - {None}
        for job in jobs:
            assert job.folder not in others or "--config.fipa.rounds=0" in job.command


@pytest.fixture
def pretended(evidence, monkeypatch, tmp_path):
    """A study of the sine task, whose runs are pretended: two begin with the same warm-up."""
    records = evidence.records
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(evidence.running, "SCRIPTS", tmp_path)
    warm = records.Run("sine", {"warmup.rounds": 1, "fipa.rounds": 0}, seeds=(0,))
    fields = {"fipa.rounds": 2, "compare": ("fipa",)}
    runs = {
        "one": records.Run("sine", fields, start=warm),
        "other": records.Run("sine", fields | {"fipa.sketch.rank": 5}, seeds=(0,), start=warm),
    }

    def tables(found):
        cells = {run: records.Spread(records.final(found, run, "fipa", "test_mse"), records.error) for run in runs}
        return [records.Table("Errors.", [cells])]

    return records.Study("Is it so?\n\nTwo halves.\n", runs, tables, seeds=(0, 1))


def test_runs_are_done_once_and_go_on(pretended, evidence, tmp_path):
    """What fails is missing and ends nothing else; the same again does what is missing alone."""
    running, options = evidence.running, evidence.running.Options(folder=tmp_path / "runs")
    jobs = running.jobs_of(pretended, pretended.runs, options)
    assert [job.runs for job in jobs] == [(), ("one",), ("one",), ("other",)]
    missing = running.run(jobs, 2, "pretended")
    assert missing == ["one, seed 1: exit status 1: error: config.seed: this one is broken"]
    log = tmp_path / "log"
    assert len(log.read_text().splitlines()) == 3 and log.read_text().count("warmup.msgpack") == 2
    (tmp_path / "mended").touch()
    assert running.run(jobs, 2, "pretended") == []
    assert len(log.read_text().splitlines()) == 4
    found = running.collect(jobs, [])
    assert sorted(found.runs["one"]) == [0, 1] and [made["seconds"] for made in found.made] == [2.0] * 4


def test_a_run_that_a_study_names_twice_is_done_once_and_counts_for_both(pretended, evidence, tmp_path):
    """As where another split for each seed begins with the split of all."""
    running, options = evidence.running, evidence.running.Options(folder=tmp_path / "runs")
    runs = pretended.runs | {"again": pretended.runs["one"]._replace(seeds=(0,))}
    jobs = running.jobs_of(pretended, runs, options)
    assert [job.runs for job in jobs] == [(), ("one", "again"), ("one",), ("other",)]
    running.run(jobs, 2, "pretended")
    found = running.collect(jobs, [])
    assert found.runs["again"] == {0: found.runs["one"][0]} and len(found.made) == 3


def test_the_page_keeps_what_a_person_wrote(pretended, evidence, tmp_path):
    """The study's part is written anew; numbers stand in the table and, of every seed, in the file beside it."""
    running, page, docs = evidence.running, evidence.page, tmp_path / "docs"
    jobs = running.jobs_of(pretended, pretended.runs, running.Options(folder=tmp_path / "runs"))
    (docs / "results").mkdir(parents=True)
    (docs / "results" / "so.md").write_text("# So\n\nA word before.\n")
    page.write("so", pretended, running.collect(jobs, []), "study.py so", docs, "full")
    text = (docs / "results" / "so.md").read_text()
    assert "Not run yet" in text and "A word before." in text
    (docs / "results" / "so.md").write_text(f"{text}\nA word after.\n")
    missing = running.run(jobs, 1, "pretended")
    page.write("so", pretended, running.collect(jobs, missing), "study.py so", docs, "full")
    text = (docs / "results" / "so.md").read_text()
    assert "A word before." in text and "A word after." in text and "Not run yet" not in text
    assert (
        text.count("Is it so?") == 1
        and "Two halves." in text
        and "| 0.1 | 0.1 |" in text
        and "Missing: one, seed 1" in text
    )
    saved = json.loads((docs / "results" / "figures" / "so.json").read_text())
    assert saved["tables"][0]["rows"][0]["other"]["seeds"] == [0.1]


def test_the_best_setting_is_finite_on_all_seeds(evidence):
    records = evidence.records
    figures = {"a": (1e-4, None), "b": (1e-2, 1e-3), "c": (1e-1, 1e-1)}
    rows = {
        seed: [{"run": run, "round": 0, "test_mse": values[seed]} for run, values in figures.items()] for seed in (0, 1)
    }
    found = records.Found({"tune": rows}, [], [])
    assert records.best(found, "tune", figures, "test_mse") == "b"
    assert records.best(found, "nothing", figures, "test_mse") == ""
    assert [records.number(np.array(values)) for values in ([0.1 + 0.2, 0.3], [1.0, 2.0], [5.0])] == [
        "0.3",
        "1.5 +- 0.5",
        "5",
    ]
    assert [records.short(value) for value in (0.0, 0.0123, 1.84e-11, 12345.0)] == ["0", "0.012", "1.8e-11", "1.2e4"]
    assert records.error(records.final(found, "tune", "a", "test_mse")) == "diverges on 1 of 2"


def test_a_method_that_diverges_leaves_the_panel(evidence):
    """And hides none of the others: the axis ends ten times above where they begin."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axis, line = figure.subplots(), evidence.records.curves.line
    rows = [{"run": run, "round": k, "test_mse": x} for run, x in (("a", 0.1), ("b", 0.2)) for k in (0, 1)]
    rows += [{"run": "c", "round": 0, "test_mse": 0.3}, {"run": "c", "round": 1, "test_mse": 1e297}]
    evidence.records._logarithmic(axis, [line([rows], run, "test_mse") for run in "abc"])
    assert axis.get_ylim() == pytest.approx((0.05, 2.0)) and axis.get_yscale() == "log"


def test_distances_between_clients_are_those_of_dense_matrices(evidence):
    """In a basis that spans everything, where what is outside of it is damping alone."""
    apart = importlib.import_module("benchmarks.apart")
    size, rank, draw = 6, 2, np.random.default_rng(0)
    bases = np.stack([np.linalg.qr(draw.normal(size=(size, rank)))[0] for _ in range(2)])
    values = np.sort(draw.uniform(0.1, 2, (2, rank)))[:, ::-1]
    args = argparse.Namespace(basis=size, damping=0.1, pairs=10, top=rank, seed=0)
    found = apart.distances((values, bases), args)
    A, B = (basis * value @ basis.T + args.damping * np.eye(size) for basis, value in zip(bases, values, strict=True))
    log_det = lambda matrix: np.linalg.slogdet(matrix)[1]
    angles = scipy.linalg.subspace_angles(*bases)
    logs = np.log(values + args.damping)
    wanted = {
        "angles": np.mean(np.sin(angles) ** 2),
        "eigenvalues": np.sqrt(np.mean((logs[0] - logs[1]) ** 2)),
        "jbld": log_det((A + B) / 2) - (log_det(A) + log_det(B)) / 2,
        "affine": np.linalg.norm(np.log(scipy.linalg.eigh(A, B, eigvals_only=True))),
    }
    assert found == pytest.approx(wanted, rel=1e-9)
    gradients = draw.normal(size=(3, size))
    assert apart.diversity(np.repeat(gradients[:1], 3, axis=0), np.full(3, 1 / 3)) == pytest.approx(0, abs=1e-12)
    spread = np.trace(np.cov(gradients.T, bias=True)) / np.mean(np.sum(gradients**2, axis=1))
    assert apart.diversity(gradients, np.full(3, 1 / 3)) == pytest.approx(spread, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_when_it_is_tiny(name, tmp_path, evidence):
    command = [sys.executable, ROOT / "scripts" / "study.py", name, "--debug", f"--runs={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    page = Path(done.stdout.strip().splitlines()[-1])
    assert page.is_relative_to(tmp_path) and "Not run yet" not in page.read_text()
    picture = page.parent.parent / "pictures" / f"study_{name}.svg"
    assert picture.is_file() == bool(study_of(name).draw)


@pytest.mark.parametrize(("number", "across", "down"), [(1, 1, 1), (4, 4, 1), (5, 3, 2), (7, 4, 2)])
def test_panels_fill_even_rows(number, across, down, tmp_path, evidence, monkeypatch):
    """As even as they can be, four in a row at most; there is no frame without lines."""
    from fipa_jax.reporting import plots

    made, picture = [], plots.picture

    @contextlib.contextmanager
    def kept(path, *size):
        with picture(path, *size) as (figure, axes):
            made.append((figure, size))
            yield figure, axes

    monkeypatch.setattr(plots, "picture", kept)
    rows = [{"run": "fipa", "round": k, "test_mse": 1 / (k + 1)} for k in range(3)]
    found = evidence.records.Found({"sine": {0: rows}}, [], [])
    panels = {f"panel {i}": [("sine", "fipa", "FIPA")] for i in range(number)}
    evidence.records.draw_lines(panels, "test_mse", tmp_path / "lines.png", found)
    ((figure, (width, height, rows, columns)),) = made
    assert (columns, rows) == (across, down)
    assert width / across == pytest.approx(3.4) and height / down == pytest.approx(3.2)
    assert [axis.get_title() for axis in figure.axes] == list(panels)


def test_a_run_that_is_not_there_is_named(tmp_path):
    """Of `--only`; without any run that is done the page, which may have figures of earlier ones, stays as it is."""
    (page := tmp_path / "results" / "sine.md").parent.mkdir()
    page.write_text("# Sine\n\nFigures of last year.\n")
    given = ["sine", "--only", "fipaa", "--write", f"--runs={tmp_path}", f"--docs={tmp_path}"]
    done = subprocess.run([sys.executable, ROOT / "scripts" / "study.py", *given], capture_output=True, text=True)
    assert done.returncode == 1 and "fipaa: there is no such run" in done.stderr and "stays as it is" in done.stderr
    assert page.read_text() == "# Sine\n\nFigures of last year.\n"


def test_a_command_is_written_without_this_machines_folders(evidence):
    given = (
        "train.py --config.data.dir=/a/b --workdir=/a/b/x-1 --config.init_from=/a/b/y-2/warmup.msgpack --config.seed=1"
    )
    wanted = "train.py --config.data.dir=DIR --workdir=runs/studies/x-1 "
    wanted += "--config.init_from=runs/studies/y-2/warmup.msgpack --config.seed=1"
    assert evidence.page._anywhere(given) == wanted
    assert evidence.page._anywhere(wanted) == wanted
    given = "benchmark.py apart --config=/a/b/configs/sine.py --run=/a/b/x-1 --out=/a/b/y-2/figures.json"
    wanted = "benchmark.py apart --config=configs/sine.py --run=runs/studies/x-1 --out=runs/studies/y-2/figures.json"
    assert evidence.page._anywhere(given) == evidence.page._anywhere(wanted) == wanted
