"""How far may one round, or one client, move the parameters? Wrappers of a solver that bound the step and a client."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate import merged_curvature
from fipa_jax.aggregate.solvers import Solver, check_order
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.sketch import Sketch


class Limits(NamedTuple):
    """The bounds; the group `aggregator.limits` of a config. 0 is no bound."""

    max_step: Number = 5.0  # on |step| / max_m |delta_m|, see `limited`
    max_divergence: Number = 0.0  # on step^T H step / 2, see `limited`
    explosion: Number = 100.0  # the ratio above which another step is taken, see `solvers.pinv`
    trace_cap: float = 1000.0  # on a client's trace over the clients' median, see `capped`


def other_bounds(limits: Limits) -> list[str]:
    """The names of the bounds that are set, or traced, beside `max_divergence`."""
    bounds = {name: value for name, value in limits._asdict().items() if name != "max_divergence"}
    return [name for name, value in bounds.items() if not contracts.is_known(value) or value]


def limited(
    inner: Solver, *, max_step: Number = 5.0, max_divergence: Number = 0.0, with_damping: bool = False
) -> Solver:
    """Shortens the step of a solver to two bounds; a step within both passes bit for bit.

    Args:
      max_step: on |step| / max_m |delta_m|, with `latest` also of absent clients, as seen from the present parameters:
        nearly collinear clients can otherwise amplify noise. 0 for no bound.
      max_divergence: on step^T H step / 2: to second order, for a likelihood, by how much the model's answers move in
        Kullback-Leibler divergence, the mean over the clients' examples. 0 for no bound.
      with_damping: whether that is on step^T (H + beta I) step / 2: where little curvature has been sent, the damping
        stands for the rest, and a bound by H alone would not see a step of length |g| / beta.

    Raises:
      ValueError: the inner solver is limited already, takes steps back, which must not be shortened, or adapts its
        damping to the steps that it has seen.
    """
    check_order(
        inner,
        {
            "limited": "aggregator.limits: the solver is limited already; wrap it once, with both bounds",
            "trust_region": "aggregator.limits: must be inside of the trust region: trust_region(limited(...))",
            "adaptive": "aggregator.limits: must be inside of what adapts: adaptive(limited(...))",
        },
    )

    def solve(messages, hyper, state, now):
        solution, hyper, state, info = inner.solve(messages, hyper, state, now)
        full = solution.full
        bound = jnp.where(hyper["limits.max_step"] > 0, hyper["limits.max_step"] * solution.longest, jnp.inf)
        curve = merged_curvature.quadratic(solution.factor, full)
        curve = curve + solution.beta * jnp.sum(full**2) if with_damping else curve
        curve = jnp.minimum(curve, jnp.finfo(full.dtype).max)
        limit = jnp.where(hyper["limits.max_divergence"] > 0, 2 * hyper["limits.max_divergence"], jnp.inf)
        over = curve > limit  # asked twice, as a derivative of inf / curve would be NaN
        factor = trees.root(jnp.where(over, trees.ratio(jnp.where(over, limit, 1), curve), 1))
        step = _bounded(factor * full, bound)
        factor = shortened(step, full)
        return solution._replace(step=step, curve=curve), hyper, state, info | {"divergence": factor**2 * curve / 2}

    bounds = {"limits.max_step": max_step, "limits.max_divergence": max_divergence}
    return inner._replace(hyper=inner.hyper | bounds, solve=solve, wrappers=(*inner.wrappers, "limited"))


def shortened(step: jax.Array, full: jax.Array) -> jax.Array:
    """[], the length of a step over that of the one before its bounds."""
    return trees.ratio(trees.length(step), trees.length(full))


def _bounded(step: jax.Array, bound: jax.Array) -> jax.Array:
    """Shortens the step to `bound`; a step of that length or less passes bit for bit."""
    length = trees.length(step)
    over = length > bound
    return step * jnp.where(over, trees.ratio(jnp.where(over, bound, 1), length), 1)


def capped(inner: Solver, *, trace_cap: float = 1000.0) -> Solver:
    """Scales the clients' eigenvalues down so that no client's sum is above `trace_cap` times their median.

    How far can one client j move the step? In the damped form, with s' the step without it at the same beta,
    d = delta_j - s', A = sum_{m != j} w_m (H_m + beta I) and K = w_j (H_j + beta I):

        (A + K) s = A s' + K delta_j, so that x = s - s' has (A + K) x = K d, and |x|_A <= |d|_A
        |x|_A^2 + |x|_K^2 = x^T K d <= |x|_K |d|_K, so that |x|_A <= |d|_K / 2

    The first holds whatever its eigenvalues are: a client without bounds decides alone in the directions that it names.
    With the cap c and tau the median of the traces K <= kappa I, kappa = w_j (c tau + beta): the others' model of
    their loss, |x|_A^2 / 2, rises by at most kappa |d|^2 / 8. `limited` says nothing of that; its max_step bounds |x|
    by 2 max_step max_m |delta_m|, in any form and at any beta. Through A >= (1 - w_j) beta I the cap gives
    |x| <= (kappa / ((1 - w_j) beta))^{1/2} |d| / 2, which is more unless beta is large. And where beta is relative the
    cap keeps one client's eigenvalues from raising it above all that the others know.

    That is worth something where tau is no more than a sound client's trace, see `median_trace`: while less than half
    of the clients are at fault. Of two nobody can say which one is, and neither is capped.

    Args:
      trace_cap: c; 0 for no cap.

    Raises:
      ValueError: the inner solver is capped already; the cap is negative or NaN.
    """
    contracts.at_least(0, **{"limits.trace_cap": trace_cap})
    check_order(inner, {"capped": "aggregator.limits.trace_cap: the solver is capped already; wrap it once"})

    def solve(messages, hyper, state, now):
        clients, *others = messages
        traces = traces_of(clients.sketch, clients.weights)
        middle = median_trace(traces, jnp.where(traces > 0, clients.weights, 0))  # of those who have sent any
        most = trace_cap * middle if trace_cap else jnp.inf
        sketch, over = cap_traces(clients.sketch, traces, most)
        solution, hyper, state, info = inner.solve([clients._replace(sketch=sketch), *others], hyper, state, now)
        told = {"capped": over, "trace_ratio": trees.ratio(jnp.max(traces), middle)}
        return solution, hyper, state, info | told

    return inner._replace(solve=solve, wrappers=(*inner.wrappers, "capped"))


FULL_VOTE = 0.01  # of the largest weight: a client of less has less of a say in what is usual


def traces_of(sketch: Sketch, weights: jax.Array) -> jax.Array:
    """[C], the sums of the clients' eigenvalues [C, R]; 0 for clients of weight 0."""
    return jnp.where(weights > 0, jnp.sum(jnp.maximum(sketch.eigenvalues, 0), axis=1), 0)


def median_trace(traces: jax.Array, weights: jax.Array) -> jax.Array:
    """[], the median of the clients' traces [C], continuous in traces and weights [C]; of two clients the larger.

    Each client has a vote, one of less than a hundredth of the largest weight as much less. In the order of their
    traces, the votes that follow half of all, as many as half a full one, say what is usual: of equal votes the middle
    client's trace, the upper one of two. While less than half of the votes are at fault, by half a vote at least, that
    is no more than some sound client's. Two clients alone cannot outvote each other: as far as a full vote beside the
    two largest is missing, the largest trace counts.
    """
    traces = jnp.where(weights > 0, traces, 0)
    if traces.size < 3:
        return jnp.max(traces)
    votes = jnp.minimum(trees.ratio(weights, FULL_VOTE * jnp.max(weights)), 1)
    order = jnp.argsort(traces)
    until = jnp.cumsum(votes[order])
    start = until[-1] / 2
    shares = jnp.clip(until - start, 0, 0.5)
    middle = 2 * jnp.sum(jnp.diff(shares, prepend=0) * traces[order])
    beside = jnp.minimum(jnp.sum(jnp.sort(votes)[:-2]), 1)
    return beside * middle + (1 - beside) * jnp.max(traces)


def cap_traces(sketch: Sketch, traces: jax.Array, most: jax.Array | float) -> tuple[Sketch, jax.Array]:
    """(sketch, capped [C] bool): eigenvalues scaled down so that no trace [C] is above `most` []."""
    over = traces > most
    most = jnp.where(over, most, 1)  # a derivative of inf / trace would be NaN
    factor = jnp.where(over, trees.ratio(most, traces), 1).astype(sketch.eigenvalues.dtype)
    return sketch._replace(eigenvalues=sketch.eigenvalues * factor[:, None]), over
