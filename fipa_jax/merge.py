"""How do the clients' sketches become one? By the factor F of H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m   [P, D], D = C R

F itself is never held: two passes over blocks of its rows, one that factorises F^T F = V diag(s)^2 V^T and projects the
updates, one that adds F c to the step. Beside the uploads only one block is alive.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.sketch import Sketch

BLOCK = 2**22  # entries of F in one block of rows


class Merged(NamedTuple):
    """The singular values and right singular vectors of F, and its products, streamed."""

    singular_values: jax.Array  # [D], descending; their squares are the non-zero eigenvalues of H
    right: jax.Array  # [D, D], V^T
    projected: jax.Array  # [D], z: for each client its part of F^T, times its target
    combine: Callable  # c [D] -> F c [P]


def merge(weights: jax.Array, sketch: Sketch, targets: Callable, method: str = "auto") -> Merged:
    """Factorises the clients' merged curvature.

    Args:
      weights: [C], summing to one; a client of weight 0 may hold anything, NaN included.
      sketch: eigenvalues [C, R], basis [C, P, R] in any floating-point dtype.
      targets: (first row, number of rows b) -> [C, b], those rows of what each client's curvature is applied to.
      method: how F^T F is factorised, `auto` picks by `choose`. `qr`: the triangle of F at once (the paper's merge).
        `tsqr`: the triangle of each block stacked on the one before, in the parameters' precision. `gram`: F^T F
        summed over blocks and decomposed in float64, whatever the parameters' precision: its error is that of
        float64's square root, 1e-8 of the largest singular value, below float32's rounding.

    Returns:
      Merged; its arrays have the dtype of `weights`.

    Raises:
      ValueError: the method is not known.
    """
    clients, size, rank = sketch.basis.shape
    dtype, width = weights.dtype, clients * rank
    if method not in METHODS and method != "auto":
        raise ValueError(f"aggregator.merge: unknown {method!r}; known: auto, {', '.join(sorted(METHODS))}")
    if method == "auto":
        method = choose(size, width, dtype, jax.default_backend())
    # A zero eigenvalue may come out of a solver as a slightly negative one.
    eigenvalues = jnp.where(weights[:, None] > 0, jnp.maximum(sketch.eigenvalues.astype(dtype), 0), 0)
    scale = jnp.sqrt(weights[:, None] * eigenvalues)  # [C, R]
    length = size if method == "qr" else min(size, max(BLOCK // width, 2 * width))

    def block(start):
        """Rows [b, D] of F; the last block's start is moved back, the rows it repeats are zero."""
        begin = jnp.minimum(start, size - length)
        part = jax.lax.dynamic_slice_in_dim(sketch.basis, begin, length, axis=1).astype(dtype)
        new = begin + jnp.arange(length) >= start
        part = jnp.where(new[None, :, None] & (scale > 0)[:, None, :], part * scale[:, None, :], 0)
        return begin, part

    def over_blocks(visit, initial):
        if length == size:
            return visit(0, initial)
        return jax.lax.fori_loop(0, -(-size // length), lambda i, carry: visit(i * length, carry), initial)

    add, factorise, empty = METHODS[method]

    def first_pass(start, carry):
        reduced, projected = carry
        begin, part = block(start)
        projected += jnp.einsum("cbr,cb->cr", part, targets(begin, length))
        return add(reduced, jnp.transpose(part, (1, 0, 2)).reshape(length, width)), projected

    with jax.default_matmul_precision("highest"):
        reduced, projected = over_blocks(first_pass, (empty(width, dtype), jnp.zeros_like(scale)))
        singular_values, right = factorise(reduced)

    def combine(coefficients):
        coefficients = (scale * coefficients.reshape(scale.shape)).astype(dtype)

        def second_pass(start, total):
            begin = jnp.minimum(start, size - length)
            part = jax.lax.dynamic_slice_in_dim(sketch.basis, begin, length, axis=1).astype(dtype)
            part = jnp.where((scale > 0)[:, None, :], part, 0)
            rows = jnp.einsum("cbr,cr->b", part, coefficients, precision="highest")
            return jax.lax.dynamic_update_slice(total, rows, (begin,))

        return over_blocks(second_pass, jnp.zeros([size], dtype))

    return Merged(singular_values.astype(dtype), right.astype(dtype), projected.reshape(-1), combine)


def choose(size: int, width: int, dtype, backend: str) -> str:
    """The rule of `auto`, for F [P, D]: `qr` where it takes a fraction of a second, else one of the streamed forms.

    That is `gram`, which is as exact as a QR in float32 and runs at a product's speed; but `tsqr` for parameters in
    float64, of which a Gram matrix would lose half the digits, and on devices without float64 arithmetic. (There a Gram
    matrix summed with compensation would not do either: its eigenvalues too have to be found in more than float32.)
    """
    if size * width**2 <= 2**30:
        return "qr"
    return "gram" if dtype == jnp.float32 and backend in ("cpu", "gpu", "cuda", "rocm") else "tsqr"


def _triangle(reduced, part):
    return jnp.linalg.qr(jnp.concatenate([reduced, part]), mode="r")


def _of_triangle(triangle):
    _, singular_values, right = jnp.linalg.svd(triangle, full_matrices=False)
    return singular_values, right


def _add_gram(gram, part):
    with jax.enable_x64(True):
        part = part.astype(jnp.float64)
        # Not `part.T @ part`: it names its result's dtype, which a vmap outside of this scope would read as float32.
        return gram + jax.lax.dot_general(part, part, (((0,), (0,)), ((), ())))


def _of_gram(gram):
    with jax.enable_x64(True):
        eigenvalues, vectors = jnp.linalg.eigh(gram)
        return jnp.sqrt(jnp.maximum(eigenvalues[::-1], 0)), vectors[:, ::-1].T


def _no_gram(width, dtype):
    with jax.enable_x64(True):
        return jnp.zeros([width, width], jnp.float64)


def _no_triangle(width, dtype):
    return jnp.zeros([width, width], dtype)


# How a block of F is added, how the sum is decomposed, and the sum of no blocks.
METHODS = {
    "gram": (_add_gram, _of_gram, _no_gram),
    "qr": (_triangle, _of_triangle, _no_triangle),
    "tsqr": (_triangle, _of_triangle, _no_triangle),
}
