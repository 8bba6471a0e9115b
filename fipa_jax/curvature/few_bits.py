"""How is a vector sent in few bits? Block by block, each with a scale of its own, rounded at random, without bias.

    q = floor(l x / m + u),  u uniform in [0, 1),  l = 2^(bits - 1) - 1,  m = max |x| over a block of 256 entries

The mean of m q / l over u is x (stochastic rounding, as in QSGD, Alistarh et al. 2017, arXiv 1610.02132, which has one
norm for a block), and |m q / l - x| < m / l. What is sent are the integers q, from -l to l, and a float32 m of each
block. The largest entry of a block always has |q| = l, so that m can be read from what arrives, see
`deployment.packing`.

A block of an update or of a basis vector is turned before, and back where it arrives,

    Y = H (H o X) H / 16,    X = H o (H Y H) / 16        X [16, 16]: 256 entries; H: the Hadamard matrix of 16 rows

an orthogonal map by which a few large entries are shared out among all, so that m is smaller, and the rounding with it
(Suresh et al. 2017, arXiv 1611.00429, who draw the signs). The signs H o are the same everywhere; with them a block of
equal entries is shared out evenly too, where H X H alone would put all of it into one entry.

Where the receiver keeps what came before, bias is no harm, and `nearest` loses less: what it leaves out comes later.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature.sketch import Sketch, SketchFunction
from fipa_jax.trees import ratio

Vector = TypeVar("Vector", jax.Array, np.ndarray)
Vector = TypeVar("Vector", jax.Array, np.ndarray)
SIDE = 16
BLOCK = SIDE**2  # entries that share a scale
# The steps, in standard deviations, of the uniform quantiser of a Gaussian with 2, 4, ... 256 levels (Max 1960).
STEPS = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
HADAMARD = functools.reduce(np.kron, 4 * [np.array([[1, 1], [1, -1]], np.int8)])  # [16, 16]
SIGNS = HADAMARD[None, ..., None]  # of blocks [n, 16, 16, K], as they are turned


def check(bits: int, field: str) -> None:
    """Refuses a number of bits that has no integers of either sign, with a ValueError that names the field."""
    if not 2 <= bits <= 16:
        raise ValueError(f"{field}: needs 2 to 16 bits, or 0 for floating point, got {bits}")


def rounded(key: jax.Array, vector: jax.Array, bits: int) -> jax.Array:
    """A vector [P] as it arrives.

    Example:
      rounded(jax.random.key(0), vector, 8) is off by less than 1 / 127 of the largest entry of each block.
    """
    size, levels = vector.shape[0], levels_of(bits)
    blocks = _padded(vector).reshape(-1, BLOCK)
    longest = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    scale = longest.astype(jnp.float32).astype(blocks.dtype)
    places = levels * jnp.clip(ratio(blocks, scale), -1, 1)
    below = jnp.floor(places)
    places = below + (jax.random.uniform(key, blocks.shape, blocks.dtype) < places - below)
    places = jnp.where(jnp.abs(blocks) == longest, levels * jnp.sign(blocks), places)
    return (scale * (places / levels)).reshape(-1)[:size]


def sent(key: jax.Array, vector: jax.Array, bits: int) -> jax.Array:
    """A vector [P] that is turned, rounded, and turned back where it arrives.

    Example:
      sent(key, update, 4) is off by less than rounded(key, update, 4) is: of gradients the squared error is a third.
    """
    wide = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    return turned_back(rounded(key, turned(wide), bits)).astype(vector.dtype)


def nearest(vector: jax.Array, bits: int) -> jax.Array:
    """A vector [P] that is turned, each entry taken to the nearest of 2^bits levels, and turned back: without chance.

        q = floor(x / (t r)) + 1/2,  at most 2^(bits - 1) - 1/2 in size,  r^2 = mean x^2 over a block
        what arrives is s q,  s = x . q / q . q

    with the t of least error for a Gaussian (Max 1960), which a turned block nearly is. The mean is not x: with s of
    least squares the error is |x|^2 - |s q|^2, always below |x|^2, and of a Gaussian 0.36, 0.12, 0.04 of it with one,
    two and three bits. A block travels as `rounded`'s does: integers and a float32, the bytes of `bytes_of`.

    Example:
      last + nearest(update - last, 1) is nearer to the update than `last` was.
    """
    wide = vector.astype(jnp.promote_types(vector.dtype, jnp.float32))
    blocks, there = (_padded(each).reshape(-1, BLOCK) for each in (turned(wide), jnp.ones_like(wide)))
    size = jnp.sqrt(ratio(jnp.sum(blocks**2, 1, keepdims=True), jnp.sum(there, 1, keepdims=True)))
    most = 2 ** (bits - 1) - 0.5
    pattern = there * jnp.clip(jnp.floor(ratio(blocks, STEPS[bits - 1] * size)) + 0.5, -most, most)
    scale = ratio(jnp.sum(blocks * pattern, 1, keepdims=True), jnp.sum(pattern**2, 1, keepdims=True))
    return turned_back((scale * pattern).reshape(-1)[: vector.size]).astype(vector.dtype)


def columns_sent(key: jax.Array, columns: jax.Array, bits: int) -> jax.Array:
    """Vectors [P, K] as each is `sent`, their roundings independent."""
    keys = jax.random.split(key, columns.shape[1])
    by_column = jax.vmap(rounded, in_axes=(0, 1, None), out_axes=1)
    return turned_back(by_column(keys, turned(columns), bits))


def turned(vectors: Vector) -> Vector:
    """The vector [P], or vectors [P, K], of jax or NumPy, with whole blocks turned; what is behind them is as it was.

    Example:
      turned_back(turned(update)) is the update again, but for the rounding of floating point.
    """
    return _by_block(lambda blocks: _between(SIGNS * blocks), vectors)


def turned_back(vectors: Vector) -> Vector:
    """The vectors of which these are what `turned` makes."""
    return _by_block(lambda blocks: SIGNS * _between(blocks), vectors)


def _padded(vector: jax.Array) -> jax.Array:
    """[P], by zeros up to whole blocks."""
    return jnp.pad(vector, (0, -vector.shape[0] % BLOCK))


def _by_block(turn: Callable, vectors: Vector) -> Vector:
    """[P, ...]: `turn` of the whole blocks [n, 16, 16, K], divided by 16, and what is behind them."""
    number, columns = vectors.shape[0] // BLOCK, math.prod(vectors.shape[1:])
    whole, rest = vectors[: number * BLOCK], vectors[number * BLOCK :]
    blocks = whole.reshape(number, SIDE, SIDE, columns) / SIDE  # divided first, as a sum of 256 may overflow
    return vectors.__array_namespace__().concatenate([turn(blocks).reshape(whole.shape), rest])


@jax.default_matmul_precision("highest")
def _between(blocks: Any) -> Any:
    """[n, 16, 16, K], H X H of each X [16, 16]."""
    number, _, _, columns = blocks.shape
    rows = HADAMARD @ blocks.reshape(number, SIDE, SIDE * columns)
    return (HADAMARD @ rows.reshape(number * SIDE, SIDE, columns)).reshape(blocks.shape)


def levels_of(bits: int) -> int:
    """l, the largest integer of so many bits whose negative has as many."""
    return 2 ** (bits - 1) - 1


def bytes_of(size: int, bits: int, itemsize: int = 4) -> int:
    """The bytes of a vector of P = `size` entries: its integers, packed, and its blocks' scales.

    With `bits` 0 it is sent in floating point, `itemsize` bytes an entry.
    """
    return -(-size * bits // 8) + 4 * -(-size // BLOCK) if bits else itemsize * size


def in_few_bits(sketch: SketchFunction, bits: int) -> SketchFunction:
    """The sketch function with each vector of its basis rounded, then of length one again, as it arrives.

    The rounding of different vectors is independent, so that they stay nearly orthogonal: by about the relative error
    of one entry over the square root of P. The report is that of the basis before.

    Raises:
      ValueError: not 2 to 16 bits.
    """
    check(bits, "sketch.bits")

    def arriving(key, params, batch, mask=None, start=None) -> Sketch:
        solve_key, round_key = jax.random.split(key)
        whole = sketch(solve_key, params, batch, mask, start)
        basis = columns_sent(round_key, whole.basis, bits)
        return whole._replace(basis=ratio(basis, jnp.linalg.norm(basis, axis=0, keepdims=True)))

    return arriving
