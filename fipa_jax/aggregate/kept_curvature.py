"""What does the server know where few clients send their curvature? The mean of all sketches sent, old ones for less.

Clients send their gradients g_m in every round, and a sketch of their curvature seldom (`sketch.share`). The server
keeps the mean of the sketches, which is all it needs of them, and steps by

    step = -(Hk + beta I)^{-1} sum_m w_m g_m,     Hk = sum_s n_s decay^{k - s} H_s / sum_s n_s decay^{k - s}

over the sketches s that were ever sent, of n_s examples each. However old, rounded or few they are, they only
precondition: where the gradient is zero the step is, and it always descends, see `docs/maths/bytes.md`.

A mean over the sketches sent is one of fewer terms where fewer are sent, but its size stays: no client's curvature has
to stand for others by a factor 1 / p. Before the first sketch there is no step.
"""

import jax
import jax.numpy as jnp

from fipa_jax.aggregate import merged_curvature
from fipa_jax.aggregate.solvers import Messages, Now, Solution
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.curvature.sketchers import are_sent
from fipa_jax.trees import ratio


def split(cohort: Messages, known: jax.Array, hyper: dict, senders: jax.Array) -> list[Messages]:
    """The cohort's gradients, and its curvature, as messages of their own.

    With deltas -g_m / beta of no curvature and curvature whose own update is zero, the damped form's step is
    (H + beta I)^{-1} sum_m w_m (-g_m).

    Args:
      cohort: of clients whose updates are -g_m.
      known: [], the share of H that is not the cohort's; negative where nobody has said anything yet.
      hyper: with `damping`.
      senders: [C], their weights in the cohort's curvature, summing to one, or to zero.
    """
    clients, size = cohort.deltas.shape
    dtype = cohort.deltas.dtype
    flat = Sketch(jnp.zeros([clients, 1], dtype), jnp.zeros([clients, size, 1], dtype))
    deltas = jnp.where(known < 0, 0, cohort.deltas / hyper["damping"])
    said = Messages((1 - jnp.maximum(known, 0)) * senders, jnp.zeros_like(deltas), cohort.sketch, clients=False)
    return [cohort._replace(deltas=deltas, sketch=flat, moved=None, damping=None), said]


def senders_of(cohort: Messages) -> jax.Array:
    """[C], the weights of those of the clients that have sent a sketch, not shared out."""
    return jnp.where(are_sent(cohort.sketch), cohort.weights, 0)


def said_by_all(cohort: Messages, sketch: Sketch, remembered: jax.Array, now: Now, hyper: dict) -> list[Messages]:
    """All that have a say, the cohort's gradients first.

    Args:
      cohort: the round's clients.
      sketch: what is remembered, stacked [1, ...].
      remembered: [1], its weight in examples or clients.
    """
    senders, old = senders_of(cohort), remembered * hyper["past.decay"]
    new = now.size * jnp.sum(senders)
    total = new + jnp.sum(old)
    known = jnp.where(total > 0, ratio(jnp.sum(old), total), -1)
    own = split(cohort, known, hyper, ratio(senders, jnp.sum(senders)))
    stays = jnp.zeros([1, now.theta.size], now.theta.dtype)
    return [*own, Messages(ratio(old, total), stays, sketch, clients=False)]


def kept(cohort: Messages, sketch: Sketch, remembered: jax.Array, now: Now, hyper: dict, solution: Solution):
    """(sketch [1, ...], weight [1]) after a round: the old ones, faded, where nobody has sent any."""
    old, new = remembered * hyper["past.decay"], now.size * jnp.sum(senders_of(cohort))
    found = merged_curvature.top(solution.factor, sketch.eigenvalues.shape[1])
    return jax.tree.map(lambda leaf, was: jnp.where(new > 0, leaf[None], was), found, sketch), old + new
