"""What is installed beside the code: the folders `configs` and `scripts`, and the packages of an extra.

In a checkout the two folders lie beside the package; a wheel carries them inside of it (see setup.py).
"""

import importlib.util
import re
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `configs` or `scripts`, of a wheel or of a checkout.

    Example:
      folder("configs") / "sine.py" is the config of the smallest experiment.

    Raises:
      FileNotFoundError: the package was installed without it.
    """
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"fipa_jax is installed without its folder {name}: {PACKAGE / name} is missing")


def check(extra: str, purpose: str, *packages: str) -> None:
    """Checks that packages of an extra are installed, without the time that their imports take.

    Args:
      extra: a name in setup.py's `extras_require`.
      purpose: what needs them, for the error.
      *packages: names to import.

    Raises:
      ModuleNotFoundError: one is not; the line says how to install what is missing.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(missing(extra, purpose, name), name=name)


def missing(extra: str, purpose: str, name: str) -> str:
    """The line that says how to install what is missing of an extra: a command that is right where the code lies."""
    if (PACKAGE.parent / "setup.py").exists():
        wanted = f"-e '{PACKAGE.parent}[{extra}]'"
    else:
        needs = [need for need in metadata.requires("fipa_jax") or [] if re.search(rf"extra == .{extra}.", need)]
        wanted = " ".join(f"'{need.partition(';')[0].strip()}'" for need in needs)
    return f"{purpose} needs {name}, which the extra fipa_jax[{extra}] brings: pip install {wanted}"
