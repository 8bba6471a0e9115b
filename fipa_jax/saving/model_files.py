"""A model as one portable file, written and read whole."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from fipa_jax import trees
from fipa_jax.files import write
from fipa_jax.saving.checkpoints import digest, read

LONGEST = 100  # bytes of a file's name without its ending


def stems(names: Sequence[str]) -> dict[str, str]:
    """{name of a phase: what its files are called, without an ending}: each its own, and short enough for any disk.

    A name that is too long, or whose file another one would have too, is told apart by a digest.
    """
    plain = {name: re.sub(r"[^\w.-]", "_", name.replace("=", "-")) for name in names}
    shared = Counter(stem.lower() for stem in plain.values())  # some disks do not tell capitals apart

    def told_apart(name: str, stem: str) -> str:
        if len(stem.encode()) <= LONGEST and shared[stem.lower()] == 1:
            return stem
        return f"{stem.encode()[:LONGEST].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    return {name: told_apart(name, stem) for name, stem in plain.items()}


def export(path: Path, params) -> None:
    """Writes a model's parameters as one portable file: flax's msgpack of their paths and arrays, and their SHA-256."""
    leaves = {path: np.asarray(leaf) for path, leaf in trees.paths(params).items()}
    write(path, serialization.msgpack_serialize({"sha256": digest(leaves), "params": leaves}))


def load(path: Path, like=None):
    """Reads a model: a file that `export` has written, or a step of a run's checkpoints.

    Example:
      load("runs/cifar10/fipa.msgpack"), or load(named("runs/cifar10/checkpoints")["best of fipa"]).

    Args:
      path: of the file, or of the step's folder.
      like: parameters of the model they are for, or their shapes.

    Returns:
      A tree as `like`, of arrays on the device; NumPy arrays in nested dictionaries where that is None.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or holds another model's parameters.
    """
    path = Path(path)
    if path.is_dir():
        leaves = trees.below(read(path.absolute()).leaves, "params")
    else:
        leaves = _read_model(path)
    if like is None:
        return trees.nested(leaves)
    try:
        return jax.tree.map(jnp.asarray, trees.fitted(leaves, like))
    except ValueError as error:
        raise ValueError(f"{path} does not fit config.model and config.precision: {error}") from None


def _read_model(path: Path) -> dict:
    """{path: array} of an exported model."""
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        content = serialization.msgpack_restore(path.read_bytes())
        leaves, written = content["params"], content["sha256"]
        if not all(isinstance(leaf, np.ndarray) for leaf in leaves.values()):
            raise TypeError("its values are not arrays")
        if digest(leaves) != written:
            raise ValueError("its arrays are not those that were saved")
    except Exception as error:  # of any kind of content
        raise ValueError(f"{path} is not a model file, or is damaged ({error})") from error
    return leaves
