"""How are bases of many rows read, some rows at a time? In blocks of one length, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fipa_jax.derivatives import vary_with


def row_block(size: int, length: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first row, [length] bool: which rows are new) of the block at `start`.

    The last block's start is moved back so that all have one length; what it repeats is not new.
    """
    begin = jnp.minimum(start, size - length)
    return begin, begin + jnp.arange(length, dtype=jnp.int32) >= start


def over_row_blocks(bases: list, length: int, visit: Callable, initial: Any, each_by_itself: bool = False) -> Any:
    """carry <- visit(bases, start, carry) over blocks of so many rows of bases [C, P, R], one after another.

    Args:
      bases: read by `visit`, which is given them anew in each step.
      visit: see `row_block` for what a start means.
      initial: the first carry.
      each_by_itself: whether the reverse sweep of a derivative, where there is one, computes each step anew.
    """
    size = bases[0].shape[1]
    if length == size:
        return visit(bases, jnp.int32(0), initial)

    # int32, as int64 would outlive the scope of `_arithmetic` where a vmap traces this anew.
    steps = -(-size // length)
    initial = vary_with(initial, bases)
    if each_by_itself:
        body = jax.checkpoint(lambda carry, i: (visit(bases, i * length, carry), None))
        return jax.lax.scan(body, initial, jnp.arange(steps, dtype=jnp.int32))[0]

    def body(i, carry):
        # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
        bases, inner = carry
        bases, i = jax.lax.optimization_barrier((bases, i))
        return bases, visit(bases, i * length, inner)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), body, (bases, initial))[1]
