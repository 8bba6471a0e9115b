"""How do many sketches become one? By the factor F of H = sum_m w_m U_m diag(lam_m) U_m^T = F F^T.

    F = [sqrt(w_m) U_m diag(lam_m)^{1/2}]_m   [P, D], D = C R

What each direction is multiplied by, such as the pseudo-inverse, is a filter of H's eigenvalues: see `solvers`.
F itself is never held: `merge` passes over blocks of its rows, factorises F^T F = V diag(lam) V^T and projects the
updates; `solve`, `quadratic` and `top` pass over them once more. Beside the uploads only one block is alive. Sketches
of several ranks, such as the clients' and those of past rounds, stand side by side in F as `Part`s.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature.sketch import Sketch
from fipa_jax.lookup import lookup

BLOCK = 2**22  # entries of F in one block of rows
ROUNDING = 100.0  # eigenvalues of H below so many eps^2 of the largest are noise
DOUBLE = ("cpu", "cuda", "gpu", "rocm")  # backends with float64 arithmetic

Targets = Callable[[jax.Array, int], jax.Array]  # (first row, number of rows b) -> [C, b], those rows
Filter = Callable[[jax.Array], jax.Array]  # eigenvalues of H [D] -> what each direction is multiplied by [D]


class Part(NamedTuple):
    """Sketches of one rank, and what each one's curvature is applied to."""

    weights: jax.Array  # [C]; one of weight 0 may hold anything, NaN included
    sketch: Sketch  # eigenvalues [C, R], basis [C, P, R] in any floating-point dtype
    targets: Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """F by its blocks of columns, and its singular value decomposition F = U diag(lam)^{1/2} V^T without U.

    A pytree of arrays, which can leave a jit.
    """

    bases: list  # of each part [C, P, R], as they came
    scales: list  # of each part [C, R], sqrt(w_m lam_m)
    eigenvalues: jax.Array  # [D], descending: H's, the squares of F's singular values; float64 where there is any
    right: jax.Array  # [D, D], V^T
    projected: jax.Array  # [D], V^T F^T targets
    length: int = dataclasses.field(metadata={"static": True})  # rows in a block of a pass over F

    @property
    def spectrum(self) -> jax.Array:
        """[D], the eigenvalues in the precision of the updates."""
        return self.eigenvalues.astype(self.scales[0].dtype)


def merge(parts: Sequence[Part], method: str = "auto") -> Factor:
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
    check(method)
    dtype, bases = parts[0].weights.dtype, [part.sketch.basis for part in parts]
    scales = [_scale(part, dtype) for part in parts]
    size, width = bases[0].shape[1], sum(scale.size for scale in scales)
    if method == "auto":
        method = choose(size, width, dtype, jax.default_backend())
    add, factorise = METHODS[method]
    length = size if method == "qr" else min(size, max(BLOCK // width, 2 * width))
    wide = jnp.float64 if jax.default_backend() in DOUBLE else dtype

    def visit(bases, start, carry):
        reduced, projected = carry
        begin, blocks = _blocks(bases, scales, length, start, wide)
        along = [
            _along(rows, part.targets(begin, length).astype(wide)) for part, rows in zip(parts, blocks, strict=True)
        ]
        projected = [total + new for total, new in zip(projected, along, strict=True)]
        return add(reduced, _side_by_side(blocks)), projected

    with _arithmetic(wide):
        start = jnp.zeros([width, width], wide), [jnp.zeros(scale.shape, wide) for scale in scales]
        reduced, projected = over_row_blocks(bases, length, visit, start)
        eigenvalues, right = factorise(reduced)
        projected = _dot(right, jnp.concatenate([part.reshape(-1) for part in projected]))
        return Factor(bases, scales, eigenvalues, right, projected, length)


def solve(factor: Factor, inverse: Filter) -> jax.Array:
    """F V diag(inverse(lam)) V^T F^T targets [P]: a function of H applied to sum_m w_m H_m targets_m / lam."""
    with _arithmetic(factor.right.dtype):
        coefficients = _dot(factor.right.T, inverse(factor.eigenvalues) * factor.projected)
        edges = np.cumsum([0, *(scale.size for scale in factor.scales)])
        of_part = [
            coefficients[a:b].reshape(scale.shape) for a, b, scale in zip(edges, edges[1:], factor.scales, strict=False)
        ]

        def rows_of(blocks):
            products = [
                jax.lax.dot_general(rows, c, (((0, 2), (0, 1)), ((), ())))
                for rows, c in zip(blocks, of_part, strict=True)
            ]
            return sum(products)

        return _fill_rows(factor, rows_of, ())


def quadratic(factor: Factor, vector: jax.Array) -> jax.Array:
    """vector^T H vector [] of a vector [P]."""
    wide, dtype = factor.right.dtype, factor.scales[0].dtype
    length = factor.length
    with _arithmetic(wide):

        def visit(bases, start, total):
            begin, blocks = _blocks(bases, factor.scales, length, start, wide)
            part = jax.lax.dynamic_slice_in_dim(vector, begin, length).astype(wide)
            along = [jax.lax.dot_general(rows, part, (((1,), (0,)), ((), ()))) for rows in blocks]
            return [old + new for old, new in zip(total, along, strict=True)]

        blank = [jnp.zeros(scale.shape, wide) for scale in factor.scales]
        image = over_row_blocks(factor.bases, length, visit, blank)  # F^T vector
        return sum(jnp.sum(part**2) for part in image).astype(dtype)


def top(factor: Factor, rank: int) -> Sketch:
    """The first `rank` eigenpairs of H: eigenvalues [rank], basis [P, rank]; pairs beyond D, or of noise, are zero."""
    dtype = factor.scales[0].dtype
    with _arithmetic(factor.right.dtype):
        kept = min(rank, factor.eigenvalues.size)
        values = factor.eigenvalues[:kept]
        # F V lam^{-1/2}. What is at rounding level beside the largest has no direction.
        sound = values > ROUNDING * jnp.finfo(dtype).eps ** 2 * factor.eigenvalues[0]
        scaled = factor.right[:kept].T * jnp.where(sound, 1 / jnp.sqrt(jnp.where(sound, values, 1)), 0)[None]

        def rows_of(blocks):
            return jax.lax.dot_general(_side_by_side(blocks), scaled, (((1,), (0,)), ((), ())))

        basis = _fill_rows(factor, rows_of, (kept,))
        values = jnp.where(sound, values, 0).astype(dtype)
        pad = rank - kept
        return Sketch(jnp.pad(values, (0, pad)), jnp.pad(basis, ((0, 0), (0, pad))))


def check(method: str) -> None:
    """Refuses a method of `merge` that is not known, with a ValueError."""
    lookup({"auto": choose} | METHODS, method, "aggregator.merge")


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


def row_block(size: int, length: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first row, [length] bool: which rows are new) of the block at `start`.

    The last block's start is moved back so that all have one length; what it repeats is not new.
    """
    begin = jnp.minimum(start, size - length)
    return begin, begin + jnp.arange(length, dtype=jnp.int32) >= start


def over_row_blocks(bases: list, length: int, visit: Callable, initial: Any) -> Any:
    """carry <- visit(bases, start, carry) over blocks of so many rows of bases [C, P, R], one after another.

    Args:
      bases: read by `visit`, which is given them anew in each step.
      visit: see `row_block` for what a start means.
      initial: the first carry.
    """
    size = bases[0].shape[1]
    if length == size:
        return visit(bases, jnp.int32(0), initial)

    def body(i, carry):
        # Behind a barrier, or XLA converts a bfloat16 basis to float32 as a whole, before the loop.
        bases, inner = carry
        bases, i = jax.lax.optimization_barrier((bases, i))
        return bases, visit(bases, i * length, inner)

    # int32, as int64 would outlive the scope of `_arithmetic` where a vmap traces this anew.
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-size // length)), body, (bases, initial))[1]


def _blocks(bases: list, scales: list, length: int, start: jax.Array, wide) -> tuple[jax.Array, list]:
    """(first row, rows [C, b, R] of each part's columns of F); what the last block repeats is zero."""
    begin, new = row_block(bases[0].shape[1], length, start)

    def rows(basis, scale):
        part = jax.lax.dynamic_slice_in_dim(basis, begin, length, axis=1).astype(wide)
        counts = new[None, :, None] & (scale > 0)[:, None, :]
        return jnp.where(counts, part * scale.astype(wide)[:, None, :], 0)

    return begin, list(map(rows, bases, scales))


def _fill_rows(factor: Factor, rows_of: Callable, trailing: tuple) -> jax.Array:
    """[P, *trailing] in the updates' precision, of which rows_of(blocks of F) gives each block's rows."""
    size, length, dtype = factor.bases[0].shape[1], factor.length, factor.scales[0].dtype

    def visit(bases, start, total):
        begin, blocks = _blocks(bases, factor.scales, length, start, factor.right.dtype)
        rows = rows_of(blocks)
        # The rows that the last block repeats are zero in it: they must not be written.
        old = jax.lax.dynamic_slice_in_dim(total, begin, length)
        new = row_block(size, length, start)[1].reshape(-1, *[1] * (rows.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(total, jnp.where(new, rows.astype(dtype), old), begin, 0)

    return over_row_blocks(factor.bases, length, visit, jnp.zeros([size, *trailing], dtype))


def _scale(part: Part, dtype) -> jax.Array:
    """sqrt(w_m lam_m) [C, R]."""
    eigenvalues = part.sketch.eigenvalues.astype(dtype)
    # A zero eigenvalue may come out of a solver as a slightly negative one.
    eigenvalues = jnp.where(part.weights[:, None] > 0, jnp.maximum(eigenvalues, 0), 0)
    return jnp.sqrt(part.weights[:, None] * eigenvalues)


def _along(rows: jax.Array, target: jax.Array) -> jax.Array:
    """[C, R]: each client's rows [C, b, R] times its target [C, b]."""
    return jax.lax.dot_general(rows, target, (((1,), (1,)), ((0,), (0,))))


def _side_by_side(blocks: list) -> jax.Array:
    """[b, D], a block of F."""
    return jnp.concatenate([jnp.transpose(rows, (1, 0, 2)).reshape(rows.shape[1], -1) for rows in blocks], axis=1)


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


# How a block of F is added to a [D, D] sum that starts at zero, and the sum's (eigenvalues, V^T).
METHODS = {"gram": (_gram, _of_gram), "qr": (_triangle, _of_triangle), "tsqr": (_triangle, _of_triangle)}
