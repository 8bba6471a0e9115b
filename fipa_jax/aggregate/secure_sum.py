"""How can a server add up what it must not see? In fixed point, under masks that cancel in the sum; a simulation.

1. A public scale: numbers become whole multiples of a grid, so that a sum is exact whatever its order.
2. Pairwise masks (Bonawitz et al. 2017, "Practical secure aggregation"): clients i < j share a seed; i adds the numbers
   drawn from it, j subtracts them, modulo 2^bits. One message alone is uniform; the sum of all has no masks left.

What is simulated is the arithmetic. Seeds come from one key here, where clients would agree on them by a key exchange.
**Drop-outs are not recovered**: there are no shares of the seeds, so that a client that is lost after the masks were
drawn leaves the sum of the others useless, which `unmask` says; they must begin again among themselves. Nor does the
sum itself protect: see docs/maths/sums.md.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fipa_jax import trees

MOST_BITS = 32
SMALLEST = 8


def total_of(rows: Any, bits: int = 0) -> Any:
    """The sum over the clients of a stacked tree [C, ...]: in floating point, or in fixed point of so many bits.

    In fixed point each leaf, and each column of a matrix, has a grid of its own: by the power of two above the largest
    entry of all clients, which becomes public, and with room for C of them. Masks would cancel to the bit, so that a
    run has none: see `mask`.

    Raises:
      ValueError: the number of bits is neither 0 nor in [8, 32].
    """
    check_bits(bits)
    if bits == 0:
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), rows)

    def summed(leaf):
        bound = public_bound(leaf)
        grid = grid_of(bound, leaf.shape[0], bits)
        words = jax.vmap(lambda one: encode(one, bound, grid, bits))(leaf)
        return decode(jnp.sum(words, axis=0, dtype=jnp.uint32), grid, bits, leaf.dtype)

    return jax.tree.map(summed, rows)


def check_bits(bits: int) -> None:
    """Refuses, with a ValueError, a width that the words do not have."""
    if bits and not SMALLEST <= bits <= MOST_BITS:
        raise ValueError(f"aggregator.sums.bits: needs 0 for floating point, or {SMALLEST} to {MOST_BITS}, got {bits}")


def public_bound(stacked: jax.Array) -> jax.Array:
    """The power of two that no entry [C, ...] is above: what clients agree on before they send; 0 of zeros.

    [], and of matrices [C, P, s] one for each column [1, s], as columns are of very different size.
    """
    of_columns = stacked.ndim == 3
    stacked = jnp.where(jnp.isfinite(stacked), stacked, 0)  # as in `encode`
    largest = jnp.max(jnp.abs(stacked), axis=(0, 1) if of_columns else None, keepdims=of_columns)
    largest = largest[0] if of_columns else largest
    exponent = jnp.frexp(largest)[1]
    return jnp.where(largest > 0, jnp.ldexp(jnp.ones_like(largest), exponent), 0)


def grid_of(bound: jax.Array, clients: int, bits: int) -> jax.Array:
    """The distance of two neighbours on the grid, a power of two; the sum of C entries within the bound fits.

    Raises:
      ValueError: there are too many clients for so few bits.
    """
    room = 0.99 * 2.0 ** (bits - 1) - clients  # each client rounds by at most half a grid step
    if room < 2 * clients:
        raise ValueError(f"aggregator.sums.bits: {bits} bits have no room for the sum of {clients} clients; take more")
    exponent = jnp.frexp(bound * clients / room)[1]
    return jnp.where(bound > 0, jnp.ldexp(jnp.ones_like(bound), exponent), 0)


def encode(values: jax.Array, bound: jax.Array, grid: jax.Array, bits: int) -> jax.Array:
    """Whole multiples of the grid modulo 2^bits, uint32; entries beyond the bound are cut to it.

    In float32 a multiple has 24 bits: finer grids are exact only for float64.

    A row with an entry that is not finite has no words, and no server could see it in the sum: `sums.row_of` refuses it
    at the client, and here it counts as 0.
    """
    values = jnp.where(jnp.isfinite(values), values, 0)
    multiples = jnp.round(trees.ratio(jnp.clip(values, -bound, bound), grid))
    return _within(multiples.astype(jnp.int32).astype(jnp.uint32), bits)


def decode(words: jax.Array, grid: jax.Array, bits: int, dtype) -> jax.Array:
    """The numbers that a sum of words stands for."""
    up = MOST_BITS - bits
    signed = jax.lax.shift_right_arithmetic((words << up).astype(jnp.int32), jnp.int32(up))
    return signed.astype(dtype) * grid


def mask(words: jax.Array, client: int, clients: int, root: jax.Array, bits: int = MOST_BITS) -> jax.Array:
    """A client's words under its masks: for each other one, the numbers of their common seed, added or subtracted.

    Args:
      words: uint32 of any shape, see `encode`.
      client, clients: its place in 0 .. C - 1, and C.
      root: key, in the place of a key exchange.
      bits: of the words.
    """
    for other in range(clients):
        if other != client:
            first, second = sorted((client, other))
            pair = jax.random.fold_in(jax.random.fold_in(root, first), second)
            drawn = jax.random.bits(pair, words.shape, jnp.uint32)
            words = words + drawn if client == first else words - drawn
    return _within(words, bits)


def unmask(messages: Sequence[jax.Array | None], bits: int = MOST_BITS) -> jax.Array:
    """The sum of all clients' masked words, in which no mask is left.

    Raises:
      ValueError: one is missing: the others' masks with it do not cancel, and without shares of its seeds nobody can
        take them out.
    """
    missing = [place for place, words in enumerate(messages) if words is None]
    if missing:
        raise ValueError(
            f"secure sum: the clients {missing} dropped out after the masks were drawn, and their masks are still in "
            "the others' words; the round must begin again without them"
        )
    return _within(trees.total(words for words in messages if words is not None), bits)


def _within(words: jax.Array, bits: int) -> jax.Array:
    """Words modulo 2^bits."""
    return words if bits == MOST_BITS else words & jnp.uint32(2**bits - 1)
