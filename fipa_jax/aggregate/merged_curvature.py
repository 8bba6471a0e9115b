"""How do many sketches become one? By the factor F of H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m   [P, D], D = C R

F itself is never held: two passes over blocks of its rows, one that factorises F^T F = V diag(lam) V^T and projects
the updates, one that multiplies F by the coefficients of the step. Beside the uploads only one block is alive. Sketches
of several ranks, such as the clients' and the server's memory of them, stand side by side in F as `Part`s.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature.sketch import Sketch

BLOCK = 2**22  # entries of F in one block of rows
ROUNDING = 100.0  # eigenvalues of H below so many eps^2 of the largest are noise


class Part(NamedTuple):
    """Sketches of one rank, and what each one's curvature is applied to."""

    weights: jax.Array  # [C]; one of weight 0 may hold anything, NaN included
    sketch: Sketch  # eigenvalues [C, R], basis [C, P, R] in any floating-point dtype
    targets: Callable  # (first row, number of rows b) -> [C, b], those rows


class Merged(NamedTuple):
    """The eigenvalues of H within span(F), functions of H applied to what was projected, and H's own top pairs."""

    spectrum: jax.Array  # [D], descending: H's non-zero eigenvalues, the squares of F's singular values
    solve: Callable  # (filter: eigenvalues [D] -> [D]) -> F V diag(filter) V^T z [P], z = F^T targets
    quadratic: Callable  # (vector [P]) -> its vector^T H vector []
    top: Callable  # (rank) -> Sketch of H, eigenvalues [rank] and basis [P, rank]; pairs beyond D are zero


def merge(parts: Sequence[Part], method: str = "auto") -> Merged:
    """Factorises the merged curvature, in float64 arithmetic where the device has it.

    With nearly collinear clients the entries of F c cancel to eps / beta of their size, and the rounding of z is
    amplified as much: in float32 alone steps are off by 1e-4. The uploads are read in their own precision all the same,
    and the step has that of the weights.

    Args:
      parts: what stands side by side in F; D is the sum of their C R.
      method: how F^T F is factorised, `auto` picks by `choose`. `qr`: the triangle of F at once (the paper's merge).
        `tsqr`: the triangle of each block stacked on the one before. `gram`: F^T F summed over blocks.

    Raises:
      ValueError: the method is not known.
    """
    dtype, size = parts[0].weights.dtype, parts[0].sketch.basis.shape[1]
    bases = [part.sketch.basis for part in parts]
    edges = np.cumsum([0, *(basis.shape[0] * basis.shape[2] for basis in bases)])  # of the parts' columns in F
    width = int(edges[-1])
    if method not in METHODS and method != "auto":
        raise ValueError(f"aggregator.merge: unknown {method!r}; known: auto, {', '.join(sorted(METHODS))}")
    if method == "auto":
        method = choose(size, width, dtype, jax.default_backend())
    scales = [_scale(part, dtype) for part in parts]  # [C, R] each
    length = size if method == "qr" else min(size, max(BLOCK // width, 2 * width))
    add, factorise = METHODS[method]
    wide = jnp.float64 if jax.default_backend() in DOUBLE else dtype

    def block(bases, start):
        """(first row, rows [C, b, R] of each part's columns of F); the last block's start is moved back, and what it
        repeats is zero."""
        begin = jnp.minimum(start, size - length)
        new = begin + jnp.arange(length, dtype=jnp.int32) >= start

        def rows(basis, scale):
            part = jax.lax.dynamic_slice_in_dim(basis, begin, length, axis=1).astype(wide)
            counts = new[None, :, None] & (scale > 0)[:, None, :]
            return jnp.where(counts, part * scale.astype(wide)[:, None, :], 0)

        return begin, list(map(rows, bases, scales))

    def side_by_side(rows):
        """[b, D]."""
        return jnp.concatenate([jnp.transpose(part, (1, 0, 2)).reshape(length, -1) for part in rows], axis=1)

    def over_blocks(visit, initial):
        if length == size:
            return visit(bases, jnp.int32(0), initial)

        def body(i, carry):
            # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
            bases, inner = carry
            bases, i = jax.lax.optimization_barrier((bases, i))
            return bases, visit(bases, i * length, inner)

        # int32, as int64 would outlive the scope of `_arithmetic` where a vmap traces this anew.
        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-size // length)), body, (bases, initial))[1]

    def first_pass(bases, start, carry):
        reduced, projected = carry
        begin, rows = block(bases, start)
        along = lambda rows, target: jax.lax.dot_general(rows, target, (((1,), (1,)), ((0,), (0,))))
        found = [along(own, part.targets(begin, length).astype(wide)) for part, own in zip(parts, rows, strict=True)]
        projected = [old + new for old, new in zip(projected, found, strict=True)]
        return add(reduced, side_by_side(rows)), projected

    with _arithmetic(wide):
        start = jnp.zeros([width, width], wide), [jnp.zeros(scale.shape, wide) for scale in scales]
        reduced, projected = over_blocks(first_pass, start)
        spectrum, right = factorise(reduced)
        projected = _dot(right, jnp.concatenate([each.reshape(-1) for each in projected]))

    def write(total, rows, begin, start):
        # The rows that the last block repeats are zero in it: they must not be written.
        old = jax.lax.dynamic_slice_in_dim(total, begin, length)
        new = begin + jnp.arange(length, dtype=jnp.int32) >= start
        rows = jnp.where(new.reshape(-1, *[1] * (rows.ndim - 1)), rows.astype(dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(total, rows, begin, 0)

    def solve(filter):
        with _arithmetic(wide):
            coefficients = _dot(right.T, filter(spectrum) * projected)
            each = [coefficients[a:b].reshape(s.shape) for a, b, s in zip(edges, edges[1:], scales, strict=False)]

            def second_pass(bases, start, total):
                begin, rows = block(bases, start)
                along = lambda rows, c: jax.lax.dot_general(rows, c, (((0, 2), (0, 1)), ((), ())))
                return write(total, sum(map(along, rows, each)), begin, start)

            return over_blocks(second_pass, jnp.zeros([size], dtype))

    def quadratic(vector):
        with _arithmetic(wide):

            def second_pass(bases, start, total):
                begin, rows = block(bases, start)
                part = jax.lax.dynamic_slice_in_dim(vector, begin, length).astype(wide)
                along = lambda rows: jax.lax.dot_general(rows, part, (((1,), (0,)), ((), ())))
                return [old + along(own) for old, own in zip(total, rows, strict=True)]

            image = over_blocks(second_pass, [jnp.zeros(scale.shape, wide) for scale in scales])  # F^T vector
            return sum(jnp.sum(each**2) for each in image).astype(dtype)

    def top(rank):
        with _arithmetic(wide):
            kept = min(rank, spectrum.size)
            values = spectrum[:kept]
            # F V lam^{-1/2}. What is at rounding level beside the largest has no direction.
            there = values > ROUNDING * jnp.finfo(dtype).eps ** 2 * spectrum[0]
            scaled = right[:kept].T * jnp.where(there, 1 / jnp.sqrt(jnp.where(there, values, 1)), 0)[None]

            def second_pass(bases, start, total):
                begin, rows = block(bases, start)
                found = jax.lax.dot_general(side_by_side(rows), scaled, (((1,), (0,)), ((), ())))
                return write(total, found, begin, start)

            basis = over_blocks(second_pass, jnp.zeros([size, kept], dtype))
            values = jnp.where(there, values, 0).astype(dtype)
            pad = rank - kept
            return Sketch(jnp.pad(values, (0, pad)), jnp.pad(basis, ((0, 0), (0, pad))))

    with _arithmetic(wide):
        return Merged(spectrum.astype(dtype), solve, quadratic, top)


def _scale(part: Part, dtype):
    """sqrt(w_m lam_m) [C, R]."""
    eigenvalues = part.sketch.eigenvalues.astype(dtype)
    # A zero eigenvalue may come out of a solver as a slightly negative one.
    eigenvalues = jnp.where(part.weights[:, None] > 0, jnp.maximum(eigenvalues, 0), 0)
    return jnp.sqrt(part.weights[:, None] * eigenvalues)


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
