"""Has a search for eigenpairs overlooked any? A fresh random block is asked, away from all that was searched.

A Krylov space grown from b random columns holds at most b copies of a multiple eigenvalue, and one grown from a wrong
start may hold none of a large one: small residuals do not show it. What is overlooked is then an eigenvector v,
H v = mu v, orthogonal to the searched space Q. So Lanczos runs from random normal columns G in the complement of Q, on
D = (I - Q Q^T) H (I - Q Q^T). Its space has an orthonormal basis V, G = V_1 B, and T = V^T D V is block tridiagonal.
A Ritz value above the bound proves that something is overlooked. Without one, mu is not above the bound beta unless

    |z|^2 <= tr(B^T W_1 (I + W^T W)^{-1} W_1^T B),    W = (beta I - T_11)^{-1} T_12,

with z = G^T v, T_11 the blocks of T but for the last, and T_12 the last one beside them: V^T v is a null vector of
(T - mu I)'s rows but the last, of length at most 1, and the right side falls with mu (the Christoffel function of the
block's spectral measure; for one column see Golub & Meurant 2010, chapter 3). z is standard normal, whatever H and Q
are: the probability that |z|^2 is so small is known, and the search goes on until it is at most `RISK`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.curvature.products import Curvature
from fipa_jax.derivatives import vary_with

RISK = 1e-3  # that an overlooked eigenvector goes unnoticed
WIDTH = 2  # columns of the random block; a narrow one is the cheapest for a given risk
DEPTH = 16  # blocks that it may take, after which nothing is said
USUAL = 10  # products that it takes on most spectra
_SMALLEST = -2 * math.log1p(-RISK)  # |z|^2 of two standard normal numbers is smaller with probability RISK


class Answer(NamedTuple):
    """What the fresh block has seen."""

    sure: jax.Array  # [] bool, nothing above the bound was overlooked, but for the risk
    beyond: jax.Array  # [], the largest Ritz value outside of the searched space; -inf if nobody asked
    products: jax.Array  # [] int32, columns multiplied by H


class _Chain(NamedTuple):
    """A Krylov space while it grows; blocks that are not there are zero."""

    basis: jax.Array  # V [P, WIDTH DEPTH]
    images: jax.Array  # H V, in units of the largest eigenvalue
    new: jax.Array  # [P, WIDTH], where the next block comes from
    root: jax.Array  # B [WIDTH, WIDTH]
    answer: Answer


def ask(fresh, matrix: Curvature, searched, eigenvalues, tolerance, wanted) -> Answer:
    """Whether an eigenvalue above lam_R + tolerance lam_1 belongs to a vector outside of the searched space.

    Args:
      fresh: G [P, WIDTH], standard normal columns of which nothing else depends.
      searched: Q [P, M], orthonormal columns, or zero ones.
      eigenvalues: [R], what was found in it, from the largest.
      tolerance: of lam_1; more than 1 is taken for 1.
      wanted: [] bool; without it nothing is multiplied, and the answer is not `sure`.

    Returns:
      The Answer. It stops as soon as it is sure, or has seen a value above the upper half of the eigenvalues.
    """
    searched, eigenvalues = jax.lax.stop_gradient((searched, eigenvalues))
    unit = jnp.where(eigenvalues[0] > 0, eigenvalues[0], 1)
    # Above zero, for a matrix of zeros.
    bound = jnp.maximum(eigenvalues[-1] / unit + jnp.minimum(tolerance, 1), jnp.finfo(matrix.dtype).eps)
    clear = jnp.maximum(bound, eigenvalues[(len(eigenvalues) - 1) // 2] / unit)

    def grow(j, chain: _Chain) -> _Chain:
        def step(chain: _Chain) -> _Chain:
            new, root = _block(chain.new, (searched, chain.basis))
            image = jax.lax.stop_gradient(matrix.product(new)) / unit
            at = (0, WIDTH * j)
            basis = jax.lax.dynamic_update_slice(chain.basis, new, at)
            images = jax.lax.dynamic_update_slice(chain.images, image, at)
            root = jnp.where(j == 0, root, chain.root)
            beyond, smallness = _seen(basis.T @ images, root, j, bound)
            sure = (j > 0) & (beyond <= bound) & (smallness <= _SMALLEST)
            answer = Answer(sure, beyond * unit, chain.answer.products + WIDTH)
            return _Chain(basis, images, image, root, answer)

        going = wanted & ~chain.answer.sure & ~(chain.answer.beyond > clear * unit)
        return for_anyone(going, step, chain)

    empty = jnp.zeros([matrix.size, WIDTH * DEPTH], matrix.dtype)
    nothing = Answer(jnp.array(False), jnp.asarray(-jnp.inf, matrix.dtype), jnp.int32(0))
    root = jnp.zeros([WIDTH, WIDTH], matrix.dtype)
    if matrix.size < WIDTH:  # a space of one dimension was searched all through
        return nothing._replace(sure=jnp.asarray(wanted))
    chain = vary_with(_Chain(empty, empty, fresh, root, nothing), searched, eigenvalues, wanted)
    return jax.lax.fori_loop(0, DEPTH, grow, chain).answer


def _block(new, spaces):
    """(V_j [P, b], B [b, b]): new = V_j B orthogonal to the spaces; columns of which only rounding is left are zero."""
    scale = jnp.max(jnp.abs(new))
    new = new / jnp.where(scale > 0, scale, 1)

    def reduce(new):
        for space in spaces:
            new = new - space @ (space.T @ new)
        return jnp.linalg.qr(new)

    size = jnp.max(jnp.linalg.norm(new, axis=0))
    new, first = reduce(new)
    left = jnp.abs(jnp.diag(first)) > 100 * jnp.finfo(new.dtype).eps * size
    new, second = reduce(jnp.where(left[None], new, 0))
    return jnp.where(left[None], new, 0), second @ first * scale


def _seen(projected, root, j, bound):
    """(the largest Ritz value, the bound on |z|^2 in the module's equation) of blocks 0 to j, T [m, m] padded by 0."""
    projected = (projected + projected.T) / 2
    beyond = jnp.linalg.eigvalsh(projected)[-1]
    column = jnp.arange(len(projected))
    before, last = column < WIDTH * j, jax.lax.dynamic_slice_in_dim(projected, WIDTH * j, WIDTH, axis=1)
    inner = jnp.where(before[:, None] & before[None], projected, 0)
    # Only used where all Ritz values are below the bound, which makes it positive definite.
    coupling = jnp.linalg.solve(bound * jnp.eye(len(column), dtype=root.dtype) - inner, last * before[:, None])
    spread = jnp.eye(WIDTH, dtype=root.dtype) + coupling.T @ coupling
    first = root.T @ coupling[:WIDTH]
    return beyond, jnp.trace(first @ jnp.linalg.solve(spread, first.T))


def for_anyone(active, step: Callable, state):
    """step(state) where it is active [] bool, else the state; computed only if some client of a vmap is active."""

    def taken(state):
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), step(state), state)

    return jax.lax.cond(_any(active), taken, lambda state: state, state)


@jax.custom_batching.custom_vmap
def _any(active):
    """The flag itself; of clients side by side whether any has it, so that a `cond` stays one."""
    return active


@_any.def_vmap
def _any_of_all(axis_size, in_batched, active):
    return _any(jnp.any(active)), False
