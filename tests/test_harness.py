"""What scripts/faults.py does to runs, in small: each of its commands finds what was promised."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROMISED = {
    "kills --anywhere=1 --saving=2 --rounds=4": {"failed resumes": "0", "rows that differ": "0"},
    "flips --flips=1 --truncations=1 --rounds=2": {"bit flips found": "1", "truncations found": "1"},
    "signals --times=1 --rounds=4": {"rounds lost": "0", "runs whose models differ": "0"},
}


@pytest.mark.parametrize("command", PROMISED)
def test_runs_survive(command):
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / "faults.py", *command.split()], capture_output=True, text=True, timeout=280
    )
    assert process.returncode == 0, process.stderr + process.stdout
    lines = [line.rsplit(maxsplit=1) for line in process.stdout.splitlines() if line.startswith("  ")]
    found = {name.strip(): value for name, value in lines}
    assert PROMISED[command].items() <= found.items()
    assert found["runs whose models differ"] == "0"
