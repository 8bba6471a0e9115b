"""How is a sum over clients made private? Each message is clipped, and Gaussian noise is added to their sum.

Two data sets are neighbours if one has one client more (add or remove one client). Whatever a client sends, its message
after `clipped` has a Euclidean norm of at most C, so that the sum of two neighbours differs by at most C: its
sensitivity. Noise of standard deviation z C on every number makes the sum a Gaussian mechanism of multiplier z (Dwork
and Roth 2014, appendix A), which `accounting` turns into epsilon and delta.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.curvature import contracts
from fipa_jax.curvature.eigenpairs import near_one
from fipa_jax.curvature.sketch import Sketch

ROUNDING = 64  # machine epsilons by which a clipped message stays below its bound: the norm itself is rounded
WHOLE = 1e-6  # how far the sum of a budget's shares may be from one


def clipped(vector: jax.Array, bound: jax.Array | float) -> jax.Array:
    """The vector [P] shortened to a norm of at most `bound`; zero where an entry is not finite.

    A vector so long that its squares could overflow is scaled down first: an entry of 1e30 in float32 is clipped like
    any other. The result is measured once more, and is zero if it were too long for any reason. All that is computed in
    float32 at least; in a narrower dtype, which the result keeps, its entries are rounded toward zero.

    Example:
      clipped(jnp.array([3.0, 4.0]), 1.0)  # [0.6, 0.8], but for rounding
    """
    wide = trees.widened(vector)
    numbers, bound = jnp.finfo(wide.dtype), jnp.asarray(bound, wide.dtype)
    huge = jnp.max(jnp.abs(wide)) > numbers.max**0.4
    small = jnp.where(huge, wide * numbers.max**-0.6, wide)
    inside, length = bound * (1 - ROUNDING * numbers.eps), trees.length(small)
    result = jnp.where(~huge & (length <= inside), wide, inside * trees.ratio(small, length))
    sound = jnp.all(jnp.isfinite(wide)) & (trees.length(result) <= bound)
    return _toward_zero(jnp.where(sound, result, 0), vector.dtype)


def _toward_zero(vector: jax.Array, dtype) -> jax.Array:
    """The vector in a dtype that may be narrower, no entry larger than it was."""
    if dtype == vector.dtype:
        return vector
    rounded = vector.astype(dtype)
    return jnp.where(jnp.abs(rounded) > jnp.abs(vector), jnp.nextafter(rounded, jnp.zeros_like(rounded)), rounded)


def noisy_sum(
    key: jax.Array, rows: jax.Array, present: jax.Array, bound: jax.Array | float, noise: jax.Array | float
) -> jax.Array:
    """The sum [P] of the clipped rows of those that are present, and noise z C on every number of it.

    Args:
      key: of the noise; secret, and used for this sum alone.
      rows: [C, P], what each client sends, after every weighting, projection and whitening.
      present: [C] bool; whoever is not adds nothing.
      bound: C, the most that one client's row may be long.
      noise: z, the noise multiplier.

    Returns:
      The sum in the rows' dtype, to which it is rounded at the end: clips, sum and noise are of float32 at least.

    Raises:
      ValueError: shapes do not fit; the bound or the noise, where it is not traced, is negative or NaN.
    """
    if rows.ndim != 2 or present.shape != rows.shape[:1]:
        raise ValueError(f"rows: needed shape [C, P] and present [C], got {rows.shape} and {present.shape}")
    contracts.at_least(0, bound=bound, noise=noise)
    wide = trees.widened(rows)
    kept = trees.zero_unless(present, jax.vmap(clipped, in_axes=(0, None))(wide, bound))
    total = jnp.sum(kept, axis=0) + noise * bound * jax.random.normal(key, wide.shape[1:], wide.dtype)
    return total.astype(rows.dtype)


def joint_multiplier(multipliers: Sequence[float]) -> float:
    """The multiplier of several blocks that one client sends together: z = (sum_i z_i^-2)^(-1/2).

    One Gaussian mechanism: of the blocks over their own noise the whole message has this sensitivity. Where clients are
    sampled the amplification counts once, for the joint z. It is 0 where a block has no noise, infinite of no blocks.

    Args:
      multipliers: Python's own numbers, as a plan's are: none is traced.

    Raises:
      ValueError: a multiplier is negative or NaN.
    """
    contracts.at_least(0, multipliers=multipliers)
    if 0 in multipliers:
        return 0.0
    length = math.hypot(*(1 / z for z in multipliers))
    return 1 / length if length else math.inf


def split_multiplier(noise: float, shares: Sequence[float]) -> list[float]:
    """The blocks' multipliers z_i = z / sqrt(share_i), whose joint one is z.

    Args:
      noise: z.
      shares: of the budget, one of each block; positive, and one in all.

    Raises:
      ValueError: a share is not positive, they do not sum to one, or the noise is negative or NaN.
    """
    contracts.at_least(0, noise=noise)
    if not (all(share > 0 for share in shares) and abs(sum(shares) - 1) <= WHOLE):
        raise ValueError(f"shares: needed positive numbers that sum to one, got {list(shares)}")
    return [noise / math.sqrt(share) for share in shares]


def svec(matrix: jax.Array) -> jax.Array:
    """A symmetric matrix [s, s] as a vector [s (s + 1) / 2] of the same norm: entries off the diagonal times sqrt 2.

    So white noise on the vector is noise of the Gaussian orthogonal ensemble on the matrix: of variance sigma^2 on the
    diagonal and sigma^2 / 2 above it (Dwork et al. 2014, "Analyze Gauss").
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: needed shape [s, s], got {matrix.shape}")
    rows, columns = jnp.triu_indices(matrix.shape[0])
    return matrix[rows, columns] * jnp.where(rows == columns, 1.0, math.sqrt(2)).astype(matrix.dtype)


def smat(vector: jax.Array, size: int) -> jax.Array:
    """The symmetric matrix [s, s] whose `svec` is the vector."""
    rows, columns = jnp.triu_indices(size)
    if vector.shape != rows.shape:
        raise ValueError(f"vector: needed shape {rows.shape}, of a matrix of {size} rows, got {vector.shape}")
    entries = vector / jnp.where(rows == columns, 1.0, math.sqrt(2)).astype(vector.dtype)
    upper = jnp.zeros([size, size], vector.dtype).at[rows, columns].set(entries)
    return upper + upper.T - jnp.diag(jnp.diag(upper))


def above_noise(matrix: jax.Array, deviation: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(eigenvalues [s], eigenvectors [s, s]) of a released matrix, none below what noise alone reaches.

    The largest eigenvalue of the noise that `svec` puts on a matrix is about sigma sqrt(2 s): what is below it says
    nothing, and is lifted to it.

    Args:
      deviation: sigma, of the noise on the `svec`.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, deviation * math.sqrt(2 * matrix.shape[0])), vectors


class Frame(NamedTuple):
    """Coordinates in which clients train and are clipped: theta = start + W v, W = I + U (diag(scale) - I) U^T.

    Where D is below P, W acts on each column of v as a matrix [D, P / D]: on a dense layer's bias and kernel, say.
    """

    basis: jax.Array  # [D, R], U: orthonormal columns, or zero
    scale: jax.Array  # [R], positive


def whitened(sketch: Sketch, damping: jax.Array | float) -> Frame:
    """The frame W = (H / beta + I)^(-1/2) of a curvature H that costs no privacy, by its eigenpairs.

    In it the curvature is at most beta: what the data pin down moves little, and the clip is not spent on it.
    beta -> infinity is the plain frame, in which this is DP-FedAvg.

    Args:
      sketch: of H.
      damping: beta.
    """
    return Frame(sketch.basis, jax.lax.rsqrt(sketch.eigenvalues / damping + 1))


def frame_of_rows(rows: jax.Array, rank: int, damping: jax.Array | float) -> Frame:
    """The frame W = (A^T A / beta + I)^(-1/2) of public rows A [M, P], from its `rank` largest eigenpairs.

    By the smaller of A^T A and A A^T: a fifth of the time of an exact decomposition. What its rounding blurs, below
    1e-6 of the largest eigenvalue, is left as it is; rows that are not finite are taken for none. Whatever W is,
    privacy is the same: it knows no client.
    """
    number, size = rows.shape
    rows, scale = near_one(jnp.where(jnp.all(jnp.isfinite(rows)), rows, 0))
    with jax.default_matmul_precision("highest"):
        if size <= number:
            values, vectors = (pairs[..., -rank:] for pairs in jnp.linalg.eigh(rows.T @ rows))
        else:
            values, left = (pairs[..., -rank:] for pairs in jnp.linalg.eigh(rows @ rows.T))
            vectors = trees.ratio(rows.T @ left, jnp.sqrt(jnp.maximum(values, 0))[None])
    sound = values > 1e-6 * values[-1]
    kept = Sketch(jnp.where(sound, values, 0), jnp.where(sound[None], vectors, 0))
    return whitened(kept, damping / scale / scale)


def released_frame(key: jax.Array, moments: jax.Array, noise: jax.Array | float, damping: jax.Array | float) -> Frame:
    """The frame of the clients' mean second moment, which is released once under noise.

    For softmax and a dense layer the curvature is about a multiple of A kron I: so W acts on the layer's inputs alone.
    Each client's matrix is clipped to norm 1: what counts is the directions of its features, not their length.

    Args:
      key: of the noise, secret.
      moments: [T, D, D], of every client (1/N_m) sum_n phi_n phi_n^T.
      noise: the multiplier of this release.
      damping: beta, in units of a clipped matrix.
    """
    clients, size, _ = moments.shape
    total = noisy_sum(key, jax.vmap(svec)(moments), jnp.ones([clients], bool), 1.0, noise)
    values, vectors = above_noise(smat(total / clients, size), noise / clients)
    return Frame(vectors, jax.lax.rsqrt(values / damping + 1))


def plain_frame(size: int, rank: int, dtype) -> Frame:
    """The frame W = I, of the given shapes."""
    return Frame(jnp.zeros([size, rank], dtype), jnp.ones([rank], dtype))


def out_of(frame: Frame, vector: jax.Array) -> jax.Array:
    """W v [P]: what a change v in the frame is of the parameters."""
    columns = vector.reshape(frame.basis.shape[0], -1)
    with jax.default_matmul_precision("highest"):
        inside = frame.basis.T @ columns
        moved = columns + frame.basis @ ((frame.scale - 1)[:, None] * inside)
    return moved.reshape(-1)
