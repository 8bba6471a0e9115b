"""What does the server remember of past rounds? Their curvature, as if it were clients that take part once more.

The clients of a round s say, to second order, where their loss is least: at target_s, with the precision A_s = H_s +
beta I. Where few of many clients take part, a step by the present cohort's curvature alone overwrites what the absent
ones have pinned down. So what was said stays, as messages of fixed rank whose weight falls by `decay` with each round:

    targets   the last L cohorts, kept apart: H_s at rank R', and target_s. As a client of the present round such a
              cohort has the update target_s - theta
    prior     all cohorts as one. The parameters are where the messages' precision-weighted mean is, so that its
              update is zero: it only resists motion in the directions that were pinned down. In the first round the
              cohort's own curvature stands in for the past's
    latest    each client's last message, its H_m at rank R' and its update: who is absent takes part as a late client

On quadratic losses, if the rank leaves nothing out, no bound acts, the form is `damped` with an absolute beta, and the
server adds the step as it is, the first two are, with L all rounds, the same recursive least squares: theta + step
minimises

    sum_s n_s decay^{k - s} |theta - target_s|^2_{A_s}

over the cohorts' sizes n_s, and for the prior over a message at the first parameters. With H_s = I the prior is FedAvg
with the server's learning rate 1 - decay. The third, at decay 1, with `transport` and steps that the damped form
undoes, is the step of all clients once they have taken part. The server keeps R' P numbers for each message, which its
checkpoints hold too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate import filters as forms
from fipa_jax.aggregate.filters import Group
from fipa_jax.aggregate.uploads import drift
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.trees import ratio


class Past(NamedTuple):
    """L messages; those that are still to come have the weight 0."""

    sketch: Sketch  # eigenvalues [L, R'], basis [L, P, R']
    weights: jax.Array  # [L], of examples or clients
    targets: jax.Array | None = None  # [L, P], parameters
    deltas: jax.Array | None = None  # [L, P], updates
    starts: jax.Array | None = None  # [L, P], the parameters at which they began
    damping: jax.Array | None = None  # [L], that the updates are relative to, where the rule wants it


class Round(NamedTuple):
    """What a round brings."""

    cohort: Group  # its clients, their weights summing to one, or all 0
    ids: jax.Array | None  # [C] int32, who they are
    size: jax.Array  # [], the cohort's examples or clients
    theta: jax.Array  # [P], the parameters before it
    decay: jax.Array  # []
    max_drift: jax.Array  # [], see `aggregate.fipa`
    settings: forms.Settings


class Memory(NamedTuple):
    """A way to remember, as pure functions."""

    init: Callable  # theta [P] -> Past, with nothing remembered yet
    join: Callable  # (Past, Round) -> the groups that have a say, the cohort first; their weights sum to one
    keep: Callable  # (Past, Round, forms.Solved of these groups) -> Past after the round


def make(kind: str, *, rank: int, length: int, decay: float, num_clients: int, transport: bool) -> Memory | None:
    """The memory of a kind, or None for `none`; `aggregate.fipa` says what the numbers are.

    Raises:
      ValueError: the kind is not known, or a number is out of its range.
    """
    if kind not in KINDS:
        raise ValueError(f"aggregator.past.kind: unknown {kind!r}; known: {', '.join(KINDS)}")
    if min(rank, length) < 1:
        raise ValueError(f"aggregator.past: needs a rank and a length of at least 1, got {rank}, {length}")
    if kind != "none" and not 0 <= decay < 1 and (kind, decay) != ("latest", 1):
        raise ValueError(f"aggregator.past.decay: needs a number in [0, 1), for 'latest' up to 1, got {decay}")
    if kind == "latest" and num_clients < 1:
        raise ValueError(
            f"aggregator.past.kind: 'latest' needs the number of all clients, num_clients, got {num_clients}"
        )
    return KINDS[kind](rank=rank, length=length, num_clients=num_clients, transport=transport)


def rank_of(kind: str, rank: int, sketched: int) -> int:
    """The rank of a message, at most `rank`: a client's latest has no more pairs than its sketch of rank `sketched`."""
    return min(rank, sketched) if kind == "latest" else rank


def _prior(*, rank: int, **_) -> Memory:
    def join(past: Past, now: Round):
        first = jnp.sum(past.weights * now.decay) == 0
        deltas = jnp.where(first, (1 - now.decay) * now.cohort.deltas, now.cohort.deltas)
        stays = jnp.zeros([1, now.theta.size], now.theta.dtype)
        return _groups(
            now, now.cohort._replace(deltas=deltas), Group(past.weights * now.decay, stays, past.sketch, clients=False)
        )

    def keep(past: Past, now: Round, solved: forms.Solved):
        weights = past.weights * now.decay
        sketch = jax.tree.map(lambda leaf: leaf[None], solved.merged.top(past.sketch.eigenvalues.shape[1]))
        grown = jnp.where(weights > 0, weights + now.size, now.size / (1 - now.decay))
        return _unless_empty(now, Past(sketch, grown), past)

    return Memory(lambda theta: Past(*_blank(theta, 1, rank)), join, keep)


def _targets(*, rank: int, length: int, **_) -> Memory:
    def init(theta):
        return Past(*_blank(theta, length, rank), targets=jnp.zeros([length, theta.size], theta.dtype))

    def join(past: Past, now: Round):
        weights = past.weights * now.decay
        back = trees.zero_unless(weights > 0, past.targets - now.theta[None])
        return _groups(now, now.cohort, Group(weights, back, past.sketch, clients=False))

    def keep(past: Past, now: Round, solved: forms.Solved):
        # On its own, and at the same damping, the cohort would have gone here.
        alone = forms.solve([now.cohort], now.settings._replace(damping=solved.beta, relative=False))
        push = lambda new, old: jnp.concatenate([new[None], old[:-1]])  # the last one first
        sketch = jax.tree.map(push, alone.merged.top(past.sketch.eigenvalues.shape[1]), past.sketch)
        targets = push(now.theta + alone.step, past.targets)
        return _unless_empty(now, Past(sketch, push(now.size, past.weights * now.decay), targets), past)

    return Memory(init, join, keep)


def _latest(*, rank: int, num_clients: int, transport: bool, **_) -> Memory:
    def init(theta):
        blank = lambda: jnp.zeros([num_clients, theta.size], theta.dtype)
        numbers = jnp.zeros([num_clients], theta.dtype)
        return Past(*_blank(theta, num_clients, rank), deltas=blank(), starts=blank(), damping=numbers)

    def join(past: Past, now: Round):
        present = jnp.zeros(past.weights.shape, bool).at[now.ids].max(now.cohort.weights > 0)
        moved = now.theta[None] - past.starts
        near = lambda: drift(past.sketch, moved) <= now.max_drift
        near = jax.lax.cond(now.max_drift > 0, near, lambda: jnp.ones_like(present))
        weights = jnp.where(near & ~present, past.weights * now.decay, 0)
        moved = trees.zero_unless(weights > 0, moved) if transport else None
        damping = None if now.cohort.damping is None else past.damping
        return _groups(now, now.cohort, Group(weights, past.deltas, past.sketch, moved, damping))

    def keep(past: Past, now: Round, solved: forms.Solved):
        cohort = now.cohort
        starts = now.theta[None] - (jnp.zeros_like(cohort.deltas) if cohort.moved is None else cohort.moved)
        damping = jnp.zeros_like(cohort.weights) if cohort.damping is None else cohort.damping
        sketch = _first(cohort.sketch, past.sketch.eigenvalues.shape[1], cohort.deltas.dtype)
        new = Past(sketch, cohort.weights * now.size, deltas=cohort.deltas, starts=starts, damping=damping)
        # Who is left out keeps what was said before: its place is none, and nothing is written there.
        ids = jnp.where(cohort.weights > 0, now.ids, num_clients)
        put = lambda old, new: old.at[ids].set(new, mode="drop")
        return jax.tree.map(put, past._replace(weights=past.weights * now.decay), new)

    return Memory(init, join, keep)


KINDS = {"none": lambda **_: None, "prior": _prior, "targets": _targets, "latest": _latest}


def _blank(theta, length: int, rank: int):
    """(sketch, weights) of messages that are still to come."""
    rank = min(rank, theta.size)
    sketch = Sketch(jnp.zeros([length, rank], theta.dtype), jnp.zeros([length, theta.size, rank], theta.dtype))
    return sketch, jnp.zeros([length], theta.dtype)


def _groups(now: Round, cohort: Group, past: Group) -> list[Group]:
    """Both, of which the past has weights in examples or clients, with weights that sum to one."""
    total = now.size + jnp.sum(past.weights)
    shared = cohort._replace(weights=cohort.weights * ratio(now.size, total))
    return [shared, past._replace(weights=ratio(past.weights, total))]


def _unless_empty(now: Round, new: Past, old: Past) -> Past:
    """The past after a round in which somebody took part; without, it only fades."""
    faded = old._replace(weights=old.weights * now.decay)
    return jax.tree.map(lambda new, old: jnp.where(now.size > 0, new, old), new, faded)


def _first(sketch: Sketch, rank: int, dtype) -> Sketch:
    """Stacked sketches cut to their first pairs, or filled up with pairs that are zero."""
    have = sketch.eigenvalues.shape[-1]
    fit = lambda leaf: jnp.pad(leaf[..., :rank], [(0, 0)] * (leaf.ndim - 1) + [(0, max(rank - have, 0))])
    return Sketch(fit(sketch.eigenvalues).astype(dtype), fit(sketch.basis).astype(dtype))
