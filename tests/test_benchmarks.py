"""Every measurement that takes seconds when it is tiny runs, and leaves its figures in a file; no figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "products": "products --model=cnn_6k --examples=4 --widths 2 --micro-batches 2 --repeats=1",
    "head": "head --features=4 --classes=3 --examples=6 --pixels=16 --channels 2 2 --ranks 2 --epochs=1 --repeats=1",
    "merge": "merge --parts=size --size=300 --clients=2 --rank=2 --size-methods=gram --stores=float32 --repeats=1",
    "gauss_newton": "gauss_newton --ranks 2 --rounds 2 4 --substeps=2 --plot=gap.png",
    "step": "step --model=cnn_6k --side=32 --classes=10 --batch=4 --repeats=1",
    "ragged": "ragged --model=cnn_6k --examples=16 --clients=2 --rank=2 --solver=rows --epochs=1 --chunk=2 --repeats=1",
    "round": "round --model=cnn_6k --examples=8 --clients=2 --batch=4 --repeats=1",
    "rules": "round --rules --model=cnn_6k --examples=8 --clients=2 --sketches=head --epochs=1 --repeats=1",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_measurement_runs(name, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *COMMANDS[name].split(), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["machine"]["versions"]["jax"]
    assert result["setting"], "what was measured is written down"
