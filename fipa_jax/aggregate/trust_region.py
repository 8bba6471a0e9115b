"""Was the last step a good one? The damping that follows from it, and the way back where it was not.

Levenberg-Marquardt's question, asked by a server: clients report their loss at the parameters they receive, so it
learns one round later whether a step has lowered the mean loss, and by how much of what its model had promised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Trust(NamedTuple):
    """What a rule remembers of its last step."""

    step: jax.Array  # [P]
    loss: jax.Array  # [], the mean loss that the step started from
    predicted: jax.Array  # [], the decrease that it promised; 0 where there is nothing to judge
    growth: jax.Array  # [], by which the damping grows if the step is rejected
    damping: jax.Array  # [], that the step was taken with
    clients: jax.Array  # [], so many took part in it


class Verdict(NamedTuple):
    """Of the last step."""

    accepted: jax.Array  # [] bool
    damping: jax.Array  # [], of the next round
    growth: jax.Array  # []
    gain: jax.Array  # [], actual over predicted decrease; 1 is a perfect model


def init(size: int, dtype) -> Trust:
    """Before the first step: nothing to judge."""
    loss, predicted, growth, damping = (jnp.asarray(value, dtype) for value in (jnp.inf, 0.0, 2.0, 0.0))
    return Trust(jnp.zeros([size], dtype), loss, predicted, growth, damping, jnp.int32(0))


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
    limits = jnp.finfo(damping.dtype)
    inside = lambda value: jnp.clip(value, limits.tiny, jnp.sqrt(limits.max)).astype(damping.dtype)
    return Verdict(accepted, inside(damping_next), inside(growth), gain)


def follow(trust: Trust, verdict: Verdict, loss, damping, step: jax.Array, predicted, clients):
    """(the step to take, what is remembered of it): the new step, or the last one back.

    Args:
      loss: [], at the parameters that it starts from.
      damping: [], that it was computed with.
      step: [P], that the rule proposes.
      predicted: [], the decrease of the loss that it promises.
      clients: [], so many take part in it.
    """
    new = Trust(step, loss, predicted, verdict.growth, damping, clients)
    nothing = jnp.zeros_like(step), trust.loss, jnp.zeros_like(predicted)
    back = Trust(*nothing, verdict.growth, damping, trust.clients)
    remembered = jax.tree.map(lambda a, b: jnp.where(verdict.accepted, a, b), new, back)
    return jnp.where(verdict.accepted, step, -trust.step), remembered
