"""The commands: `python -m fipa_jax train`, `summarise` and `prepare-data`, installed as `fipa-train` and so on.

Each runs the script of that name, `scripts/train.py` and so on, so that a wheel and a checkout do the same.
"""

import runpy
import sys

from fipa_jax import installed

COMMANDS = {"train": "train.py", "summarise": "summarise.py", "prepare-data": "prepare_data.py"}


def run(command: str) -> None:
    """Runs a command with the arguments that are left in `sys.argv`."""
    try:
        installed.check("experiments", f"fipa-{command}", "flax", "matplotlib", "ml_collections", "orbax", "tqdm")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    runpy.run_path(str(installed.folder("scripts") / COMMANDS[command]), run_name="__main__")


def train() -> None:
    """Trains by a config: `fipa-train --config=sine`."""
    run("train")


def summarise() -> None:
    """Prints the figures of several runs: `fipa-summarise runs/sine-0 runs/sine-1`."""
    run("summarise")


def prepare_data() -> None:
    """Prepares an image data set: `fipa-prepare-data cifar10 --data-dir=DIR`."""
    run("prepare-data")


def main() -> None:
    """Runs the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m fipa_jax {{{', '.join(COMMANDS)}}} ARGUMENTS")
    command = sys.argv.pop(1)
    sys.argv[0] = f"fipa-{command}"
    run(command)


if __name__ == "__main__":
    main()
