"""How are the top eigenpairs of a symmetric positive semi-definite matrix found, from products with it alone?

Every solver is built by a factory of what is static and returns `solve(key, matrix, start=None) -> Eigenpairs`, for a
`products.Curvature`. Jit it with the products inside.
"""

import functools
import itertools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fipa_jax.curvature.overlooked import WIDTH, ask, for_anyone
from fipa_jax.curvature.products import Curvature, indefinite
from fipa_jax.derivatives import vary_with

TOLERANCE = 1e-3  # of the residuals
WIDE_BLOCKS = 6  # of R columns each, by which overlooked eigenvectors are sought


class Eigenpairs(NamedTuple):
    """The best R eigenpairs within a space; a numerically zero one is masked: eigenvalue and vector are 0."""

    eigenvalues: jax.Array  # [R], descending, non-negative
    vectors: jax.Array  # [P, R], orthonormal columns
    images: jax.Array  # [P, R], the matrix times the vectors
    residuals: jax.Array  # [R], |H u - lam u| / lam_max: bounds the distance to the nearest eigenvalue
    products: jax.Array  # [] int32, columns that were multiplied by the matrix
    not_finite: jax.Array  # [] bool, a product was not finite: everything is 0
    asymmetric: jax.Array  # [] bool, the products are not those of a symmetric matrix
    indefinite: jax.Array  # [] bool, the matrix has negative eigenvalues; they are left out
    converged: jax.Array | bool = False  # [] bool, residuals within tolerance, none of the R largest `overlooked`


class Solver(Protocol):
    """A search for the R eigenpairs of a matrix, which begins from a basis `start` [P, R] where there is one."""

    def __call__(self, key, matrix: Curvature, start=None) -> Eigenpairs: ...


def subspace(rank: int, *, oversample: int = 10, power_steps: int = 2, tolerance: float = TOLERANCE) -> Solver:
    """Randomised subspace iteration with a Rayleigh-Ritz finish (arXiv 2601.13608, section 3; Halko et al. 2011).

        Q = qr(Omega);  power_steps times: Q = qr(H Q);  T = Q^T H Q = S diag(lam) S^T;  U = Q S

    Args:
      rank: R, the eigenpairs kept; where it exceeds the matrix's rank the surplus pairs are masked.
      oversample: s, further columns carried through the iteration and dropped at the end.
      power_steps: q, products before the last one. It costs (q + 1) (R + s) products.
      tolerance: of the residuals |H u - lam u| / lam_max. Where all are within it, some ten products more ask whether
        a vector was overlooked.

    Returns:
      solve(key, matrix, start=None) -> Eigenpairs. start: a basis [P, R] to begin from, completed by random columns.

    Raises:
      ValueError: rank is below 1 or above P.
    """

    def solve(key, matrix: Curvature, start=None) -> Eigenpairs:
        block = min(rank + oversample, matrix.size)
        drawn, fresh = _random_columns(key, matrix, block, WIDTH)
        first = _orthonormal(_begun(drawn, start))
        basis = jax.lax.fori_loop(0, power_steps, lambda _, q: _orthonormal(matrix.product(q)), first)
        pairs = rayleigh_ritz(basis, matrix.product(basis), rank, products=(power_steps + 1) * block)
        # Of the pairs alone: the other columns may hold a large vector half way, which would hide it.
        return _asked(fresh, matrix, pairs, pairs.vectors, tolerance, True)[0]

    return _checked(rank, solve)


def lanczos(rank: int, *, oversample: int = 10, power_steps: int = 2, tolerance: float = TOLERANCE) -> Solver:
    """Block Lanczos: the best eigenpairs within the whole Krylov space [Q, H Q, H^2 Q, ...] (Golub & Underwood 1977).

    For the same products as `subspace` it forgets none of them: far more exact where the spectrum falls slowly. Every
    new block is orthogonalised twice against all before it, so that rounding does not bring back what is found. Blocks
    have R / 4 columns, and R with a start. Where the matrix holds its rows, the quarter is rounded to 8, 16, 24 or 32:
    to read the rows is most of what a product costs, and narrower blocks find more for as many columns. It stops as
    soon as all residuals are below the tolerance, looked at when the space has 2 R columns and after each further R;
    with a start also at R.

    Blocks of b columns find b copies of a multiple eigenvalue, and a start may span other eigenvectors than the top
    ones. So where the residuals are within the tolerance a fresh random block asks whether a vector was overlooked, at
    the cost of some ten products, twenty with a start (see `overlooked`). An eigenvector orthogonal to all that was
    searched (with a start, or after the search in wide blocks: to the pairs), such as a missing copy, whose eigenvalue
    is above lam_R + tolerance lam_max passes unnoticed with a probability of 0.001 at most. If a large one turns up, or
    the first b values are equal, which says as much, Lanczos goes on in blocks of R fresh columns beside the pairs
    found, 6 R more products at most, and asks again. Else the pairs are as they were, and not `converged`.

    Args:
      rank: R.
      oversample: s, columns of the Krylov space beyond (q + 1) R.
      power_steps: q; the space has at most about (q + 1) R + s columns, or 4 (q + 1) blocks of at most 8 if
        these are more. All are kept, with their products.
      tolerance: of the residuals |H u - lam u| / lam_max. An eigenvalue's error is about the square of its residual.

    Returns:
      solve(key, matrix, start=None) -> Eigenpairs, see `subspace`.

    Raises:
      ValueError: rank is below 1 or above P.
    """

    def solve(key, matrix: Curvature, start=None) -> Eigenpairs:
        size = matrix.size
        widest = rank if start is not None else -(-rank // 4)
        if matrix.rows is not None and start is None:
            widest = min(8 * -(-rank // 32), 32)
        # Wide blocks for a small rank must not leave the Krylov space without depth.
        deep = min(4 * (power_steps + 1) * min(widest, 8), size // widest * widest)
        wanted = max(min((power_steps + 1) * rank + oversample, size), deep)
        # Smaller blocks where P is so small that the wanted ones do not fill the space.
        block = next(b for b in range(min(widest, wanted), 0, -1) if size // b * b >= wanted)
        depth, stride = -(-wanted // block), -(-rank // block)
        looks = {*range(stride if start is not None else 2 * stride, depth, stride), depth}
        grow = functools.partial(_grown, matrix=matrix, rank=rank, tolerance=tolerance)
        drawn, wide, *fresh = _random_columns(key, matrix, block, rank, WIDTH, WIDTH)
        pairs, searched = grow(_begun(drawn, start), drawn, None, looks=[j + 1 in looks for j in range(depth)])
        searched = searched if start is None else pairs.vectors  # what grows from a start may hold a vector half way
        return _completed(pairs, searched, _crowded(pairs, block), grow, wide, fresh)

    return _checked(rank, solve)


def exact(rank: int, *, oversample: int = 10, tolerance: float = TOLERANCE) -> Solver:
    """The eigenpairs of H = A^T A from its rows A [M, P], which the matrix must hold; no iteration, no start.

    With few parameters, P <= M, by the singular values of A. Else the eigenvectors of the Gram matrix A A^T [M, M] give
    the space, and products with the factor clean up what the squaring of A has blurred: Q = qr(A^T S), W = qr(A Q),
    svd(A^T W). In float32 this finds small eigenvalues to 1e-6 where the Gram matrix alone gives 1e-4.

    Args:
      rank: R.
      oversample: s, further columns that are cleaned up and dropped.
      tolerance: of the residuals |H u - lam u| / lam_max.

    Returns:
      solve(key, matrix) -> Eigenpairs; R + s products for the clean-up and R for the residuals.

    Raises:
      ValueError: rank is below 1 or above P, or the matrix does not hold its rows.
    """

    def solve(key, matrix: Curvature, start=None) -> Eigenpairs:
        if matrix.rows is None:
            raise ValueError("sketch.solver: the exact solver needs the matrix's rows: curvature by jacobian 'rows'")
        finite = jnp.all(jnp.isfinite(matrix.rows))
        rows, size = near_one(jnp.where(finite, matrix.rows, 0))
        columns = min(rank + oversample, *rows.shape)
        if rows.shape[1] <= rows.shape[0]:
            vectors = jnp.linalg.svd(rows, full_matrices=False)[2][:columns].T
        else:
            space = _orthonormal(rows.T @ jnp.linalg.eigh(rows @ rows.T)[1][:, -columns:])
            cleaned, triangle = jnp.linalg.qr(rows.T @ _orthonormal(rows @ space))
            vectors = cleaned @ jnp.linalg.svd(triangle)[0]
        lacking = max(rank - columns, 0)  # where the rows are fewer than R
        vectors = jnp.pad(vectors[:, :rank], [(0, 0), (0, lacking)])
        pushed = rows @ vectors
        eigenvalues, images = jnp.sum(pushed**2, axis=0), rows.T @ pushed
        order = jnp.argsort(-eigenvalues)
        pairs = _pairs(
            eigenvalues[order],
            vectors[:, order],
            images[:, order],
            noise=rows.shape[0],
            products=columns + rank,
            not_finite=~finite,
            asymmetric=False,
            indefinite=matrix.indefinite,
        )
        return _times(pairs, size, size)._replace(converged=finite & _within(pairs, tolerance))

    return _checked(rank, solve)


SOLVERS = {"exact": exact, "lanczos": lanczos, "subspace": subspace}


def rayleigh_ritz(basis, image, rank: int, *, products: jax.Array | int) -> Eigenpairs:
    """The best eigenpairs within span(basis), given image = H basis, both [P, B]; zero columns are allowed."""
    finite = jnp.all(jnp.isfinite(image)) & jnp.all(jnp.isfinite(basis))
    basis, image = jnp.where(finite, basis, 0), jnp.where(finite, image, 0)
    image, size = near_one(image)
    projected = basis.T @ image
    slack = jnp.sqrt(jnp.finfo(basis.dtype).eps) * jnp.max(jnp.abs(projected))
    eigenvalues, rotation = _eigh((projected + projected.T) / 2)
    top = rotation[:, ::-1][:, :rank]
    pairs = _pairs(
        eigenvalues[::-1][:rank],
        basis @ top,
        image @ top,
        noise=basis.shape[1],
        products=products,
        not_finite=~finite,
        asymmetric=jnp.max(jnp.abs(projected - projected.T)) > slack,
        indefinite=indefinite(eigenvalues),
    )
    return _times(pairs, size)


@jax.custom_jvp
def _eigh(matrix):
    """Eigenvalues and vectors; where eigenvalues are equal, as those of zero columns, no derivative rotates them."""
    return tuple(jnp.linalg.eigh(matrix))


@_eigh.defjvp
def _eigh_jvp(primals, tangents):
    values, vectors = _eigh(*primals)
    turned = vectors.T @ tangents[0] @ vectors
    gaps = values[None] - values[:, None]
    equal = jnp.abs(gaps) <= jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    rotation = jnp.where(equal, 0, turned / jnp.where(equal, 1, gaps))
    return (values, vectors), (jnp.diag(turned), vectors @ rotation)


def near_one(x):
    """(x / size, size): a power of two, so that nothing is rounded, and squares neither overflow nor vanish."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1))[1] - 1
    size = jnp.ldexp(jnp.ones_like(largest), exponent)
    return x / size, size


def _times(pairs: Eigenpairs, *sizes) -> Eigenpairs:
    """The pairs of the matrix times the sizes, one after another."""
    for size in sizes:
        pairs = pairs._replace(eigenvalues=pairs.eigenvalues * size, images=pairs.images * size)
    return pairs


def _pairs(eigenvalues, vectors, images, *, noise: int, products: jax.Array | int, **flags) -> Eigenpairs:
    """Masks the pairs below the rounding level, eps times `noise`, and measures the residuals of the others."""
    largest = jnp.maximum(eigenvalues[0], 0)
    keep = eigenvalues > largest * jnp.finfo(eigenvalues.dtype).eps * noise

    def masked(x):  # [R] or [P, R]
        return jnp.where(keep if x.ndim == 1 else keep[None], x, 0)

    distance = jnp.linalg.norm(images - vectors * eigenvalues[None], axis=0)
    residuals = masked(distance / jnp.where(largest > 0, largest, 1))
    pairs = (masked(eigenvalues), masked(vectors), masked(images), residuals)
    flags = {name: jnp.asarray(flag) for name, flag in flags.items()}
    return Eigenpairs(*pairs, jnp.int32(products), **flags, converged=jnp.array(False))


def _within(pairs: Eigenpairs, tolerance):
    return jnp.all(pairs.residuals <= tolerance)


def _crowded(pairs: Eigenpairs, block: int):
    """Whether as many of the largest are equal as blocks have columns, so that more copies may be missing.

    Of one column that says nothing, and of two little.
    """
    values = pairs.eigenvalues
    if not 2 < block < len(values):
        return jnp.array(False)
    return (values[0] > 0) & (values[0] - values[block - 1] <= TOLERANCE * values[0])


def _asked(fresh, matrix: Curvature, pairs: Eigenpairs, searched, tolerance, wanted):
    """(the pairs, with what a fresh block says of them, and whether a large eigenvalue was overlooked)."""
    wanted = wanted & _within(pairs, tolerance) & ~pairs.not_finite
    answer = ask(fresh, matrix, searched, pairs.eigenvalues, tolerance, wanted)
    large = answer.beyond > pairs.eigenvalues[(len(pairs.eigenvalues) - 1) // 2]
    products = pairs.products + answer.products
    return pairs._replace(products=products, converged=pairs.converged | answer.sure), large & ~answer.sure


def _completed(pairs: Eigenpairs, searched, crowded, grow, wide, fresh: list) -> Eigenpairs:
    """The pairs, after the question whether any was overlooked, and after a search in wide blocks if so.

    Args:
      wide: [P, R] random columns, from which that search begins.
      fresh: two of [P, WIDTH], for the question before it and after it.
    """
    matrix, rank, tolerance = (grow.keywords[name] for name in ("matrix", "rank", "tolerance"))
    blocks = max(min(WIDE_BLOCKS, matrix.size // rank - 1), 0)
    # Fresh columns leave good pairs as they are until two products have turned them.
    looks = [j > 1 or j + 1 == blocks for j in range(blocks)]

    def widen(state):
        found, _ = grow(wide, wide, state[0], looks=looks)
        return found, _widened(found.vectors, searched.shape[1])

    def turn(i, state):
        pairs, searched, is_new, crowded = state
        columns = jnp.where(i == 0, *fresh)
        pairs, large = _asked(columns, matrix, pairs, searched, tolerance, is_new & ~crowded)
        missing = (large | crowded) & (i == 0)
        if blocks:
            pairs, searched = for_anyone(missing, widen, (pairs, searched))
        return pairs, searched, missing, jnp.zeros_like(crowded)

    state = pairs, searched, jnp.array(True), crowded
    return jax.lax.fori_loop(0, 2, turn, vary_with(state, state))[0]


def _grown(new, drawn, known: Eigenpairs | None, *, matrix: Curvature, rank: int, tolerance, looks: list[bool]):
    """(pairs, searched space [P, M]) of the Krylov space of the columns `new` [P, b], and of the pairs that are known.

    Args:
      drawn: [P, b] random columns, of which those come that take the place of exhausted ones.
      looks: [depth], after which blocks the pairs are computed; it goes on until they are good, or the blocks are used.
    """
    size, block = new.shape
    empty = jnp.zeros([size, 0], matrix.dtype)
    before = (empty, empty) if known is None else (known.vectors, known.images)
    number, products = before[0].shape[1], jnp.int32(0) if known is None else known.products
    width, look_after = number + len(looks) * block, jnp.asarray(looks)

    def extend(j, state):
        def step(state):
            basis, images, new, pairs = state
            new = _next_block(new, basis, jnp.roll(drawn, j + 1, axis=0))
            image = matrix.product(new)
            at = (0, number + j * block)
            basis = jax.lax.dynamic_update_slice(basis, new, at)
            images = jax.lax.dynamic_update_slice(images, image, at)

            def look():
                found = rayleigh_ritz(basis, images, rank, products=products + (j + 1) * block)
                return vary_with(found, pairs)

            return basis, images, image, jax.lax.cond(look_after[j], look, lambda: pairs)

        done = _within(state[3], tolerance) | state[3].not_finite | _crowded(state[3], block)
        return for_anyone(~done, step, state)

    space = [_widened(columns, width) for columns in before]
    shapes = jax.eval_shape(lambda: rayleigh_ritz(space[0], space[1], rank, products=products))
    pairs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    pairs = pairs._replace(residuals=jnp.full_like(pairs.residuals, jnp.nan))
    space = vary_with((*space, new, pairs), new, products)
    basis, _, _, pairs = jax.lax.fori_loop(0, len(looks), extend, space)
    return pairs, basis


def _checked(rank: int, solve: Solver) -> Solver:
    """A solver whose rank fits, at the highest precision of products."""
    if not (hasattr(rank, "__index__") and rank >= 1):
        raise ValueError(f"sketch.rank: needs a whole number of at least 1, got {rank}")

    def checked(key, matrix: Curvature, start=None) -> Eigenpairs:
        if rank > matrix.size:
            raise ValueError(
                f"sketch.rank: {rank} is above the number of trainable parameters, {matrix.size}; lower it"
            )
        if start is not None and start.shape != (matrix.size, rank):
            raise ValueError(f"start: needed a basis of shape {(matrix.size, rank)}, got {start.shape}")
        with jax.default_matmul_precision("highest"):
            return solve(key, matrix, start)

    return checked


def _orthonormal(columns):
    """[P, B]: an orthonormal basis of the columns [P, B]."""
    return jnp.linalg.qr(columns)[0]


def _widened(columns, number: int):
    """[P, number]: the columns, with zeros behind them."""
    return jnp.pad(columns, [(0, 0), (0, number - columns.shape[1])])


def _random_columns(key, matrix: Curvature, *widths: int) -> list:
    """Standard normal columns [P, width] of each width, by one draw: to compile one takes a third of a second."""
    drawn = jax.random.normal(key, [matrix.size, sum(widths)], matrix.dtype)
    return jnp.split(drawn, list(itertools.accumulate(widths))[:-1], axis=1)


def _begun(drawn, start):
    """[P, b]: the random columns, the first ones replaced by the start where it is not zero."""
    if start is None:
        return drawn
    start = start[:, : drawn.shape[1]].astype(drawn.dtype)
    head = jnp.where(jnp.any(start != 0, axis=0)[None], start, drawn[:, : start.shape[1]])
    return jnp.concatenate([head, drawn[:, start.shape[1] :]], axis=1)


def _next_block(new, basis, fresh):
    """`new` [P, b] made orthonormal to the basis and in itself; random `fresh` ones replace columns of the basis."""

    def reduce(new):
        return jnp.linalg.qr(new - basis @ (basis.T @ new))

    new = near_one(new)[0]
    scale = jnp.max(jnp.linalg.norm(new, axis=0))
    new, triangle = reduce(new)
    # Where the Krylov space ends (H has a low rank) only rounding noise is left: go on with fresh columns.
    exhausted = jnp.abs(jnp.diag(triangle)) <= 100 * jnp.finfo(new.dtype).eps * scale

    def refill(new):
        return reduce(jnp.where(exhausted[None, :], fresh, new))[0]

    new = jax.lax.cond(jnp.any(exhausted), refill, lambda new: new, new)
    return reduce(new)[0]
