"""The top eigenpairs of a client's curvature: H ~= U diag(lam) U^T, from products with H alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import curvature


class Sketch(NamedTuple):
    """The top R eigenpairs of a symmetric positive semi-definite [P, P] matrix.

    A numerically zero pair (the matrix has a lower rank than asked for) is masked: eigenvalue and basis column are 0.
    """

    eigenvalues: jax.Array  # [R], descending, non-negative
    basis: jax.Array  # [P, R], orthonormal columns
    residuals: jax.Array | None = None  # [R], |H u - lam u| / lam_max: bounds the distance to the nearest eigenvalue


def subspace(rank: int, *, oversample: int = 10, power_steps: int = 2) -> Callable:
    """Randomised subspace iteration with a Rayleigh-Ritz finish (arXiv 2601.13608, section 3; Halko et al. 2011).

        Q = qr(Omega);  power_steps times: Q = qr(H Q);  T = Q^T H Q = S diag(lam) S^T;  U = Q S

    Args:
      rank: R, the eigenpairs kept; where it exceeds the matrix's rank the surplus pairs are masked.
      oversample: s, further columns carried through the iteration and dropped at the end.
      power_steps: q, products before the last one.

    Returns:
      solve(key, product, size, dtype) -> Sketch, for product: [P, B] -> [P, B] and size = P. Jit it with the product
      inside. It costs (q + 1) (R + s) products with H.

    Raises:
      ValueError: rank is below 1 or above P.
    """

    def space(key, product, size, dtype):
        block = min(rank + oversample, size)
        orthonormal = lambda y: jnp.linalg.qr(y)[0]
        start = orthonormal(jax.random.normal(key, [size, block], dtype))
        basis = jax.lax.fori_loop(0, power_steps, lambda _, q: orthonormal(product(q)), start)
        return basis, product(basis)

    return _solver(rank, space)


def lanczos(rank: int, *, oversample: int = 10, power_steps: int = 2) -> Callable:
    """Block Lanczos: the best eigenpairs within the whole Krylov space [Q, H Q, H^2 Q, ...] (Golub & Underwood 1977).

    For the same products as `subspace` it forgets none of them: far more exact where the spectrum falls slowly. Every
    block is orthogonalised against all before it again and again, so that rounding does not bring back what is found.

    Args:
      rank: R.
      oversample: s, columns of the Krylov space beyond (q + 1) R.
      power_steps: q; the space has about (q + 1) R + s columns, all of which are kept in memory, with their products.

    Returns:
      solve(key, product, size, dtype) -> Sketch, see `subspace`. It costs about (q + 1) R + s products with H.

    Raises:
      ValueError: rank is below 1 or above P.
    """

    def space(key, product, size, dtype):
        wanted = min((power_steps + 1) * rank + oversample, size)
        # A quarter of the rank, or less where P is so small that such blocks do not fill the space.
        block = next(b for b in range(-(-rank // 4), 0, -1) if size // b * b >= wanted)
        depth = -(-wanted // block)

        def orthonormal(new, basis):
            return jnp.linalg.qr(new - basis @ (basis.T @ new))

        def extend(j, carry):
            basis, images, new = carry
            scale = jnp.max(jnp.linalg.norm(new, axis=0))
            new, triangle = orthonormal(new, basis)
            # Where the Krylov space ends (H has a low rank) only rounding noise is left: start from fresh columns.
            exhausted = jnp.abs(jnp.diag(triangle)) <= 100 * jnp.finfo(dtype).eps * scale
            fresh = jax.random.normal(jax.random.fold_in(key, j), [size, block], dtype)
            new = jnp.where(exhausted[None, :], fresh, new)
            for _ in range(2):
                new, _ = orthonormal(new, basis)
            image = product(new)
            write = lambda all_, part: jax.lax.dynamic_update_slice(all_, part, (0, j * block))
            return write(basis, new), write(images, image), image

        empty = jnp.zeros([size, depth * block], dtype)
        start = jax.random.normal(key, [size, block], dtype)
        basis, images, _ = jax.lax.fori_loop(0, depth, extend, (empty, empty, start))
        return basis, images

    return _solver(rank, space)


def _solver(rank: int, space: Callable) -> Callable:
    """The best R eigenpairs within a space built from products; space: (...) -> (basis, H basis), both [P, B]."""
    if rank < 1:
        raise ValueError(f"sketch.rank: needs at least 1, got {rank}")

    def solve(key, product, size, dtype):
        if rank > size:
            raise ValueError(f"sketch.rank: {rank} is above the number of trainable parameters, {size}; lower it")
        with jax.default_matmul_precision("highest"):
            return rayleigh_ritz(*space(key, product, size, dtype), rank)

    return solve


def rayleigh_ritz(basis, image, rank: int) -> Sketch:
    """The best eigenpairs within span(basis), given image = H basis, both [P, B]; masked below the rounding level."""
    projected = basis.T @ image
    eigenvalues, rotation = jnp.linalg.eigh((projected + projected.T) / 2)
    eigenvalues, rotation = eigenvalues[::-1][:rank], rotation[:, ::-1][:, :rank]
    largest = jnp.maximum(eigenvalues[0], 0)
    keep = eigenvalues > largest * jnp.finfo(basis.dtype).eps * basis.shape[1]
    vectors = basis @ rotation
    residuals = jnp.linalg.norm(image @ rotation - vectors * eigenvalues[None, :], axis=0)
    relative = residuals / jnp.where(largest > 0, largest, 1)
    mask = lambda x: jnp.where(keep, x, 0)
    # NaN compares false: products that are not finite must not pass for an empty sketch.
    poison = jnp.where(jnp.all(jnp.isfinite(image)), 0, jnp.nan).astype(basis.dtype)
    return Sketch(mask(eigenvalues) + poison, jnp.where(keep[None, :], vectors, 0), mask(relative))


SOLVERS = {"lanczos": lanczos, "subspace": subspace}


def make_sketch(
    outputs: Callable,
    loss: Callable,
    *,
    rank: int,
    solver: str = "subspace",
    oversample: int = 10,
    power_steps: int = 2,
    micro_batch: int = 0,
    jacobian: str = "matrix_free",
) -> Callable:
    """Builds `sketch(key, params, batch, mask=None) -> Sketch` of the loss's Gauss-Newton matrix; jit or vmap it.

    Args:
      outputs, loss, micro_batch, jacobian: see `curvature.make_ggn`.
      rank, oversample, power_steps: see `subspace`.
      solver: a name in `SOLVERS`.

    Raises:
      ValueError: a name is not known, or the rank does not fit.
    """
    if solver not in SOLVERS:
        raise ValueError(f"sketch.solver: unknown solver {solver!r}; known: {', '.join(sorted(SOLVERS))}")
    ggn = curvature.make_ggn(outputs, loss, micro_batch=micro_batch, jacobian=jacobian)
    solve = SOLVERS[solver](rank, oversample=oversample, power_steps=power_steps)

    def sketch(key, params, batch, mask=None):
        flat, _ = ravel_pytree(params)
        return solve(key, ggn(params, batch, mask), flat.size, flat.dtype)

    return sketch
