"""A model as one portable file: flax's msgpack of the parameter pytree."""

import os
from pathlib import Path

import jax
import numpy as np
from flax import serialization


def save_model(path: Path, params) -> None:
    """Writes the parameters; the file is either there whole or not at all."""
    path = Path(path)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, params)))
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
    except Exception as error:
        raise ValueError(f"config.init_from: {path} is not a model file, or is damaged ({error})") from error
    describe = lambda tree: jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)
    if describe(found) != describe(like):
        raise ValueError(f"config.init_from: {path} holds {describe(found)}, the config's model is {describe(like)}")
    return jax.tree.map(jax.numpy.asarray, found)
