"""What does a client say about its curvature? Its top eigenpairs, H ~= U diag(lam) U^T, and how good they are.

A `Sketcher` is how all clients of a cohort are sketched: a function of one client, and one of all of them.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.curvature import contracts, products
from fipa_jax.curvature.contracts import Features, Loss, Outputs
from fipa_jax.curvature.eigenpairs import TOLERANCE, Eigenpairs
from fipa_jax.curvature.eigenvalue_derivatives import differentiable
from fipa_jax.curvature.products import Curvature, JacobianName, make_gradient
from fipa_jax.curvature.solver_choice import Search, SolverName, View, check_view, make_solver, resolve
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup

# What a flag of the report means, in words.
FLAGS = {
    "not_finite": "products with the curvature are not finite; the sketch is empty",
    "asymmetric": "products with the curvature are not symmetric",
    "indefinite": "the curvature has negative eigenvalues, which are left out: the loss is not convex in the outputs",
    "rank_deficient": "the curvature's numerical rank is below the rank asked for; the surplus pairs are zero",
    "loss_truncated": "loss_rank leaves out curvature; residuals are those of what it keeps",
    "empty": "the client has no examples; the sketch is empty",
    "examples_mixed": "an example's outputs or loss change with the other examples of its batch",
    "not_last_layer": "the outputs are not the features times the last layer; the sketch is empty: use another solver",
}

# Flags that a client without a fault may well raise: by its data, or by what was asked.
EXPECTED = ("rank_deficient", "loss_truncated")

StoreName = Literal["bfloat16", "float16", "float32", "float64"]  # a name in `STORES`
STORES = {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float32", "float64")}  # in which a basis is sent


class Report(NamedTuple):
    """How good a sketch is: computed by the client, a few numbers to send."""

    residuals: jax.Array  # [R], |H u - lam u| / lam_max: bounds the distance to the nearest eigenvalue; 0 of no pair
    products: jax.Array  # [] int32, columns multiplied by H
    converged: jax.Array  # [] bool, all residuals are within the tolerance, and no larger eigenvalue is overlooked
    trace: jax.Array  # [], tr H, or its estimate, 0 if there is none; the sketch misses trace - sum(eigenvalues)
    trace_error: jax.Array  # [], one standard deviation of that estimate; 0 where it is exact, infinite if unknown
    flags: dict[str, jax.Array]  # [] bool each, see `FLAGS`


class Sketch(NamedTuple):
    """The top R eigenpairs of a symmetric positive semi-definite [P, P] matrix; left-out pairs are zero."""

    eigenvalues: jax.Array  # [R], descending, non-negative
    basis: jax.Array  # [P, R], orthonormal columns
    report: Report | None = None


class Diagonal(NamedTuple):
    """The diagonal of a client's curvature, for the diagonal rules."""

    values: jax.Array  # [P]


class SketchFunction(Protocol):
    """What `make_sketch` builds, of batches with leaves [N, ...], a mask [N] and a basis `start` [P, R]."""

    def __call__(self, key, params, batch, mask: jax.Array | None = None, start: jax.Array | None = None) -> Sketch: ...


DiagonalFunction = Callable[..., Diagonal]  # (key, params, batch, mask=None) -> Diagonal, what `make_diagonal` builds


def make_sketch(
    outputs: Outputs,
    loss: Loss,
    *,
    rank: int,
    solver: SolverName = "subspace",
    oversample: int = 10,
    power_steps: int = 2,
    tolerance: float = TOLERANCE,
    micro_batch: int = 0,
    jacobian: JacobianName = "matrix_free",
    features: Features | None = None,
    loss_rank: int = 0,
    probes: int = 4,
) -> SketchFunction:
    """Builds `sketch(key, params, batch, mask=None, start=None) -> Sketch` of the loss's Gauss-Newton matrix.

    Jit or vmap it. `start` is a basis [P, R] from which an iterative solver begins, such as that of the last round.

    Example:
      sketch = jax.jit(make_sketch(outputs, loss, rank=20, solver="lanczos"))
      sketch(jax.random.key(0), params, batch).eigenvalues has the shape [20].

    Args:
      outputs, loss, micro_batch, jacobian, features, loss_rank: see `products.make_ggn`.
      rank: R.
      solver: `subspace` (the paper's) or `lanczos`, on products as `jacobian` says; `rows`, the exact eigenpairs from
        the explicit rows; `head`, block Lanczos on the last layer's closed form; `auto` picks by
        `solver_choice.choose`.
      oversample, power_steps, tolerance: see `eigenpairs`.
      probes: random vectors for Hutchinson's estimate of the trace, one product each, where it is not known exactly.
        With `loss_rank`, eight times as many examples for the trace of what it leaves out. One gives an estimate
        without its error, none no estimate.

    Raises:
      ValueError: a name is not known, the rank does not fit, or what is given is not as `contracts` asks.
      TypeError: on differentiation of more than the eigenvalues, see `eigenvalue_derivatives`.
    """
    contracts.at_least(0, oversample=oversample, power_steps=power_steps, tolerance=tolerance, probes=probes)
    search = Search(solver, rank, oversample, power_steps, tolerance)
    check_view(solver, view := View(micro_batch, jacobian, features, loss_rank))

    def sketch(key, params, batch, mask=None, start=None) -> Sketch:
        contracts.floating(params, "params")
        batch, mask = contracts.present_rows(batch, mask)
        chosen, seen_by = resolve(outputs, params, batch, search, view)
        solve, ggn = make_solver(chosen), products.make_ggn(outputs, loss, **seen_by._asdict())
        # Random numbers, too, differ between devices if anything does.
        solve_key, probe_key = jax.random.split(vary_with(contracts.key(key), params, batch, mask, start))
        given = params, batch
        # Eigenpairs have no derivatives; their eigenvalues get one, see `eigenvalue_derivatives`.
        params, batch, start = jax.lax.stop_gradient((params, batch, start))
        with jax.default_matmul_precision("highest"):
            matrix = ggn(params, batch, mask)
            pairs = solve(solve_key, matrix, start)
            left, error = trace_left(probe_key, matrix, pairs, probes)
            mixed = contracts.mixes_examples(outputs, loss, params, batch, mask)
        trace_is_sought = probes or (matrix.trace is not None and matrix.left_out is None)
        report = Report(
            residuals=pairs.residuals,
            products=pairs.products + (probes if matrix.trace is None else 0),
            converged=pairs.converged & ~jnp.asarray(matrix.truncated),
            trace=jnp.sum(pairs.eigenvalues) + left,
            trace_error=error,
            flags=_flags(matrix, pairs, mask) | {"examples_mixed": jnp.asarray(mixed)},
        )
        found = Sketch(pairs.eigenvalues, pairs.vectors, _sound(report, trace_is_sought))
        return differentiable(outputs, loss, found, *given, mask, micro_batch, loss_rank)

    return sketch


def keeping_energy(sketch: SketchFunction, share: float) -> SketchFunction:
    """The sketch function with as few pairs as reach this share of the trace; the others are zero.

    The report's residuals are those of the pairs that are kept. All pairs stay where the trace is not known.

    Raises:
      ValueError: the share is not in [0, 1].
    """
    if contracts.is_known(share) and not 0 <= float(share) <= 1:
        raise ValueError(f"sketch.energy: needs a share in [0, 1], got {share}")

    def kept(key, params, batch, mask=None, start=None) -> Sketch:
        whole = sketch(key, params, batch, mask, start)
        return truncate(whole, enough(whole, share) | (_report_of(whole).trace == 0))

    return kept


def stored_as(sketch: SketchFunction, dtype: StoreName, tolerance: float = TOLERANCE) -> SketchFunction:
    """The sketch function with the basis in the dtype in which it is sent.

    `bfloat16` rounds each entry by at most 2^-8 of itself. The step moves by about 0.5 % where clients differ, but
    where their subspaces nearly coincide by as much as 2^-8 / damping allows: see `scripts/benchmark.py merge`.
    The report is that of the rounded basis: its residuals are bounds, see `_residuals_of`, and it has `converged` only
    if these are within the tolerance.

    Raises:
      ValueError: the dtype is not known.
    """
    store = lookup(STORES, dtype, "sketch.store")

    def stored(key, params, batch, mask=None, start=None) -> Sketch:
        whole = sketch(key, params, batch, mask, start)
        basis = whole.basis.astype(store)
        if whole.report is None or jnp.finfo(store).bits >= jnp.finfo(whole.basis.dtype).bits:
            return whole._replace(basis=basis)
        residuals = _residuals_of(basis.astype(whole.basis.dtype), whole)
        converged = whole.report.converged & jnp.all(residuals <= tolerance)
        return whole._replace(basis=basis, report=whole.report._replace(residuals=residuals, converged=converged))

    return stored


def _residuals_of(basis, sketch: Sketch):
    """[R]: at most how far U + E, the columns of a basis [P, R] near U, are from eigenvectors, in units of lam_max.

        H (u + e) - lam (u + e) = (H u - lam u) + (U diag(lam) c - lam e) + H (e - U c) + ..,    c = U^T e,

    where |H (e - U c)| <= mu |e - U c|, mu the largest eigenvalue outside of the sketch: its smallest one plus the
    largest residual if it has converged, else lam_max. The dots stand for residuals times c.
    """
    report, values, own = _report_of(sketch), sketch.eigenvalues, _report_of(sketch).residuals
    unit = jnp.where(values[0] > 0, values[0], 1)
    values, there = values / unit, values > 0
    moved = jnp.where(there[None], basis - sketch.basis, 0)
    inside = sketch.basis.T @ moved
    within = jnp.linalg.norm(sketch.basis @ (values[:, None] * inside) - values[None] * moved, axis=0)
    outside = jnp.linalg.norm(moved - sketch.basis @ inside, axis=0)
    beyond = jnp.where(report.converged, smallest(values) + jnp.max(own), 1)
    second_order = jnp.linalg.norm(own) * jnp.linalg.norm(inside, axis=0)
    return jnp.where(there, own + within + beyond * outside + second_order, 0)


def _flags(matrix: Curvature, pairs: Eigenpairs, mask) -> dict[str, jax.Array]:
    """{name in `FLAGS`: [] bool}."""
    flags = {name: getattr(pairs, name) for name in ("not_finite", "asymmetric", "indefinite")}
    flags["indefinite"] |= matrix.indefinite
    flags |= {"not_last_layer": jnp.asarray(matrix.not_last_layer), "loss_truncated": jnp.asarray(matrix.truncated)}
    flags["empty"] = jnp.zeros([], bool) if mask is None else ~jnp.any(mask)
    flags["not_finite"] &= ~flags["empty"]  # of examples that are not there
    flags["rank_deficient"] = jnp.any(pairs.eigenvalues == 0) & ~flags["empty"] & ~flags["not_finite"]
    return flags


def _sound(report: Report, trace_is_sought) -> Report:
    """The report without a NaN; a trace that is not finite raises its flag, unless nobody has estimated it."""
    flags = report.flags
    if trace_is_sought:
        flags = flags | {"not_finite": flags["not_finite"] | ~jnp.isfinite(report.trace)}
    is_known = jnp.isfinite(report.trace) & ~flags["not_finite"]
    return report._replace(
        converged=report.converged & ~flags["not_finite"],
        trace=jnp.where(is_known, report.trace, 0),
        trace_error=jnp.where(is_known & ~jnp.isnan(report.trace_error), report.trace_error, jnp.inf),
        flags=flags,
    )


def trace_left(key, matrix: Curvature, pairs: Eigenpairs, probes: int):
    """tr((I - U U^T) H (I - U U^T)), the curvature that the pairs miss, and the standard deviation of its estimate.

    Exact where the trace is known. Else by Hutchinson's method on what is left, w = z - U U^T z with random signs z:
    H w = H z - (H U) U^T z needs one product for each probe and the images H U that the solver has at hand. The pairs'
    part, which is the largest by far, adds no variance. What `loss_rank` leaves out of the matrix is estimated by
    itself. NaN without probes; with one the error is infinite.
    """
    unknown = jnp.full([], jnp.nan, matrix.dtype)
    if matrix.trace is not None:
        left = jnp.maximum(matrix.trace - jnp.sum(pairs.eigenvalues), 0)
        if matrix.left_out is None:
            return left, jnp.zeros_like(left)
        more, error = _mean_and_error(matrix.left_out(key, 8 * probes)) if probes else (unknown, unknown)
        return left + more, error
    if not probes:
        return unknown, unknown
    signs = jax.random.rademacher(key, [matrix.size, probes], matrix.dtype)
    inside = pairs.vectors.T @ signs
    left, image = signs - pairs.vectors @ inside, matrix.product(signs) - pairs.images @ inside
    mean, error = _mean_and_error(jnp.sum(left * image, axis=0))
    return jnp.maximum(mean, 0), error


def _mean_and_error(values):
    """The mean of independent estimates [n] and its standard deviation, which for one of them is unknown: infinite."""
    mean, number = jnp.mean(values), len(values)
    scale = jnp.max(jnp.abs(values - mean))
    apart = (values - mean) / jnp.where(scale > 0, scale, 1)  # whose squares neither overflow nor vanish
    error = scale * jnp.sqrt(jnp.mean(apart**2)) / jnp.sqrt(max(number - 1, 1))
    return mean, error if number > 1 else jnp.full_like(mean, jnp.inf)


def enough(sketch: Sketch, energy) -> jax.Array:
    """[R] bool: the fewest pairs whose eigenvalues reach `energy` times the trace."""
    before = jnp.cumsum(sketch.eigenvalues) - sketch.eigenvalues
    return before < energy * _report_of(sketch).trace


def _report_of(sketch: Sketch) -> Report:
    return contracts.given(sketch.report, "the sketch's report, whose trace and residuals are asked for")


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
    """Zeroes the pairs with keep [R] false: shapes stay, and a pair that is zero need not be sent.

    So are their residuals in the report. `converged` stays: what was not is not made so by leaving out.
    """

    def zero(values, mask):
        return jnp.where(mask, values, jnp.zeros((), values.dtype))

    report = sketch.report
    if report is not None:
        report = report._replace(residuals=zero(report.residuals, keep))
    return Sketch(zero(sketch.eigenvalues, keep), zero(sketch.basis, keep[None]), report)


def make_diagonal(outputs: Outputs, loss: Loss, *, micro_batch: int = 0) -> DiagonalFunction:
    """Builds `diagonal(key, params, batch, mask=None) -> Diagonal` of the Gauss-Newton matrix; see `products`."""
    diagonal = products.make_ggn_diagonal(outputs, loss, micro_batch=micro_batch)

    def keyed(key, params, batch, mask=None) -> Diagonal:
        return Diagonal(diagonal(params, batch, mask))

    return keyed


TaskOutputs = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (out [B, ...], features), the whole model
SketchMaker = Callable[[Outputs, Features], SketchFunction | DiagonalFunction]  # Features: its last layer's inputs
# (outputs, params, key, batch [N, ...], mask [N], and what the rule asks along) -> what one client finds
OfClient = Callable[..., Any]
# (what the clients find, stacked [C, ...]; the round's number [], from 0) -> Sketch, Diagonal, Image or Core
OfCohort = Callable[[Any, jax.Array], Any]


def _as_they_are(messages, round):
    return messages


class Sketcher(NamedTuple):
    """How clients are sketched: each by itself, and then what only the cohort together can decide."""

    of_client: OfClient
    of_cohort: OfCohort = _as_they_are
    sends_gradient: bool = False  # whether the clients send their gradients [P] too
    drawn_by: Callable[[jax.Array], jax.Array] = jnp.asarray  # ids [C] -> [C], those that their random keys are of
    due: Callable[..., jax.Array] | None = None  # (round [], key, ids [C]) -> [C] bool, who sends one; None for all
    bits: int = 0  # of an entry of a vector as it is sent, see `few_bits`; 0 for floating point


def plain(make: SketchMaker) -> Sketcher:
    """Every client's sketch as it is.

    Example:
      plain(lambda outputs, features: make_sketch(outputs, loss, features=features, rank=20)).of_client(
          task.outputs, params, key, batch, mask
      ) is the client's Sketch.

    Args:
      make: (outputs, features) -> a sketch function, of the model's outputs alone and of its last layer's inputs; both
        are functions of (params, batch).
    """

    def of_client(outputs: TaskOutputs, params, key, batch, mask):
        return make(*apart(outputs))(key, params, batch, mask)

    return Sketcher(of_client)


def with_rank_by_gradient(sketcher: Sketcher, loss: Loss, scale: float) -> Sketcher:
    """Sketches cut to the pairs that `above_gradient` keeps, by the gradients that the clients send along.

    Args:
      sketcher: gives sketches, not diagonals.
      loss: (out, batch) -> [B].
      scale: c of `above_gradient`.
    """

    def of_client(outputs: TaskOutputs, params, key, batch, mask):
        sketch = sketcher.of_client(outputs, params, key, batch, mask)
        return sketch, make_gradient(apart(outputs)[0], loss)(params, batch, mask)

    def of_cohort(messages, round) -> Sketch:
        sketches, gradients = sketcher.of_cohort(messages[0], round), messages[1]
        if not isinstance(sketches, Sketch):
            raise ValueError(f"sketch.gradient_scale: needs sketches, got {type(sketches).__name__}")
        # A client of NaN, which the aggregator sets aside, must not undo the others' sketches.
        gradients = trees.zero_unless(trees.is_finite(gradients), gradients)
        lengths, total = jnp.linalg.norm(gradients, axis=1), jnp.linalg.norm(jnp.sum(gradients, axis=0))
        kept = jax.vmap(above_gradient, (0, 0, None, None, None))(sketches, lengths, total, round + 1, scale)
        return jax.vmap(truncate)(sketches, kept)

    return sketcher._replace(of_client=of_client, of_cohort=of_cohort, sends_gradient=True)


def apart(outputs: TaskOutputs) -> tuple[Outputs, Features]:
    """(the model's outputs alone, the inputs of its last layer, None where it gives none)."""

    def alone(params, batch):
        return outputs(params, batch)[0]

    def last_inputs(params, batch) -> Any:
        return getattr(outputs(params, batch)[1], "last", None)

    return alone, last_inputs
