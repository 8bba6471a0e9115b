"""What scripts/faults.py does to runs, in small; it ends with status 1 where a promise is not kept."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Of the tests' own flags: most of such runs is compiling, and a user's programs come from the cache.
NOT_THEIRS = ("XLA_FLAGS", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


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
