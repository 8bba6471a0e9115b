"""For which kind of device is a program traced? Jax's own, or, to lower a program for one that is not there, another.

Where this package does something differently on a CPU, a GPU or a TPU, it asks `kind`.
"""

import contextlib
from collections.abc import Iterator

import jax

_WANTED = jax.make_user_context(default_value=None)  # part of the key of jit's caches


def kind() -> str:
    """`cpu`, `gpu`, `tpu` or what else jax calls its default backend, or what `traced_for` says."""
    return _WANTED.value or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """A context in which functions are traced for another kind of device, to be lowered for it; nothing runs there.

    Example:
      with traced_for("tpu"):
          text = jax.export.export(jax.jit(step), platforms=["tpu"])(params).mlir_module()

    Args:
      name: as jax calls it: `cpu`, `gpu`, `tpu`.
    """
    with _WANTED(name):
        yield
