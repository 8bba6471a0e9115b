"""How is F^T F summed over blocks of rows, and factorised? As a triangle, or as a Gram matrix of which half is formed.

A sum starts at zero, `add` puts one more block of rows to it, `join` makes one of two sums over different rows.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

PANEL = 256  # columns that are multiplied together with those to their right


class Factorisation(NamedTuple):
    """A way to factorise F^T F = V diag(lam) V^T."""

    add: Callable[[jax.Array, jax.Array], jax.Array]  # (sum [D, D], block [b, D]) -> sum
    join: Callable[[jax.Array, jax.Array], jax.Array]  # (sum, sum) -> sum
    factorise: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # sum -> (lam [D], V^T [D, D])


def _triangle(reduced: jax.Array, part: jax.Array) -> jax.Array:
    return jnp.linalg.qr(jnp.concatenate([reduced, part]), mode="r")


def _of_triangle(triangle: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, singular_values, right = jnp.linalg.svd(triangle, full_matrices=False)
    return singular_values**2, right


def add_gram(reduced: jax.Array, part: jax.Array) -> jax.Array:
    """The sum with one more block: of a wide F the panels on and right of the diagonal alone, see `whole`."""
    width = part.shape[1]

    def product(first: int, last: int) -> jax.Array:
        return jax.lax.dot_general(part[:, first:last], part[:, first:], (((0,), (0,)), ((), ())))

    if width < 2 * PANEL:
        return reduced + product(0, width)
    edges = [*range(0, width, PANEL), width]
    panels = [jnp.pad(product(a, b), [(0, 0), (a, 0)]) for a, b in itertools.pairwise(edges)]
    return reduced + jnp.concatenate(panels)


def whole(gram: jax.Array) -> jax.Array:
    """The symmetric matrix of which the upper triangle is given."""
    if len(gram) < 2 * PANEL:
        return gram
    upper = jnp.triu(jnp.ones(gram.shape, bool))
    return jnp.where(upper, gram, gram.T)


def _of_gram(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    eigenvalues, vectors = jnp.linalg.eigh(whole(gram))
    return jnp.maximum(eigenvalues[::-1], 0), vectors[:, ::-1].T


METHODS = {
    "gram": Factorisation(add_gram, jnp.add, _of_gram),
    "qr": Factorisation(_triangle, _triangle, _of_triangle),
    "tsqr": Factorisation(_triangle, _triangle, _of_triangle),
}


@contextlib.contextmanager
def arithmetic(wide):
    """Highest precision of products; float64 where asked for, whatever the process is set to."""
    with jax.default_matmul_precision("highest"), jax.enable_x64(wide == jnp.float64):
        yield


def dot(matrix, vector):
    """matrix @ vector."""
    # Not `@`, which names its result's dtype: a vmap outside of `arithmetic` would read float64 as float32.
    return jax.lax.dot_general(matrix, vector, (((1,), (0,)), ((), ())))


def dot_all(left, right):
    """`dot` of two matrices."""
    return jax.lax.dot_general(left, right, (((1,), (0,)), ((), ())))
