"""How much damping? A rule for few clients of many: each new cohort says whether the last steps had too little.

A larger damping makes a step s = -(H + beta I)^{-1} g shorter, most of all where H knows no curvature:

    ds / dlog beta = -beta (H + beta I)^{-1} s

Would that have been better? The next cohort's gradient g' at the parameters to which the step has led says so, of the
loss of clients that had no part in the step: its derivative in log beta is g'^T ds / dlog beta. And g' is known from
the step s' that the server is about to take, -g' = (H' + beta I) s'. So two successive steps are enough, without a
further message: where they agree, s'^T (H' + beta I) (-ds / dlog beta) > 0, the last one was too short and beta falls;
where the new step takes the last one back it grows. This is hypergradient descent (Baydin et al. 2018, arXiv
1703.04782) on log beta, with a cosine in place of the derivative, so that no unit of the loss matters.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate import merged_curvature
from fipa_jax.aggregate.factorisations import arithmetic, dot
from fipa_jax.aggregate.limits import shortened
from fipa_jax.aggregate.merged_curvature import Factor
from fipa_jax.aggregate.solvers import Messages, Solution, Solver, check_order

RECALL = 0.5  # of the steps before the last one: each counts so much less than the one after it


class Adaptive(NamedTuple):
    """What a solver remembers of its last steps."""

    way: jax.Array  # [P], -dtheta / dlog beta of the last steps, each of length 1 in the metric of H + beta I
    rounds: jax.Array  # [] int32, so many have been taken


def adaptive(inner: Solver) -> Solver:
    """A solver whose damping follows how the steps of successive cohorts agree; see the head of this module.

        beta <- beta exp(-agreement),   agreement = <s', way> / (|s'| |way|) in the metric of H' + beta I

    The damping that the inner solver comes with is the first round's alone. After it comes what the first cohort's
    sketches leave out, `left_out`, so that no unit of the loss or the parameters matters; where that is nothing, the
    first round's goes on.

    For updates that are damped natural gradients, which the form undoes, alone or beside a past that stays where it is,
    `prior`: then what (H + beta I)^{-1} is applied to does not depend on beta, and the step does as said. The server
    adds the step as it is, or in proportion.

    Raises:
      ValueError: the inner solver has no damping, a relative one, finds it by another rule, or is capped: the cap has
        to be outside, as what the sketches leave out is read from those that are capped.
    """
    if "damping" not in inner.hyper:
        raise ValueError("aggregator.past.adaptive: 'pinv' has no damping to adapt; set aggregator.form = 'damped'")
    if inner.relative:
        raise ValueError("aggregator.past.adaptive: finds an absolute damping; set aggregator.relative to False")
    check_order(
        inner,
        {
            "trust_region": "aggregator.trust: finds the damping already; set aggregator.past.adaptive to False",
            "adaptive": "aggregator.past.adaptive: the solver finds its damping already; wrap it once",
            "capped": "aggregator.limits.trace_cap: must be outside of what adapts: capped(adaptive(...))",
        },
    )

    def init(theta):
        return Adaptive(jnp.zeros_like(theta), jnp.int32(0)), inner.init(theta)

    def solve(messages, hyper, state, now):
        last, rest = state
        solution, _, rest, info = inner.solve(messages, hyper, rest, now)
        fixed, cohort, beta = jax.lax.stop_gradient((solution, messages[0], hyper["damping"]))
        agreement = _cosine(fixed.factor, fixed.beta, fixed.full, last.way)
        start = left_out(cohort)
        first = (last.rounds == 0) & (start > 0)
        following = jnp.where(first, start, beta * jnp.exp(-agreement))
        way = RECALL * last.way + _unit(fixed.factor, fixed.beta, less_damped(fixed))
        new = Adaptive(way, last.rounds + 1)
        kept, following = jax.tree.map(
            lambda new, old: jnp.where(now.size > 0, new, old), (new, _inside(following)), (last, beta)
        )
        info |= {"damping": beta, "agreement": agreement}
        return solution, hyper | {"damping": following}, (kept, rest), info

    def withdraws(state):
        return inner.withdraws(state[1])

    return Solver(inner.hyper, init, solve, inner.needs, withdraws, (*inner.wrappers, "adaptive"))


def left_out(cohort: Messages) -> jax.Array:
    """[], the largest curvature that a client's sketch can have left out, as it counts in H: the mean of w_m lam_mR."""
    return jnp.sum(cohort.weights**2 * jnp.maximum(cohort.sketch.eigenvalues[:, -1], 0))


def less_damped(solution: Solution) -> jax.Array:
    """-ds / dlog beta [P] of the step s that was taken: where a smaller damping would have led it.

    beta (H + beta I)^{-1} s; of a step that a bound has shortened, which keeps its length in the metric of H whatever
    beta is, without the part along s that would lengthen it:

        beta (H + beta I)^{-1} s - rho s,   rho = s^T H beta (H + beta I)^{-1} s / s^T H s
    """
    step, factor = solution.full, solution.factor
    held = held_back(factor, step, solution.beta)
    factor_of_length = shortened(solution.step, step)
    curve = merged_curvature.quadratic(factor, step)
    # H (H + beta I)^{-1} = I - beta (H + beta I)^{-1}, so that s^T H beta (H + beta I)^{-1} s = beta s^T (s - held).
    rho = trees.ratio(solution.beta * jnp.vdot(step, step - held), curve)
    return factor_of_length * (held - jnp.where(factor_of_length < 1, rho, 0) * step)


def held_back(factor: Factor, vector: jax.Array, beta: jax.Array) -> jax.Array:
    """beta (H + beta I)^{-1} vector [P]: all of it where H knows no curvature, nothing where that is far above beta."""
    wide, factor = factor.right.dtype, dataclasses.replace(factor, base=None)
    with arithmetic(wide):
        along = jnp.concatenate([part.reshape(-1) for part in merged_curvature.image(factor, vector)])
        shrunk = dot(factor.right, along) / (factor.eigenvalues + beta.astype(wide))
        return vector - merged_curvature.combine(factor, dot(factor.right.T, shrunk))


def _cosine(factor: Factor, beta: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """[], of two vectors [P] in the metric of H + beta I; 0 where one of them is none."""
    one, other = (_unit(factor, beta, vector) for vector in (one, other))
    return (_square(factor, beta, one + other) - _square(factor, beta, one - other)) / 4


def _unit(factor: Factor, beta: jax.Array, vector: jax.Array) -> jax.Array:
    """[P], the vector with the length 1 in the metric of H + beta I."""
    return trees.ratio(vector, trees.root(_square(factor, beta, vector)))


def _square(factor: Factor, beta: jax.Array, vector: jax.Array) -> jax.Array:
    """vector^T (H + beta I) vector []."""
    return merged_curvature.quadratic(factor, vector) + beta * jnp.vdot(vector, vector)


def _inside(damping: jax.Array) -> jax.Array:
    """A damping from which it can come back, whatever the losses."""
    limits = jnp.finfo(damping.dtype)
    sound = jnp.nan_to_num(damping, nan=limits.max, posinf=limits.max)
    return jnp.clip(sound, limits.eps**2, jnp.sqrt(limits.max))
