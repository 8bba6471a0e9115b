"""Was the last step a good one? The damping that follows from it, and the way back where it was not.

Levenberg-Marquardt's question, asked by a server: clients report their loss at the parameters they receive, so it
learns one round later whether a step has lowered the mean loss, and by how much of what its model had promised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.aggregate import merged_curvature
from fipa_jax.aggregate.limits import shortened
from fipa_jax.aggregate.solvers import Solver, check_order


class Trust(NamedTuple):
    """What a solver remembers of its last step."""

    step: jax.Array  # [P]
    loss: jax.Array  # [], the mean loss that the step started from
    predicted: jax.Array  # [], the decrease that it promised; 0 where there is nothing to judge
    growth: jax.Array  # [], by which the damping grows if the step is rejected
    damping: jax.Array  # [], that the step was taken with
    clients: jax.Array  # [], so many took part in it
    undone: jax.Array  # [] bool: this step is the one before, taken back


class Verdict(NamedTuple):
    """Of the last step."""

    accepted: jax.Array  # [] bool
    damping: jax.Array  # [], of the next round
    growth: jax.Array  # []
    gain: jax.Array  # [], actual over predicted decrease; 1 is a perfect model


def init(size: int, dtype) -> Trust:
    """Before the first step: nothing to judge."""
    loss, predicted, growth, damping = (jnp.asarray(value, dtype) for value in (jnp.inf, 0.0, 2.0, 0.0))
    return Trust(jnp.zeros([size], dtype), loss, predicted, growth, damping, jnp.int32(0), jnp.zeros([], bool))


def judge(trust: Trust, loss: jax.Array, damping: jax.Array, clients: jax.Array) -> Verdict:
    """Judges the last step by the loss [] that it led to (Nielsen 1999, "Damping parameter in Marquardt's method").

        gain = (loss before - loss) / predicted decrease
        gain > 0:   beta <- beta max(1/3, 1 - (2 gain - 1)^3),   growth <- 2
        otherwise:  the step is undone, beta <- beta growth,     growth <- 2 growth

    A verdict comes one round late: the step that is undone was taken with an earlier beta, and where that was the
    larger one it is what grows. A step that cost a client, whose loss or update is not finite any more, is undone too:
    the others' mean may be lower.

    Args:
      clients: [], so many take part now.
    """
    judged = trust.predicted > 0
    gain = jnp.where(judged, (trust.loss - loss) / jnp.where(judged, trust.predicted, 1), 1)
    accepted = ~judged | ((gain > 0) & (clients >= trust.clients))  # a loss of NaN compares false
    shrink = jnp.clip(1 - (2 * gain - 1) ** 3, 1 / 3, 2)
    grown = jnp.maximum(damping, trust.damping) * trust.growth
    damping_next = jnp.where(accepted, jnp.where(judged, shrink, 1) * damping, grown)
    growth = jnp.where(accepted, jnp.where(judged, 2, trust.growth), 2 * trust.growth)
    # Where the loss is at rounding level every step is undone, and where the model is exact none is, for ever.
    return Verdict(accepted, _inside(damping_next, damping.dtype), _inside(growth, damping.dtype), gain)


def follow(trust: Trust, verdict: Verdict, loss, damping, step: jax.Array, predicted, clients):
    """(the step to take, what is remembered of it): the new step, or the last one back.

    Args:
      loss: [], at the parameters that it starts from.
      damping: [], that it was computed with.
      step: [P], that the rule proposes.
      predicted: [], the decrease of the loss that it promises.
      clients: [], so many take part in it.
    """
    new = Trust(step, loss, predicted, verdict.growth, damping, clients, jnp.zeros([], bool))
    nothing = jnp.zeros_like(step), trust.loss, jnp.zeros_like(predicted)
    back = Trust(*nothing, verdict.growth, damping, trust.clients, jnp.ones([], bool))
    remembered = jax.tree.map(lambda a, b: jnp.where(verdict.accepted, a, b), new, back)
    return jnp.where(verdict.accepted, step, -trust.step), remembered


def trust_region(inner: Solver) -> Solver:
    """A solver whose damping follows the clients' losses, and which takes back a step that raised them; see `judge`.

    For rounds in which all clients take part, and a server that adds the step as it is. The inner solver's damping is
    the first round's. A step solves (H + beta I) step = -g, so that its promise, -g x - x^T H x / 2 at x = factor step
    once it is shortened, needs no gradient.

    Raises:
      ValueError: the inner solver has no damping, has a trust region already, or remembers past rounds, which a step
        taken back would leave in.
    """
    if "damping" not in inner.hyper:
        raise ValueError("aggregator.trust: 'pinv' has no damping to adapt; set aggregator.form = 'damped'")
    check_order(
        inner,
        {
            "remembering": "aggregator.trust: needs all clients in every round, where aggregator.past adds nothing",
            "trust_region": "aggregator.trust: the solver has a trust region already; wrap it once",
            "adaptive": "aggregator.trust: finds the damping itself; set aggregator.past.adaptive to False",
        },
    )

    def start(theta):
        return init(theta.size, theta.dtype), inner.init(theta)

    def solve(messages, hyper, state, now):
        last, rest = state
        solution, _, rest, info = inner.solve(messages, hyper, rest, now)
        step, full, weights = solution.step, solution.full, messages[0].weights
        curve = solution.curve
        if curve is None:
            curve = jnp.minimum(merged_curvature.quadratic(solution.factor, full), jnp.finfo(full.dtype).max)
        promise = curve + solution.beta * jnp.vdot(full, full)
        factor = shortened(step, full)
        predicted = factor * promise - factor**2 * curve / 2
        loss = jnp.dot(weights, jnp.where(weights > 0, now.loss, 0))
        clients = jnp.sum(weights > 0, dtype=jnp.int32)
        verdict = judge(last, loss, hyper["damping"], clients)
        step, last = follow(last, verdict, loss, hyper["damping"], step, predicted, clients)
        info |= {"damping": hyper["damping"], "gain": verdict.gain, "undone": last.undone}
        return solution._replace(step=step), hyper | {"damping": verdict.damping}, (last, rest), info

    def withdraws(state):
        return state[0].undone

    needs = inner.needs._replace(loss=True)
    return Solver(inner.hyper, start, solve, needs, withdraws, (*inner.wrappers, "trust_region"), inner.relative)


def _inside(value: jax.Array, dtype) -> jax.Array:
    limits = jnp.finfo(dtype)
    return jnp.clip(value, limits.tiny, jnp.sqrt(limits.max)).astype(dtype)
