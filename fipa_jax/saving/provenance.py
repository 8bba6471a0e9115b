"""What a run comes from, its config, data and code, and how they differ from another run's."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import numpy as np

import fipa_jax
from fipa_jax import trees
from fipa_jax.data.partition import Ragged

# Fields that change no result: where data are found, which are compared themselves, and how the work is laid out.
FREE = (
    "checkpoint",
    "data.cache_dir",
    "data.dir",
    "devices",
    "examples_on",
    "init_from",
    "smaller",
    "stage_seconds",
    "task.file",
    "writers",
)


def of_data(problem, params) -> dict:
    """{name: digest} of the problem's arrays, of who owns what, and of the parameters that the run starts from."""
    clients = problem.clients
    sizes = np.fromiter(map(len, clients), np.int64, len(clients))
    flat = clients.flat if isinstance(clients, Ragged) else np.concatenate(list(clients))
    fields = {"train": problem.train, "test": problem.test, "holdout": problem.holdout or {}, "params": params}
    arrays = trees.paths(fields) | {"clients": sizes, "examples": flat}
    return {name: _digest(array) for name, array in arrays.items()}


def of_code() -> dict:
    """The versions that a result may depend on, and a digest of this package's source."""
    folder = Path(fipa_jax.__file__).parent
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
    versions = {"fipa_jax": fipa_jax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return versions | {"source": source[:16], "device": jax.devices()[0].device_kind}


def differences(theirs: dict, mine: dict) -> list[str]:
    """One line for each value that differs between two {"config" | "data" | "code": nested dictionary}."""
    theirs, mine = dict(_flat(theirs)), dict(_flat(mine))
    return [
        f"{name}: {theirs.get(name, 'absent')!r} there, {mine.get(name, 'absent')!r} here"
        for name in {**theirs, **mine}
        if theirs.get(name) != mine.get(name) and not _is_free(name)
    ]


def _is_free(name: str) -> bool:
    """Whether two runs may differ in a value, a.b.c, and still be the same."""
    return any(name == field or name.startswith(f"{field}.") for field in (f"config.{field}" for field in FREE))


def _flat(tree: dict, prefix: str = "") -> Iterator:
    """(a.b.c, value) of nested dictionaries."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(array) -> str:
    """Type, shape and SHA-256 of an array."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
