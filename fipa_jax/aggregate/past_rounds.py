"""What does the server remember of past rounds? Their curvature, as if it were clients that take part once more.

The clients of a round s say, to second order, where their loss is least: at target_s, with the precision A_s = H_s +
beta I. Where few of many clients take part, a step by the present cohort's curvature alone overwrites what the absent
ones have pinned down. So what was said stays, as messages of fixed rank whose weight falls by `decay` with each round:

    targets   the last L cohorts, kept apart: H_s at rank R', and target_s. As a client of the present round such a
              cohort has the update target_s - theta
    prior     all cohorts as one. The parameters are where the messages' precision-weighted mean is, so that its
              update is zero: it only resists motion in the directions that were pinned down. In the first round the
              cohort's own curvature stands in for the past's
    curvature the mean of the curvature sent alone, where few of the clients that send gradients send any: see
              `kept_curvature`
    latest    each client's last message, its H_m at rank R' and its update: who is absent takes part as a late client

On quadratic losses, if the rank leaves nothing out, no bound acts, the form is `damped` with an absolute beta, and the
server adds the step as it is, the first two are, with L all rounds, the same recursive least squares: theta + step
minimises

    sum_s n_s decay^{k - s} |theta - target_s|^2_{A_s}

over the cohorts' sizes n_s, and for the prior over a message at the first parameters. With H_s = I the prior is FedAvg
with the server's learning rate 1 - decay. `latest`, at decay 1, with `transport` and steps that the damped form
undoes, is the step of all clients once they have taken part. The server keeps R' P numbers for each message, which its
checkpoints hold too.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate import kept_curvature, merged_curvature
from fipa_jax.aggregate.late_updates import drift
from fipa_jax.aggregate.solvers import Messages, Now, Solution, Solver, check_order
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup
from fipa_jax.trees import ratio

PastKind = Literal["none", "prior", "targets", "latest", "curvature"]


class PastRounds(NamedTuple):
    """What is remembered; the group `aggregator.past` of a config."""

    kind: PastKind = "none"  # see the head of this module
    rank: int = 250  # R' of a message: R' P numbers for each of 1, length or all clients
    decay: float = 0.9  # by which a message's weight falls with each round: below 1, of `latest`, `curvature` at most 1
    length: int = 8  # L, the cohorts that `targets` remembers
    num_clients: int = 0  # T, all clients, of which `latest` remembers one message each
    adaptive: bool = False  # the damping follows how successive steps agree, see `adaptive_damping`


class Past(NamedTuple):
    """L messages; those that are still to come have the weight 0."""

    sketch: Sketch  # eigenvalues [L, R'], basis [L, P, R']
    weights: jax.Array  # [L], of examples or clients
    targets: jax.Array | None = None  # [L, P], parameters
    deltas: jax.Array | None = None  # [L, P], updates
    starts: jax.Array | None = None  # [L, P], the parameters at which they began
    damping: jax.Array | None = None  # [L], that the updates are relative to, where the rule wants it


Begin = Callable[[jax.Array], Past]  # theta [P] -> Past, with nothing remembered yet
Join = Callable[[Past, Messages, Now, dict], list[Messages]]  # -> all that have a say, the cohort first
Keep = Callable[[Past, Messages, Now, dict, Solution], Past]  # the past after the round with this solution


class Kind(NamedTuple):
    """A way to remember, as pure functions of the past, the cohort's messages, the round and the hyper-parameters."""

    init: Begin
    join: Join
    keep: Keep
    num_clients: int = 0  # whose ids it needs, each below this number
    needs_gradient: bool = False
    most_decay: float | None = None  # a decay beside those below 1


def remembering(inner: Solver, past: Kind, *, decay: Number = 0.9) -> Solver:
    """A solver that is given past rounds beside the present one.

    With the prior the step is about 1 - decay of the cohort's own: compare with FedAvg at the server's learning rate
    1 - decay. What one client says, see `limits.capped`, then weighs for about 1 / (1 - decay) rounds.

    Args:
      past: `prior(...)`, `targets(...)`, `latest(...)` or `curvature(...)`.
      decay: by which the weight of a message falls with each round.

    Raises:
      ValueError: the inner solver judges its steps by the clients' losses, for which all must take part, remembers past
        rounds already, or is capped, so that what is remembered would not be; the decay is out of its range.
    """
    check_order(
        inner,
        {
            "capped": "aggregator.limits.trace_cap: must be outside of what remembers: capped(remembering(...))",
            "remembering": "aggregator.past: the solver remembers past rounds already; wrap it once",
            "trust_region": "aggregator.trust: needs all clients in every round, where aggregator.past adds nothing",
        },
    )
    check_decay(decay, past.most_decay)

    def init(theta):
        return past.init(theta), inner.init(theta)

    def solve(messages, hyper, state, now):
        remembered, rest = state
        (cohort,) = messages
        everyone = past.join(remembered, cohort, now, hyper)
        solution, hyper, rest, info = inner.solve(everyone, hyper, rest, now)
        remembered = past.keep(remembered, cohort, now, hyper, solution)
        return solution, hyper, (remembered, rest), info | {"past_share": jnp.sum(everyone[-1].weights)}

    def withdraws(state):
        return inner.withdraws(state[1])

    clients = {"ids": past.num_clients > 0, "num_clients": past.num_clients}
    needs = inner.needs._replace(**clients, gradient=past.needs_gradient)
    hyper, wrappers = inner.hyper | {"past.decay": decay}, (*inner.wrappers, "remembering")
    return Solver(hyper, init, solve, needs, withdraws, wrappers, inner.relative)


def check_decay(decay: Number, most: float | None = None) -> None:
    """Refuses, with a ValueError, a decay that is not in [0, 1), nor `most`; one that is traced passes."""
    if contracts.is_known(decay) and not (0 <= decay < 1 or decay == most):
        raise ValueError(
            f"aggregator.past.decay: needs a number in [0, 1), for 'latest' and 'curvature' up to 1, got {decay}"
        )


def kind_of(options: PastRounds, alone: Solver, transport: bool) -> Kind:
    """The kind that options name.

    Args:
      options: of another kind than `none`.
      alone: see `targets`.
      transport: see `latest`.

    Raises:
      ValueError: the kind is not known, or a number is out of its range.
    """
    kinds = {
        "none": None,
        "prior": lambda: prior(options.rank),
        "targets": lambda: targets(alone, options.rank, options.length),
        "latest": lambda: latest(options.rank, options.num_clients, transport),
        "curvature": lambda: curvature(options.rank),
    }
    return lookup(kinds, options.kind, "aggregator.past.kind")()


def rank_of(options: PastRounds, sketched: int) -> int:
    """The rank of a message: a client's latest has no more pairs than its sketch of rank `sketched`."""
    return min(options.rank, sketched) if options.kind == "latest" else options.rank


def prior(rank: int = 250) -> Kind:
    """All past cohorts as one message whose update is zero, with the top `rank` pairs of what they pin down."""
    _check_positive("rank", rank)

    def init(theta):
        return Past(*_blank(theta, 1, rank))

    def join(past: Past, cohort: Messages, now: Now, hyper: dict):
        weights = past.weights * hyper["past.decay"]
        first = jnp.sum(weights) == 0
        deltas = jnp.where(first, (1 - hyper["past.decay"]) * cohort.deltas, cohort.deltas)
        stays = jnp.zeros([1, now.theta.size], now.theta.dtype)
        return _side_by_side(now, cohort._replace(deltas=deltas), Messages(weights, stays, past.sketch, clients=False))

    def keep(past: Past, cohort: Messages, now: Now, hyper: dict, solution: Solution):
        weights = past.weights * hyper["past.decay"]
        sketch = merged_curvature.top(solution.factor, past.sketch.eigenvalues.shape[1])
        grown = jnp.where(weights > 0, weights + now.size, now.size / (1 - hyper["past.decay"]))
        return _unless_empty(now, hyper, Past(jax.tree.map(lambda leaf: leaf[None], sketch), grown), past)

    return Kind(init, join, keep)


def targets(alone: Solver, rank: int = 250, length: int = 8) -> Kind:
    """The last cohorts, kept apart, each with its curvature and where it wanted the parameters to be.

    Args:
      alone: a solver of the cohort by itself, which says where it would have gone: in the form of the one that
        remembers, with an absolute damping, as it is given that of the present step.
      rank: R', of a cohort's curvature.
      length: L, cohorts.
    """
    _check_positive("rank", rank)
    _check_positive("length", length)

    def init(theta):
        return Past(*_blank(theta, length, rank), targets=jnp.zeros([length, theta.size], theta.dtype))

    def join(past: Past, cohort: Messages, now: Now, hyper: dict):
        weights = past.weights * hyper["past.decay"]
        back = trees.zero_unless(weights > 0, contracts.given(past.targets, "past.targets") - now.theta[None])
        return _side_by_side(now, cohort, Messages(weights, back, past.sketch, clients=False))

    def keep(past: Past, cohort: Messages, now: Now, hyper: dict, solution: Solution):
        # On its own, and at the same damping, the cohort would have gone here.
        own, *_ = alone.solve([cohort], hyper | {"damping": solution.beta}, (), now)
        sketch = merged_curvature.top(own.factor, past.sketch.eigenvalues.shape[1])
        weights = _pushed(now.size, past.weights * hyper["past.decay"])
        remembered = contracts.given(past.targets, "past.targets")
        new = Past(jax.tree.map(_pushed, sketch, past.sketch), weights, _pushed(now.theta + own.step, remembered))
        return _unless_empty(now, hyper, new, past)

    return Kind(init, join, keep)


def latest(rank: int, num_clients: int, transport: bool = True) -> Kind:
    """Each client's last message: whoever is absent takes part as a late client.

    Args:
      rank: R', of a client's curvature.
      num_clients: T.
      transport: whether an absent client's target stays where it was, see `fisher_informed.fipa`; as for late ones.

    Raises:
      ValueError: there is no client.
    """
    _check_positive("rank", rank)
    if num_clients < 1:
        raise ValueError(
            f"aggregator.past.kind: 'latest' needs the number of all clients, num_clients, got {num_clients}"
        )

    def init(theta):
        deltas, starts = (jnp.zeros([num_clients, theta.size], theta.dtype) for _ in range(2))
        damping = jnp.zeros([num_clients], theta.dtype)
        return Past(*_blank(theta, num_clients, rank), deltas=deltas, starts=starts, damping=damping)

    def join(past: Past, cohort: Messages, now: Now, hyper: dict):
        present = jnp.zeros(past.weights.shape, bool).at[now.ids].max(cohort.weights > 0)
        starts, deltas = contracts.given(past.starts, "past.starts"), contracts.given(past.deltas, "past.deltas")
        moved = now.theta[None] - starts
        seen = past, moved, present, hyper["late.max_drift"]
        near = jax.lax.cond(
            hyper["late.max_drift"] > 0,
            lambda: vary_with(drift(past.sketch, moved) <= hyper["late.max_drift"], *seen),
            lambda: vary_with(jnp.ones_like(present), *seen),
        )
        weights = jnp.where(near & ~present, past.weights * hyper["past.decay"], 0)
        kept_apart = trees.zero_unless(weights > 0, moved) if transport else None
        damping = None if cohort.damping is None else past.damping
        return _side_by_side(now, cohort, Messages(weights, deltas, past.sketch, kept_apart, damping))

    def keep(past: Past, cohort: Messages, now: Now, hyper: dict, solution: Solution):
        starts = now.theta[None] - (jnp.zeros_like(cohort.deltas) if cohort.moved is None else cohort.moved)
        damping = jnp.zeros_like(cohort.weights) if cohort.damping is None else cohort.damping
        sketch = _first_pairs(cohort.sketch, past.sketch.eigenvalues.shape[1], cohort.deltas.dtype)
        new = Past(sketch, cohort.weights * now.size, deltas=cohort.deltas, starts=starts, damping=damping)
        # Who is left out keeps what was said before: its place is none, and nothing is written there.
        ids = jnp.where(cohort.weights > 0, contracts.given(now.ids, "uploads.ids"), num_clients)
        faded = past._replace(weights=past.weights * hyper["past.decay"])
        return jax.tree.map(lambda old, new: old.at[ids].set(new.astype(old.dtype), mode="drop"), faded, new)

    return Kind(init, join, keep, num_clients=num_clients, most_decay=1)


def curvature(rank: int = 250) -> Kind:
    """The mean of all curvature sent, its top `rank` pairs, for clients that send gradients: see `kept_curvature`."""
    _check_positive("rank", rank)

    def init(theta):
        return Past(*_blank(theta, 1, rank))

    def join(past: Past, cohort: Messages, now: Now, hyper: dict):
        return kept_curvature.said_by_all(cohort, past.sketch, past.weights, now, hyper)

    def keep(past: Past, cohort: Messages, now: Now, hyper: dict, solution: Solution):
        return Past(*kept_curvature.kept(cohort, past.sketch, past.weights, now, hyper, solution))

    return Kind(init, join, keep, needs_gradient=True, most_decay=1)


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"aggregator.past.{name}: needs at least 1, got {number}")


def _blank(theta: jax.Array, length: int, rank: int) -> tuple[Sketch, jax.Array]:
    """(sketch, weights) of messages that are still to come."""
    rank = min(rank, theta.size)
    sketch = Sketch(jnp.zeros([length, rank], theta.dtype), jnp.zeros([length, theta.size, rank], theta.dtype))
    return sketch, jnp.zeros([length], theta.dtype)


def _side_by_side(now: Now, cohort: Messages, past: Messages) -> list[Messages]:
    """Both, of which the past has weights in examples or clients, with weights that sum to one."""
    total = now.size + jnp.sum(past.weights)
    shared = cohort._replace(weights=cohort.weights * ratio(now.size, total))
    return [shared, past._replace(weights=ratio(past.weights, total))]


def _unless_empty(now: Now, hyper: dict, new: Past, old: Past) -> Past:
    """The past after a round in which somebody took part; without, it only fades."""
    faded = old._replace(weights=old.weights * hyper["past.decay"])
    return jax.tree.map(lambda new, old: jnp.where(now.size > 0, new, old), new, faded)


def _pushed(new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` [L, ...] with `new` [...] in front; the last goes."""
    return jnp.concatenate([new[None], old[:-1]])


def _first_pairs(sketch: Sketch, rank: int, dtype: Any) -> Sketch:
    """Stacked sketches cut to their first pairs, or filled up with pairs that are zero."""

    def fit(leaf):
        padding = [(0, 0)] * (leaf.ndim - 1) + [(0, max(rank - sketch.eigenvalues.shape[-1], 0))]
        return jnp.pad(leaf[..., :rank], padding).astype(dtype)

    return Sketch(fit(sketch.eigenvalues), fit(sketch.basis))
