"""The notebook's cells run one after another, at their debug size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = json.loads((ROOT / "notebooks" / "fipa_colab.ipynb").read_text())["cells"]
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """All cells with real images where they are at hand; without them, those before the image run."""
    cells = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    if not (SHARED / "cifar10").exists():
        cells = cells[: next(i for i, cell in enumerate(cells) if "datasets.prepare" in cell)]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(cells))
    settings = {"FIPA_DEBUG": "1", "FIPA_WORKDIR": str(tmp_path / "runs"), "FIPA_DATA": str(SHARED)}
    environment = os.environ | settings | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test_mse" in done.stdout
    if not (SHARED / "cifar10").exists():
        pytest.skip(f"no CIFAR-10 under {SHARED}: the image run was left out, the rest passed")
    assert "test_accuracy" in done.stdout
