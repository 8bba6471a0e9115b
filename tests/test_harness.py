"""What scripts/faults.py and scripts/same_bits.py do, in small; a broken promise ends them with another status."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Of the tests' own flags: most of such runs is compiling, and a user's programs come from the cache.
NOT_THEIRS = ("XLA_FLAGS", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["kills --anywhere=0 --saving=2 --rounds=4", "flips --flips=1 --truncations=1 --rounds=2"]
)
def test_runs_survive(command):
    process = subprocess.run(
        [sys.executable, SCRIPTS / "faults.py", *command.split()],
        env={name: value for name, value in os.environ.items() if name not in NOT_THEIRS},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr + process.stdout
    assert process.stdout.count("as promised") >= 5


def test_a_broken_promise_is_told(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    faults, clients = importlib.import_module("faults"), importlib.import_module("harness.clients")
    for taken, line in ((0, "0  as promised"), (1, "1  BROKEN")):
        found = {"taken for sound": taken, "farthest from without it": 0}
        monkeypatch.setattr(clients, "run", lambda _, found=found: found)
        assert faults.kept("clients", []) == (not taken)
        assert line in capsys.readouterr().out


@pytest.fixture
def same_bits(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("harness.same_bits")


def test_a_bit_that_differs_is_named(same_bits, capsys):
    row = {"round": 3, "test_mse": 0.1}
    record = {"sine": {"rows": [row], "models": ["a"], "state": ["b"]}}
    assert same_bits.compare(record, record) == 0 and "all 1 identical" in capsys.readouterr().out
    for other, words in (
        ({"rows": [row | {"test_mse": 0.10000000000000002}], "models": ["a"], "state": ["b"]}, "round 3: test_mse"),
        ({"rows": [row], "models": ["c"], "state": ["b"]}, "models"),
        ({"rows": [row], "models": ["a"], "state": ["c"]}, "the last state"),
        ({"rows": [row, row], "models": ["a"], "state": ["b"]}, "1 rows and 2"),
        ({"error": "no room"}, "FAILED: no room"),
    ):
        assert same_bits.compare(record, {"sine": other}) == 1
        assert words in capsys.readouterr().out
    assert same_bits.compare(record, {}) == 1, "what was not compared is not the same"


def test_figures_of_the_machine_do_not_count(same_bits):
    row = {"run": "fipa", "round": 1, "seconds_train": 0.3, "bytes_up": 10, "memory_share": 0.5}
    assert same_bits.figures(row) == {"round": 1, "past_share": 0.5}
    assert same_bits.by_old_names("fipa.aggregator.past.kind=prior", {"aggregator.memory": "aggregator.past.kind"}) == (
        "fipa.aggregator.memory=prior"
    )


@pytest.mark.slow
def test_a_checkout_is_the_same_as_itself(same_bits):
    """And a case whose config does not exist is an error that is kept, not raised."""
    checkout = SCRIPTS.parent
    first, second = (same_bits.record(checkout, "", ["sine"], jobs=1) for _ in range(2))
    assert len(first["sine"]["rows"]) > 3 and first == second
    assert "error" in same_bits.run(checkout, "", same_bits.Case("configs/none.py", ()))
