"""What a run comes from, its config, data and code, and how they differ from another run's."""

import hashlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax
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


def of_data(problem, params, people=None) -> dict:
    """{name: digest} of the problem's arrays, of who owns what, and of the parameters that the run starts from.

    Args:
      problem: a `tasks.task.Problem`.
      params: as they are before the first round.
      people: a `run.personal_stage.People`, who get models of their own; None for nobody.
    """
    sets = {name: getattr(problem, name) or {} for name in ("train", "test", "holdout", "public")}
    arrays = trees.paths(sets | {"params": params})
    owners = {"clients": problem.clients, "test_clients": problem.test_clients}
    owners |= {f"people.{name}": lists for name, lists in (people._asdict() if people else {}).items()}
    for name, lists in owners.items():
        arrays |= {} if lists is None else _of_lists(name, lists)
    return {name: _digest(array) for name, array in arrays.items()}


def _of_lists(name: str, lists: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Two arrays that say of each client which examples it owns."""
    sizes = np.fromiter(map(len, lists), np.int64, len(lists))
    flat = lists.flat if isinstance(lists, Ragged) else np.concatenate([np.zeros(0, np.int64), *lists])
    return {f"{name}.sizes": sizes, f"{name}.examples": flat}


def of_code() -> dict:
    """The versions that a result may depend on, and a digest of this package's source."""
    folder = Path(fipa_jax.__file__).parent
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
    versions = {"fipa_jax": fipa_jax.__version__}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax")}
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
