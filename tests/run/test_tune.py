"""The fastest chunk: found by trying, ended by slowness or lack of memory, and remembered."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from helpers.runs import tiny

from fipa_jax.reporting import metrics
from fipa_jax.run import experiment, programs, whole_run
from fipa_jax.run.phase_parts import make_rates


@pytest.mark.parametrize(
    ("seconds", "clients", "best", "tried"),
    [
        ({1: 3.0, 2: 2.0, 4: 1.0, 8: 1.5, 10: 0.1}, 10, 4, [1, 2, 4, 8]),
        ({1: 1.0, 2: 1.05, 4: 0.9, 5: 0.8}, 5, 5, [1, 2, 4, 5]),  # a little slower is noise
        ({1: 1.0, 2: float("inf")}, 8, 1, [1, 2]),
        ({1: 1.0}, 1, 1, [1]),
    ],
)
def test_the_search_goes_as_far_as_it_pays(tmp_path, seconds, clients, best, tried):
    asked = []
    measure = lambda chunk: asked.append(chunk) or seconds[chunk]
    search = functools.partial(programs.fastest_chunk, measure, clients, "key", tmp_path / "deep" / "chunks.json")
    assert search() == best and asked == tried
    assert search() == best and asked == tried, "it is remembered"
    assert programs.fastest_chunk(measure, clients, "another key", tmp_path / "deep" / "chunks.json") == best
    assert asked == 2 * tried


@pytest.mark.parametrize("text", ["", "[1, 2]", "{broken", "\0"])
def test_a_broken_file_costs_a_measurement(tmp_path, text):
    file = tmp_path / "chunks.json"
    file.write_text(text)
    assert programs.fastest_chunk(lambda chunk: chunk, 4, "key", file) == 1
    assert list(json.loads(file.read_text()).values()) == [1]


def test_a_file_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "chunks.json").mkdir()
    assert programs.fastest_chunk(lambda chunk: 1 / chunk, 4, "key", tmp_path / "chunks.json") == 4
    assert "cannot be written" in caplog.text


@pytest.mark.slow
def test_lack_of_memory_is_an_infinite_time_and_other_errors_are_errors(monkeypatch):
    config = tiny()
    run = experiment.build(config)
    parts, rates = experiment.parts_of(run, config.fipa), make_rates(config.fipa, "float32")
    measure = programs.seconds_of(parts, rates, run.params, run.population.cohort(jnp.arange(2)), run.root, repeats=1)
    assert 0 < measure(2) < 60

    def failing(text):
        def work(*args):
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(programs, "by_clients", lambda *stages: work)

    failing("RESOURCE_EXHAUSTED: 80 GiB")
    assert measure(2) == float("inf")
    failing("INTERNAL: broken")
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        measure(2)


@pytest.mark.slow
def test_a_run_measures_once_and_is_the_run_of_that_chunk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(programs, "seconds_of", lambda *args: lambda chunk: 1.0 / chunk)
    losses = {}
    for chunk in (-1, 2):
        whole_run.run(tiny(chunk=chunk, compare=("fipa",)), tmp_path / f"run{chunk}")
        rows = metrics.read(tmp_path / f"run{chunk}" / "metrics.jsonl")
        losses[chunk] = [row["test_mse"] for row in rows]
    assert losses[-1] == losses[2]
    assert list(json.loads((tmp_path / "fipa_jax" / "chunks.json").read_text()).values()) == [2]
