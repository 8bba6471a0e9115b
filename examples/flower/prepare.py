"""Gives each hospital the file of its own rows, and the server that of the test rows.

The inputs are standardised by the moments of all training rows, which hospitals can find by adding up sums; here one
program does it for all of them. The file comes from `python scripts/prepare_data.py heart_disease`.

Command: python examples/flower/prepare.py --file=DIR/heart_disease.npz --out=OUT
"""

import argparse
import runpy
from pathlib import Path

import numpy as np

from fipa_jax import installed
from fipa_jax.tasks import task


def main() -> None:
    """Writes `hospital-0.npz` to `hospital-3.npz`, and `test.npz`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config = runpy.run_path(str(installed.folder("configs") / "heart_disease.py"))["get_config"]()
    config.task.file = given.file
    problem = task.build(config)
    given.out.mkdir(parents=True, exist_ok=True)
    for client, own in enumerate(problem.clients):
        rows = {name: field[np.asarray(own)] for name, field in problem.train.items()}
        np.savez(given.out / f"hospital-{client}.npz", **rows)
        print(f"hospital {client}: {len(own)} patients to train on")
    np.savez(given.out / "test.npz", **problem.test)


if __name__ == "__main__":
    main()
