"""How do the clients' sketches become one? By the factor F of H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m   [P, D], D = C R

F itself is never held: two passes over blocks of its rows, one that factorises F^T F = V diag(lam) V^T and projects
the updates, one that multiplies F by the coefficients of the step. Beside the uploads only one block is alive.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.sketch import Sketch

BLOCK = 2**22  # entries of F in one block of rows


class Merged(NamedTuple):
    """The eigenvalues of H within span(F), and functions of H applied to what was projected."""

    spectrum: jax.Array  # [D], descending: H's non-zero eigenvalues, the squares of F's singular values
    solve: Callable  # (filter: eigenvalues [D] -> [D]) -> F V diag(filter) V^T z [P], z = F^T targets


def merge(weights: jax.Array, sketch: Sketch, targets: Callable, method: str = "auto") -> Merged:
    """Factorises the clients' merged curvature, in float64 arithmetic where the device has it.

    With nearly collinear clients the entries of F c cancel to eps / beta of their size, and the rounding of z is
    amplified as much: in float32 alone steps are off by 1e-4. The uploads are read in their own precision all the same,
    and the step has that of `weights`.

    Args:
      weights: [C], summing to one; a client of weight 0 may hold anything, NaN included.
      sketch: eigenvalues [C, R], basis [C, P, R] in any floating-point dtype.
      targets: (first row, number of rows b) -> [C, b], those rows of what each client's curvature is applied to.
      method: how F^T F is factorised, `auto` picks by `choose`. `qr`: the triangle of F at once (the paper's merge).
        `tsqr`: the triangle of each block stacked on the one before. `gram`: F^T F summed over blocks.

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
    add, factorise = METHODS[method]
    wide = jnp.float64 if jax.default_backend() in DOUBLE else dtype

    def block(basis, start):
        """Rows [C, b, R] of the clients' parts of F; the last block's start is moved back, what it repeats is zero."""
        begin = jnp.minimum(start, size - length)
        part = jax.lax.dynamic_slice_in_dim(basis, begin, length, axis=1).astype(wide)
        new = begin + jnp.arange(length, dtype=jnp.int32) >= start
        return begin, jnp.where(new[None, :, None] & (scale > 0)[:, None, :], part * scale.astype(wide)[:, None, :], 0)

    def over_blocks(visit, initial):
        if length == size:
            return visit(sketch.basis, jnp.int32(0), initial)

        def body(i, carry):
            # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
            basis, inner = carry
            basis, i = jax.lax.optimization_barrier((basis, i))
            return basis, visit(basis, i * length, inner)

        # int32, as int64 would outlive the scope of `_arithmetic` where a vmap traces this anew.
        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-size // length)), body, (sketch.basis, initial))[1]

    def first_pass(basis, start, carry):
        reduced, projected = carry
        begin, part = block(basis, start)
        target = targets(begin, length).astype(wide)
        projected += jax.lax.dot_general(part, target, (((1,), (1,)), ((0,), (0,))))
        return add(reduced, jnp.transpose(part, (1, 0, 2)).reshape(length, width)), projected

    with _arithmetic(wide):
        start = jnp.zeros([width, width], wide), jnp.zeros(scale.shape, wide)
        reduced, projected = over_blocks(first_pass, start)
        spectrum, right = factorise(reduced)
        projected = _dot(right, projected.reshape(-1))

    def solve(filter):
        with _arithmetic(wide):
            coefficients = _dot(right.T, filter(spectrum) * projected).reshape(scale.shape)

            def second_pass(basis, start, total):
                begin, part = block(basis, start)
                rows = jax.lax.dot_general(part, coefficients, (((0, 2), (0, 1)), ((), ()))).astype(dtype)
                # The rows that the last block repeats are zero in it: they must not be written.
                old = jax.lax.dynamic_slice(total, (begin,), (length,))
                rows = jnp.where(begin + jnp.arange(length, dtype=jnp.int32) >= start, rows, old)
                return jax.lax.dynamic_update_slice(total, rows, (begin,))

            return over_blocks(second_pass, jnp.zeros([size], dtype))

    with _arithmetic(wide):
        return Merged(spectrum.astype(dtype), solve)


def choose(size: int, width: int, dtype, backend: str) -> str:
    """The rule of `auto`, for F [P, D].

    `gram` for float32 on devices with float64: its error, that of float64's square root, is below float32's rounding,
    and it runs at a product's speed. Otherwise, as a Gram matrix would lose half of the digits, `qr` where that takes a
    fraction of a second, and `tsqr` for more. (A Gram matrix summed with compensation would not do on devices without
    float64: its eigenvalues too would have to be found in more than float32.)
    """
    if dtype == jnp.float32 and backend in DOUBLE:
        return "gram"
    return "qr" if size * width**2 <= 2**30 else "tsqr"


DOUBLE = ("cpu", "cuda", "gpu", "rocm")  # backends with float64 arithmetic


@contextlib.contextmanager
def _arithmetic(wide):
    """Highest precision of products; float64 where asked for, whatever the process is set to."""
    with jax.default_matmul_precision("highest"), jax.enable_x64(wide == jnp.float64):
        yield


def _dot(matrix, vector):
    # Not `@`, which names its result's dtype: a vmap outside of `_arithmetic` would read float64 as float32.
    return jax.lax.dot_general(matrix, vector, (((1,), (0,)), ((), ())))


def _triangle(reduced, part):
    return jnp.linalg.qr(jnp.concatenate([reduced, part]), mode="r")


def _of_triangle(triangle):
    _, singular_values, right = jnp.linalg.svd(triangle, full_matrices=False)
    return singular_values**2, right


def _gram(reduced, part):
    return reduced + jax.lax.dot_general(part, part, (((0,), (0,)), ((), ())))


def _of_gram(gram):
    eigenvalues, vectors = jnp.linalg.eigh(gram)
    return jnp.maximum(eigenvalues[::-1], 0), vectors[:, ::-1].T


# How a block of F is added to a [D, D] sum that starts at zero, and the sum's (spectrum, V^T).
METHODS = {"gram": (_gram, _of_gram), "qr": (_triangle, _of_triangle), "tsqr": (_triangle, _of_triangle)}
