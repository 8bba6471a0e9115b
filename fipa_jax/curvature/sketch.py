"""What does a client say about its curvature? Its top eigenpairs, H ~= U diag(lam) U^T, and how good they are."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax.curvature import eigenpairs as eigen
from fipa_jax.curvature import products as curvature

# What a flag of the report means, in words.
FLAGS = {
    "not_finite": "products with the curvature are not finite; the sketch is empty",
    "asymmetric": "products with the curvature are not symmetric",
    "indefinite": "the curvature has negative eigenvalues, which are left out: the loss is not convex in the outputs",
    "rank_deficient": "the curvature's numerical rank is below the rank asked for; the surplus pairs are zero",
    "empty": "the client has no examples; the sketch is empty",
}


# The solver names that fix how the curvature is seen too.
FIXED = {"head": ("lanczos", "head"), "rows": ("exact", "rows")}
SOLVERS = ("auto", "head", "lanczos", "rows", "subspace")
STORES = ("", "bfloat16", "float16", "float32", "float64")


class Report(NamedTuple):
    """How good a sketch is: computed by the client, a few numbers to send."""

    residuals: jax.Array  # [R], |H u - lam u| / lam_max: bounds the distance to the nearest eigenvalue
    products: jax.Array  # [] int32, columns multiplied by H
    converged: jax.Array  # [] bool, all residuals are within the tolerance
    trace: jax.Array  # [], tr H, or its estimate; the curvature that the sketch misses is trace - sum(eigenvalues)
    trace_error: jax.Array  # [], one standard deviation of that estimate; 0 where it is exact
    flags: dict[str, jax.Array]  # [] bool each, see `FLAGS`


class Sketch(NamedTuple):
    """The top R eigenpairs of a symmetric positive semi-definite [P, P] matrix; left-out pairs are zero."""

    eigenvalues: jax.Array  # [R], descending, non-negative
    basis: jax.Array  # [P, R], orthonormal columns
    report: Report | None = None


class Diagonal(NamedTuple):
    """The diagonal of a client's curvature, for the diagonal rules."""

    values: jax.Array  # [P]


def make_sketch(
    outputs: Callable,
    loss: Callable,
    *,
    rank: int,
    solver: str = "subspace",
    oversample: int = 10,
    power_steps: int = 2,
    tolerance: float = eigen.TOLERANCE,
    micro_batch: int = 0,
    jacobian: str = "matrix_free",
    features: Callable | None = None,
    loss_rank: int = 0,
    probes: int = 4,
    energy: float = 0.0,
    store: str = "",
    memory: float = 2.0,
) -> Callable:
    """Builds `sketch(key, params, batch, mask=None, start=None) -> Sketch` of the loss's Gauss-Newton matrix.

    Jit or vmap it. `start` is a basis [P, R] from which an iterative solver begins, such as that of the last round.

    Args:
      outputs, loss, micro_batch, jacobian, features, loss_rank: see `curvature.make_ggn`.
      rank: R, or its upper bound where `energy` is set.
      solver: `subspace` (the paper's) or `lanczos`, on products as `jacobian` says; `rows`, the exact eigenpairs from
        the explicit rows; `head`, block Lanczos on the last layer's closed form; `auto` picks by `choose`.
      oversample, power_steps, tolerance: see `eigen`.
      probes: random vectors for Hutchinson's estimate of the trace, one product each, where it is not known exactly.
      energy: keep only as many pairs as reach this share of the trace; 0 keeps all.
      store: dtype of the basis that is sent, e.g. `bfloat16`, which rounds each entry by at most 2^-8 of itself; empty
        for the parameters' own. The step moves by about 0.5 % where clients differ, but where their subspaces nearly
        coincide by as much as 2^-8 / damping allows: see `scripts/benchmark.py merge`.
      memory: GiB that explicit rows may take, for `auto`.

    Raises:
      ValueError: a name is not known, or the rank does not fit.
    """
    if solver not in SOLVERS:
        raise ValueError(f"sketch.solver: unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    if store not in STORES:
        raise ValueError(f"sketch.store: unknown {store!r}; known: {', '.join(filter(None, STORES))}")
    if energy and not probes:
        raise ValueError("sketch.energy: needs the trace, and sketch.probes = 0 leaves it unknown; set it to 2 or more")

    options = {
        "exact": {},
        "lanczos": {"power_steps": power_steps, "tolerance": tolerance},
        "subspace": {"power_steps": power_steps},
    }

    def sketch(key, params, batch, mask=None, start=None) -> Sketch:
        name, seen = resolve(
            outputs,
            params,
            batch,
            rank=rank,
            solver=solver,
            jacobian=jacobian,
            features=features,
            oversample=oversample,
            power_steps=power_steps,
            loss_rank=loss_rank,
            memory=memory,
        )
        solve = eigen.SOLVERS[name](rank, oversample=oversample, **options[name])
        ggn = curvature.make_ggn(
            outputs, loss, micro_batch=micro_batch, jacobian=seen, features=features, loss_rank=loss_rank
        )
        solve_key, probe_key = jax.random.split(key)
        with jax.default_matmul_precision("highest"):
            matrix = ggn(params, batch, mask)
            pairs = solve(solve_key, matrix, start)
            left, error = trace_left(probe_key, matrix, pairs, probes)
        trace = jnp.sum(pairs.eigenvalues) + left
        flags = {name: getattr(pairs, name) for name in ("not_finite", "asymmetric", "indefinite")}
        flags["indefinite"] |= matrix.indefinite
        flags["empty"] = jnp.zeros([], bool) if mask is None else ~jnp.any(mask)
        flags["rank_deficient"] = jnp.any(pairs.eigenvalues == 0) & ~flags["empty"] & ~flags["not_finite"]
        if probes or matrix.trace is not None:  # else the trace is not known, which is no fault
            flags["not_finite"] |= ~jnp.isfinite(trace)
        converged = jnp.all(pairs.residuals <= tolerance) & ~flags["not_finite"]
        finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
        products = pairs.products + (probes if matrix.trace is None else 0)
        report = Report(pairs.residuals, products, converged, finite(trace), finite(error), flags)
        found = Sketch(pairs.eigenvalues, pairs.vectors.astype(store or pairs.vectors.dtype), report)
        return truncate(found, enough(found, energy)) if energy else found

    return sketch


def resolve(
    outputs: Callable,
    params,
    batch,
    *,
    rank: int,
    solver: str,
    jacobian: str = "matrix_free",
    features: Callable | None = None,
    oversample: int = 10,
    power_steps: int = 2,
    loss_rank: int = 0,
    memory: float = 2.0,
) -> tuple[str, str]:
    """(solver of `eigen`, how the curvature is seen) that the arguments of `make_sketch` come to, by shapes alone."""
    if solver in FIXED:
        return FIXED[solver]
    if solver != "auto":
        return solver, jacobian
    out = jax.eval_shape(outputs, params, batch)
    num_outputs = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(out))
    phi = None if features is None else jax.eval_shape(features, params, batch)
    return choose(
        examples=jax.tree.leaves(batch)[0].shape[0],
        outputs=min(loss_rank or num_outputs, num_outputs),
        size=sum(leaf.size for leaf in jax.tree.leaves(params)),
        products=(power_steps + 1) * rank + oversample,
        flops=curvature.forward_flops(outputs, params, batch),
        itemsize=ravel_pytree(params)[0].dtype.itemsize,
        memory=memory,
        # A layer below may have the last one's shapes, but the last one's inputs depend on it.
        is_head=phi is not None
        and curvature.is_last_layer(params, out, phi)
        and not curvature.depends(features, params, batch),
    )


def choose(
    *,
    examples: int,
    outputs: int,
    size: int,
    products: int,
    flops: float,
    itemsize: int,
    memory: float,
    is_head: bool,
) -> tuple[str, str]:
    """The rule of `auto`: (solver, jacobian), by the floating-point operations of each and the memory of the rows.

    1. The last layer alone is seen in closed form.
    2. Rows [N K, P] that do not fit in the memory allowed: block Lanczos on matrix-free products.
    3. At most 256 rows or parameters: the exact pairs, one small decomposition.
    4. Otherwise the cheapest of, with f the operations of one forward pass over all N examples:
         matrix-free Lanczos   4 f B + 6 P B^2                      B products, and keeping their columns orthogonal
         Lanczos on the rows   2 f K + 4 N K P B + 6 P B^2          K pullbacks, then B products
         exact                 2 f K + 2 n^2 max(N K, P) + 25 n^3   with n = min(N K, P): a Gram matrix and its
                                                                    eigenvectors, at a third of a product's speed
       K being `loss_rank` where that is set.

    Args:
      examples, outputs, size: N, K, P.
      products: B, that Lanczos may take.
      flops: f.
      itemsize: bytes of an entry.
      memory: GiB that the rows may take.
      is_head: whether the parameters are those of the last layer, with its inputs at hand.
    """
    if is_head:
        return "lanczos", "head"
    rows = examples * outputs
    if rows * size * itemsize > memory * 2**30:
        return "lanczos", "matrix_free"
    narrow, wide = sorted((rows, size))
    if narrow <= 256:
        return "exact", "rows"
    work = {
        ("lanczos", "matrix_free"): 4 * flops * products + 6 * size * products**2,
        ("lanczos", "rows"): 2 * flops * outputs + 4 * rows * size * products + 6 * size * products**2,
        ("exact", "rows"): 2 * flops * outputs + 2 * narrow**2 * wide + 25 * narrow**3,
    }
    return min(work, key=work.get)


def trace_left(key, matrix: curvature.Curvature, pairs: eigen.Eigenpairs, probes: int):
    """tr((I - U U^T) H (I - U U^T)), the curvature that the pairs miss, and the standard deviation of its estimate.

    Exact where the trace is known. Else by Hutchinson's method on what is left, w = z - U U^T z with random signs z:
    H w = H z - (H U) U^T z needs one product for each probe and the images H U that the solver has at hand. The pairs'
    part, which is the largest by far, adds no variance. NaN without probes.
    """
    if matrix.trace is not None:
        return jnp.maximum(matrix.trace - jnp.sum(pairs.eigenvalues), 0), jnp.zeros([], matrix.dtype)
    if not probes:
        return jnp.full([], jnp.nan, matrix.dtype), jnp.full([], jnp.nan, matrix.dtype)
    signs = jax.random.rademacher(key, [matrix.size, probes], matrix.dtype)
    inside = pairs.vectors.T @ signs
    left = signs - pairs.vectors @ inside
    image = matrix.product(signs) - pairs.images @ inside
    each = jnp.sum(left * image, axis=0)
    error = jnp.std(each) / jnp.sqrt(max(probes - 1, 1))
    return jnp.maximum(jnp.mean(each), 0), error


def enough(sketch: Sketch, energy) -> jax.Array:
    """[R] bool: the fewest pairs whose eigenvalues reach `energy` times the trace."""
    before = jnp.cumsum(sketch.eigenvalues) - sketch.eigenvalues
    return before < energy * sketch.report.trace


def above_gradient(sketch: Sketch, gradient_norm, total_norm, round, scale=1.0) -> jax.Array:
    """[R] bool: lam >= lam_max min(0.99, c / (k (|g_m| + |sum_m g_m|))), the rule of the paper's regression runs.

    Args:
      gradient_norm: |g_m|, of the client's mean loss at the broadcast parameters.
      total_norm: |sum_m g_m|, over the cohort.
      round: k, counted from 1.
      scale: c.
    """
    bound = scale / (jnp.maximum(round, 1) * jnp.maximum(gradient_norm + total_norm, 1e-30))
    return sketch.eigenvalues >= sketch.eigenvalues[0] * jnp.minimum(0.99, bound)


def smallest(eigenvalues: jax.Array) -> jax.Array:
    """The smallest eigenvalue [] that a sketch keeps, of [R]; 0 if it keeps none."""
    kept = jnp.where(eigenvalues > 0, eigenvalues, jnp.inf)
    return jnp.where(jnp.any(eigenvalues > 0), jnp.min(kept), 0)


def truncate(sketch: Sketch, keep: jax.Array) -> Sketch:
    """Zeroes the pairs with keep [R] false: shapes stay, and a pair that is zero need not be sent."""
    zero = lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype))
    return sketch._replace(eigenvalues=zero(sketch.eigenvalues, keep), basis=zero(sketch.basis, keep[None]))


def make_diagonal(outputs: Callable, loss: Callable, *, micro_batch: int = 0) -> Callable:
    """Builds `diagonal(key, params, batch, mask=None) -> Diagonal` of the Gauss-Newton matrix; see `curvature`."""
    diagonal = curvature.make_diagonal(outputs, loss, micro_batch=micro_batch)
    return lambda key, params, batch, mask=None: Diagonal(diagonal(params, batch, mask))
