"""FIPA where clients send no eigenvector: curvature within the span of gradients, which the server has anyway.

A gradient of softmax or least squares is a sum of the rows whose Gram matrix the curvature is, so past gradients span
the directions in which a client's data pin down most. The server shows its cohort a basis Q [P, s] of them; a client
answers with its gradient and with the core M_m = Q^T H_m Q, s (s + 1) / 2 numbers in place of s P. Answers count for
less with their age: over the rounds k, of n_k examples and with age a_k,

    K = sum_k decay^{a_k} n_k Q_k M_k Q_k^T        sum of the cores, M_k = sum_m w_m M_m
    E = sum_k decay^{a_k} n_k Q_k Q_k^T            by how many examples each direction is known
    Hs = E^{-1/2} K E^{-1/2}                       the mean core, direction by direction
    step = -(Hs + beta I)^{-1} g                   beta: the least eigenvalue of Hs among the directions known
           -max(beta, h(u))^{-1} g'                u = g' / |g'|

of the part g of sum_m w_m g_m within the span and the part g' outside. (With the term FedVARP or MIFA
all g_m are as it completes them.) Each direction is averaged over the rounds in which it was in the basis. About a
direction q that is new nobody has answered yet, and a few clients that are asked first may have none of its curvature:
they would make it look flat. So there is a guess,

    h(q) = c f(q),    f(q) = sum_m w_m (q^T g_m)^2 / sum_m w_m |g_m|^2

f being the share of the cohort's squared gradients that lies along q, and c such that what clients last said of new
directions was guessed right in the mean. It enters K and E as if `prior` cohorts had answered. No damping is tuned: the
least curvature that is known stands for what is as weak. Where the basis is full, K and E are cut to the directions of
most curvature, and what was known of the others is forgotten.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import WEIGHTINGS, Aggregator, Info, Needs, Weighting, weights_of
from fipa_jax.aggregate.limits import Limits, other_bounds
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature import contracts, few_bits
from fipa_jax.curvature.common_basis import Core
from fipa_jax.curvature.contracts import Number
from fipa_jax.lookup import lookup
from fipa_jax.trees import ratio

# What the rule's `info` says, beside that of the screening.
INFO_OF_SPAN = {
    "columns": "[] int32, directions of the basis about which the cohort was asked",
    "damping": "[], beta of the step",
    "divergence": "[], half of step^T A step, of the matrix A by whose inverse the step is made",
    "effective_rank": "[], sum of lam / (lam + beta) over the eigenvalues known",
    "explained": "[], the share of the mean gradient's length that lies in the span",
    "fedavg_cosine": "[], cosine of the step and the clients' mean update",
    "fedavg_norm_ratio": "[], the step's length over that of the mean update",
    "guess": "[], h(u), the curvature that is guessed outside of the span",
    "spectrum": "[s], eigenvalues of Hs, descending; zero where nothing is known",
}
LEAST_MEASURED = 1e-5  # of the largest eigenvalue of E: below it is rounding, and a direction has not been measured
OF_GUESSES = 0.9  # by which what c is made of counts for less with each round that adds to it
LEAST_DAMPING = 100  # times the rounding of the largest eigenvalue of Hs: below it an eigenvalue is not known
BOUND = Limits(max_step=0.0, max_divergence=0.5, explosion=0.0, trace_cap=0.0)


class SpanOptions(NamedTuple):
    """What clients are asked about; the group `aggregator.span` of a config."""

    columns: int = 100  # s, directions at most
    fresh: int = 5  # of them from the last round's gradients: all of a cohort of so many, else the leading ones
    decay: float = 0.99  # by which answers count for less with each round, at most 1
    prior: float = 0.3  # of a new direction's curvature: how many cohorts' answers the guess counts for; 0 for none
    bits: int = 8  # of an entry of the basis as it is sent, rounded at random: 2 to 16; 0 for floating point
    seed: int = 0  # of the rounding


class SpanState(NamedTuple):
    """What the server keeps. K and E are in the coordinates of `basis`."""

    hyper: dict[str, jax.Array]  # {field of `config.fipa.aggregator`: []}, the numbers that are traced
    basis: jax.Array  # [P, s], Q: orthonormal columns, those not in use zero
    active: jax.Array  # [] int32, columns in use, the first ones
    new: jax.Array  # [] int32, of these the last so many are new
    core_sum: jax.Array  # [s, s], Q^T K Q
    measured: jax.Array  # [s, s], Q^T E Q
    # c is found / shares, of directions that were new: their curvature by the first answers, and their f.
    found: jax.Array  # []
    shares: jax.Array  # []
    shares_of_new: jax.Array  # [], of those that are new now
    round: jax.Array  # [] int32


class Known(NamedTuple):
    """Hs = V diag(lam) V^T, of the directions about which clients have answered, or there is a guess."""

    values: jax.Array  # [s], lam, descending; zero where nothing is known
    rotation: jax.Array  # [s, s], orthogonal; V = Q rotation
    count: jax.Array  # [] int32, the first so many are known


def from_span(
    *,
    span: SpanOptions = SpanOptions(),
    damping: Number = 0.0,
    limits: Limits = BOUND,
    weighting: Weighting = "examples",
) -> Aggregator:
    """FIPA in the span of gradients, as an aggregation rule; clients send gradients (`client.first_order.gradient`).

    Example:
      rule = from_span(span=SpanOptions(columns=50))
      basis, active = rule.asks(state)   # what the clients multiply: `curvature.make_core`
      received, screening = receive(Uploads(minus_gradients, num_examples, Core(cores)), params)
      step, state, info, received = step_of(rule, received, state, params, screening)

    Args:
      span: how, see `SpanOptions`.
      damping: beta at least; with 0 it is at least the rounding of the largest eigenvalue.
      limits: of them `max_divergence` alone, a bound on half of step^T A step, A^{-1} being what the gradient is
        multiplied by.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.

    Returns:
      The rule; its state is a `SpanState`, and `INFO_OF_SPAN` says what its `info` holds. Until a client has answered
      its step is zero. A client whose core is all zeros has not answered: its gradient counts alone.

    Raises:
      ValueError: a number is out of its range, or a limit is asked for that the rule has not; in `apply`, uploads
        without cores of all s columns, or of late clients, whose cores are of another basis.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    _check(span, limits)
    numbers = {"damping": damping, "limits.max_divergence": limits.max_divergence}
    numbers |= {"span.decay": span.decay, "span.prior": span.prior}
    contracts.at_least(0, **numbers)

    def init(params):
        theta = trees.ravel(trees.widened(contracts.floating(params, "params")))
        columns = min(span.columns, theta.size)
        hyper = {name: jnp.array(value, theta.dtype) for name, value in numbers.items()}
        shapes = {"basis": [theta.size, columns], "core_sum": [columns, columns], "measured": [columns, columns]}
        counts = {name: jnp.zeros([], jnp.int32) for name in ("active", "new", "round")}
        numbers_of = {name: jnp.zeros([], theta.dtype) for name in ("found", "shares", "shares_of_new")}
        blank = {name: jnp.zeros(shape, theta.dtype) for name, shape in shapes.items()}
        return SpanState(hyper, **blank, **counts, **numbers_of)

    def apply(received: Received, before: SpanState, params):
        cores = _cores_of(received, before)
        weights, size = weights_of(received, params, weighting)
        with jax.default_matmul_precision("highest"):
            gradients = received.deltas.astype(before.basis.dtype)  # -g_m
            counts = jnp.where(jnp.any(cores != 0, axis=(1, 2)), weights * size, 0)
            total = jnp.tensordot(counts, cores.astype(counts.dtype), 1)
            state = _with_answers(before, total, jnp.sum(counts))
            known = mean_core(state.core_sum, state.measured, state.active)
            directions = _rotated(state.basis, known.rotation)

            def shares(vectors):  # f of [P, n]
                return ratio(weights @ (gradients @ vectors) ** 2, weights @ jnp.sum(gradients**2, axis=1))

            step, info = _step(weights @ gradients, known, directions, state, shares)
            after = _next(state, known, directions, weights[:, None] * gradients, span.fresh)
            after = _with_guess(after, shares(after.basis), size)
        after = jax.tree.map(lambda new, old: jnp.where(size > 0, new, old), after, before)
        return ravel_pytree(params)[1](step), after, info | {"columns": before.active}

    def asks(state: SpanState):
        return _as_sent(state, span), state.active

    return Aggregator(init, apply, Needs("core", gradient=True), tuple(numbers), asks=asks)


def _check(span: SpanOptions, limits: Limits) -> None:
    """Refuses, with a ValueError, options out of their range."""
    if not 1 <= span.fresh <= span.columns:
        raise ValueError(
            f"aggregator.span.fresh: needs at least 1, and at most columns = {span.columns}, got {span.fresh}"
        )
    if contracts.is_known(span.decay) and not 0 <= span.decay <= 1:
        raise ValueError(f"aggregator.span.decay: needs a number in [0, 1], got {span.decay}")
    if span.bits:
        few_bits.check(span.bits, "aggregator.span.bits")
    if others := other_bounds(limits):
        raise ValueError(
            f"aggregator.limits.{others[0]}: the rule 'span' bounds its step by max_divergence alone; set "
            f"{', '.join(f'limits.{name} = 0' for name in others)}, or compare the method 'fipa_span', which does"
        )


def _cores_of(received: Received, state: SpanState) -> jax.Array:
    """[C, s, s], zero for those that take no part."""
    if not isinstance(received.sketch, Core):
        raise ValueError("span needs uploads.sketch, a Core of values [C, s, s], the curvature within its basis")
    got, columns = received.sketch.values.shape, state.basis.shape[1]
    if got[1] != columns:
        raise ValueError(f"uploads.sketch: needed cores [C, s, s] with s = {columns}, all columns of `asks`, got {got}")
    if received.age is not None:
        raise ValueError("span needs clients that are not late: their cores are of another basis")
    return trees.zero_unless(received.took_part, received.sketch.values)


def _with_answers(state: SpanState, total: jax.Array, number: jax.Array) -> SpanState:
    """The state after a round, in the coordinates of the old basis.

    Args:
      total: [s, s], the sum of the cores that have come, each times the number that its client counts for.
      number: [], the sum of these numbers; 0 where no client has answered.
    """
    decay, in_use = state.hyper["span.decay"], (jnp.arange(total.shape[0]) < state.active).astype(total.dtype)
    found = ratio(jnp.sum(_is_new(state) * jnp.diagonal(total)), number)
    heard = (number > 0) & (state.new > 0)
    return state._replace(
        core_sum=decay * state.core_sum + (total + total.T) / 2,
        measured=decay * state.measured + number * jnp.diag(in_use),
        found=jnp.where(heard, OF_GUESSES * state.found + found, state.found),
        shares=jnp.where(heard, OF_GUESSES * state.shares + state.shares_of_new, state.shares),
    )


def _with_guess(state: SpanState, shares: jax.Array, size: jax.Array) -> SpanState:
    """The state with the guess of its new directions' curvature, once clients have answered about some.

    Args:
      shares: [s], f of its columns.
      size: [], of the cohort, by which `weights_of` scales the clients' numbers.
    """
    shares = _is_new(state) * shares
    number = jnp.where(state.found > 0, state.hyper["span.prior"] * size, 0)
    return state._replace(
        core_sum=state.core_sum + number * jnp.diag(ratio(state.found, state.shares) * shares),
        measured=state.measured + number * jnp.diag(_is_new(state)),
        shares_of_new=jnp.sum(shares),
    )


def _is_new(state: SpanState) -> jax.Array:
    """[s], 1 for the columns that are new and 0 for the others."""
    columns = jnp.arange(state.basis.shape[1])
    return ((columns < state.active) & (columns >= state.active - state.new)).astype(state.basis.dtype)


def mean_core(core_sum: jax.Array, measured: jax.Array, active: jax.Array | int) -> Known:
    """The eigenpairs of E^{-1/2} K E^{-1/2} in the range of E, the largest first.

    Behind them come the columns in use about which nothing is known yet, then those not in use.

    Args:
      core_sum: K [s, s], symmetric.
      measured: E [s, s], symmetric and positive semi-definite.
      active: [], columns in use.
    """
    weights, axes = jnp.linalg.eigh(measured)
    known = weights > LEAST_MEASURED * weights[-1]
    root = (axes * jnp.where(known, 1 / jnp.sqrt(jnp.where(known, weights, 1)), 0)[None]) @ axes.T
    mean = root @ core_sum @ root
    unknown = (axes * ~known[None]) @ axes.T + jnp.diag((jnp.arange(known.size) >= active).astype(weights.dtype))
    largest = known.size * jnp.max(jnp.abs(mean))  # at least the largest eigenvalue
    values, rotation = jnp.linalg.eigh((mean + mean.T) / 2 - jnp.maximum(largest, 1) * unknown)
    count = jnp.sum(known, dtype=jnp.int32)
    values = jnp.where(jnp.arange(values.size) < count, jnp.maximum(values[::-1], 0), 0)
    return Known(values, rotation[:, ::-1], count)


def _step(
    mean: jax.Array, known: Known, directions: jax.Array, state: SpanState, shares: Callable
) -> tuple[jax.Array, Info]:
    """(the step [P], what to say of it) of the mean update -g [P]; `shares` gives f of vectors [P, n]."""
    directions = directions * (jnp.arange(known.values.size) < known.count)[None]
    inside, outside = directions.T @ mean, _orthogonal_part(directions, mean)
    least = known.values[jnp.maximum(known.count - 1, 0)]
    rounding = LEAST_DAMPING * jnp.finfo(mean.dtype).eps * known.values[0]
    beta = jnp.maximum(jnp.maximum(state.hyper["damping"], least), rounding)
    guess = ratio(state.found, state.shares) * shares(ratio(outside, trees.length(outside))[:, None])[0]
    full = directions @ ratio(inside, known.values + beta) + ratio(outside, jnp.maximum(beta, guess))
    full = jnp.where(known.count > 0, full, 0)
    most, curve = state.hyper["limits.max_divergence"], jnp.vdot(full, mean)
    over = (most > 0) & (curve > 2 * most)
    factor = trees.root(jnp.where(over, ratio(2 * most, curve), 1))
    step, length = factor * full, trees.length(mean)
    info = {
        "damping": beta,
        "divergence": factor**2 * curve / 2,
        "effective_rank": jnp.sum(ratio(known.values, known.values + beta)),
        "explained": ratio(trees.length(inside), length),
        "fedavg_cosine": ratio(jnp.vdot(step, mean), trees.length(step) * length),
        "fedavg_norm_ratio": ratio(trees.length(step), length),
        "guess": guess,
        "spectrum": known.values,
    }
    return step, info


def _next(state: SpanState, known: Known, directions, gradients: jax.Array, fresh: int) -> SpanState:
    """The state with the directions about which clients are asked next.

    These are those of most curvature, and behind them the leading ones of the gradients [C, P] beside these.
    """
    columns = directions.shape[1]
    fresh = min(fresh, gradients.shape[0], columns)
    kept = jnp.minimum(state.active, columns - fresh)
    stays = (jnp.arange(columns) < kept).astype(directions.dtype)
    directions, rotation = directions * stays[None], known.rotation * stays[None]
    new, number = _new_directions(directions, gradients, fresh)
    basis = jax.lax.dynamic_update_slice_in_dim(directions, new, kept, axis=1)
    core_sum, measured = (rotation.T @ matrix @ rotation for matrix in (state.core_sum, state.measured))
    return state._replace(
        basis=basis, active=kept + number, new=number, core_sum=core_sum, measured=measured, round=state.round + 1
    )


def _new_directions(directions: jax.Array, gradients: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """([P, most], how many): the leading directions of what is left of gradients [C, P] beside known ones [P, s].

    Fewer where gradients depend on each other, or lie in the span of the known ones; the other columns are zero.
    """
    left, triangle = jnp.linalg.qr(_orthogonal_part(directions, gradients.T))
    inner, sizes, _ = jnp.linalg.svd(triangle)
    longest = jnp.max(jnp.linalg.norm(gradients, axis=1))
    real = (sizes > jnp.sqrt(jnp.finfo(sizes.dtype).eps) * longest)[:most]
    leading = jnp.where(real[None], left @ inner[:, :most], 0)
    leading = jnp.linalg.qr(_orthogonal_part(directions, leading))[0]
    return jnp.where(real[None], leading, 0), jnp.sum(real, dtype=jnp.int32)


def _rotated(basis: jax.Array, rotation: jax.Array) -> jax.Array:
    """[P, s]: basis @ rotation, made orthonormal again to first order, or its rounding would add up over the rounds."""
    gram = basis.T @ basis
    return basis @ (1.5 * rotation - gram @ rotation / 2)


def _orthogonal_part(directions: jax.Array, vectors: jax.Array) -> jax.Array:
    """The vectors [P] or [P, C] without their part in the span of directions [P, s], orthonormal or zero."""
    for _ in range(2):
        vectors = vectors - directions @ (directions.T @ vectors)
    return vectors


def _as_sent(state: SpanState, span: SpanOptions) -> jax.Array:
    """The basis as clients receive it; its rounding is drawn anew in each round."""
    if not span.bits:
        return state.basis
    key = jax.random.fold_in(jax.random.key(span.seed), state.round)
    return few_bits.columns_sent(key, state.basis, span.bits)
