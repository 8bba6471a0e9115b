"""A model as one portable file: flax's msgpack of {path: array}, whatever the parameter pytree is made of."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import serialization

from fipa_jax import trees


def save_model(path: Path, params) -> None:
    """Writes the parameters; the file is either there whole or not at all."""
    path = Path(path)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(
        serialization.msgpack_serialize({path: np.asarray(leaf) for path, leaf in trees.paths(params).items()})
    )
    os.replace(temporary, path)


def load_model(path: Path, like):
    """Reads parameters saved by `save_model`.

    Args:
      path: the file.
      like: parameters of the model they are for.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or holds another model's parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config.init_from: no model file at {path}")
    try:
        found = serialization.msgpack_restore(path.read_bytes())
        if not all(isinstance(leaf, np.ndarray) for leaf in found.values()):
            raise TypeError("its values are not arrays")
    except Exception as error:
        raise ValueError(f"config.init_from: {path} is not a model file, or is damaged ({error})") from error
    describe = lambda leaves: {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
    saved, wanted = describe(found), describe(trees.paths(like))
    if saved != wanted:
        differ = sorted(path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path))
        lines = "; ".join(f"{path}: {saved.get(path, 'absent')}, needed {wanted.get(path, 'none')}" for path in differ)
        raise ValueError(f"config.init_from: {path} does not fit config.model and config.precision: {lines}")
    return trees.replace(like, {path: jnp.asarray(leaf) for path, leaf in found.items()})
