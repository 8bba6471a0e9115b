"""What does the server remember of past cohorts? Their curvature, as if they were clients that take part once more.

The clients of a round s say, to second order, where its loss is least: at target_s, with the precision A_s = H_s + beta
I. Where few of many clients take part, a step by the present cohort's curvature alone overwrites what the absent ones
have pinned down. So each past cohort stays as a message of fixed rank, and its weight falls by `decay` with each round:

    targets   the last L messages, kept apart: H_s at rank R', and target_s. As a client of the present round it has
              the update target_s - theta
    prior     all of them as one. The parameters are where the messages' precision-weighted mean is, so that its
              update is zero: it only resists motion in the directions that were pinned down. In the first round the
              cohort's own curvature stands in for the past's

On quadratic losses both are the same recursive least squares, if the rank leaves nothing out, L is all rounds, no bound
acts, the form is `damped` with an absolute beta, and the server adds the step as it is: theta + step minimises

    sum_s n_s decay^{k - s} |theta - target_s|^2_{A_s}

over the cohorts' sizes n_s, and for the prior over a message at the first parameters. With H_s = I the prior is FedAvg
with the server's learning rate 1 - decay. The server keeps L R' P numbers, which its checkpoints hold too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import forms
from fipa_jax.forms import Group
from fipa_jax.sketch import Sketch
from fipa_jax.trees import ratio

KINDS = ("none", "prior", "targets")


class Past(NamedTuple):
    """Messages of past cohorts, the last one first; those that are still to come have the weight 0."""

    sketch: Sketch  # eigenvalues [L, R'], basis [L, P, R']
    weights: jax.Array  # [L], of examples or clients
    targets: jax.Array | None  # [L, P], parameters; None for the prior, whose L is 1


def check(kind: str, rank: int, length: int, decay: float) -> None:
    """Raises ValueError if the kind is not known, or a number is out of its range."""
    if kind not in KINDS:
        raise ValueError(f"aggregator.memory: unknown {kind!r}; known: {', '.join(KINDS)}")
    if min(rank, length) < 1:
        raise ValueError(f"aggregator.memory: needs memory_rank and memory_length of at least 1, got {rank}, {length}")
    if not 0 <= decay < 1:
        raise ValueError(f"aggregator.memory_decay: needs a number in [0, 1), got {decay}")


def init(kind: str, size: int, dtype, *, rank: int, length: int) -> Past | None:
    """Nothing remembered yet: None for `none`."""
    if kind == "none":
        return None
    length, rank = length if kind == "targets" else 1, min(rank, size)
    targets = jnp.zeros([length, size], dtype) if kind == "targets" else None
    sketch = Sketch(jnp.zeros([length, rank], dtype), jnp.zeros([length, size, rank], dtype))
    return Past(sketch, jnp.zeros([length], dtype), targets)


def join(past: Past, cohort: Group, size: jax.Array, theta: jax.Array, decay: jax.Array) -> list[Group]:
    """The groups of a round: the cohort and the past, with weights that sum to one.

    Args:
      cohort: the round's clients, their weights summing to one, or all 0.
      size: [], the cohort's examples or clients.
      theta: [P], the present parameters.
    """
    weights = past.weights * decay
    deltas = jnp.zeros([1, theta.size], theta.dtype)
    if past.targets is not None:
        deltas = jnp.where((weights > 0)[:, None], past.targets - theta[None], 0)
    else:
        first = jnp.sum(weights) == 0
        cohort = cohort._replace(deltas=jnp.where(first, (1 - decay) * cohort.deltas, cohort.deltas))
    total = size + jnp.sum(weights)
    return [
        cohort._replace(weights=cohort.weights * ratio(size, total)),
        Group(ratio(weights, total), deltas, past.sketch),
    ]


def keep(past: Past, cohort: Group, size, theta, decay, solved: forms.Solved, lengths, settings) -> Past:
    """What is remembered after a round.

    Args:
      past, cohort, size, theta, decay: those of `join`.
      solved: what has become of its groups.
      lengths, settings: with which they were solved, see `forms.solve`.
    """
    weights, rank = past.weights * decay, past.sketch.eigenvalues.shape[1]
    if past.targets is not None:
        # On its own, and at the same damping, the cohort would have gone here.
        alone = forms.solve([cohort], lengths, settings._replace(damping=solved.beta, relative=False))
        push = lambda new, old: jnp.concatenate([new[None], old[:-1]])
        sketch = jax.tree.map(push, alone.merged.top(rank), past.sketch)
        new = Past(sketch, push(size, weights), push(theta + alone.step, past.targets))
    else:
        sketch = jax.tree.map(lambda leaf: leaf[None], solved.merged.top(rank))
        new = Past(sketch, jnp.where(weights > 0, weights + size, size / (1 - decay)), None)
    return jax.tree.map(lambda new, old: jnp.where(size > 0, new, old), new, past._replace(weights=weights))
