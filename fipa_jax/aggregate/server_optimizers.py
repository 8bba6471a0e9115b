"""What does the server make of the step? Optimisers on it, optax transforms; any of them composes with any aggregator.

The gradient that they see is the negative step; the learning rate, `server.lr`, is applied outside, as it is traced.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.lookup import lookup


def fedexp(epsilon: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    """FedExP's extrapolation (Jhunjhunwala et al. 2023, eq. 6): the step times

        max(1, sum_m |delta_m|^2 / (2 C (|step|^2 + epsilon)))

    over the C clients that take part, `present`: the more they disagree, the longer the step.
    """

    def update(updates, state, params=None, **sent):
        deltas, present = sent["deltas"], sent["present"]
        squares = jax.vmap(lambda delta: optax.tree.norm(delta, squared=True))(trees.zero_unless(present, deltas))
        mean_square = jnp.sum(squares) / jnp.maximum(jnp.sum(present), 1)
        scale = jnp.maximum(1, mean_square / (2 * (optax.tree.norm(updates, squared=True) + epsilon)))
        return optax.tree.scale(scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class Kalman(NamedTuple):
    """What FedEve's server keeps of past steps."""

    momentum: Any  # M, of the parameters' shapes
    variance: jax.Array  # [], sigma^2, of an entry of it


def fedeve() -> optax.GradientTransformationExtraArgs:
    """FedEve (arXiv 2508.14539): the step d is an observation, which a Kalman filter joins with the last momentum M.

        v = sigma^2 + Q,   k = v / (v + R),   sigma^2 <- (1 - k) v,   M <- M + k (d - M),   parameters <- parameters + M
        Q = mean_p d_p^2 / C,   R = mean_p sum_m (delta_m - mean delta)_p^2 / C^2

    over the C clients that take part, `present`, and the parameters p. Clients train from where M alone would lead,
    theta + M: these are the parameters that a run holds, as FedACG's lookahead, so that a step moves them by 2 M' - M.
    """

    def init(params):
        return Kalman(optax.tree.zeros_like(params), jnp.zeros([], trees.ravel(params).dtype))

    def update(updates, state, params=None, **sent):
        present = sent["present"]
        deltas, number = trees.ravel_stacked(trees.zero_unless(present, sent["deltas"])), jnp.sum(present)
        even = present / jnp.maximum(number, 1)
        apart = jnp.where(present[:, None], deltas - jnp.matmul(even.astype(deltas.dtype), deltas)[None], 0)
        observed = jnp.mean(jnp.sum(apart**2, axis=0)) / jnp.maximum(number, 1) ** 2
        step = optax.tree.scale(-1, updates)
        before = state.variance + jnp.mean(trees.ravel(step) ** 2) / jnp.maximum(number, 1)
        gain = trees.ratio(before, before + observed)
        momentum = jax.tree.map(lambda m, d: m + gain * (d - m), state.momentum, step)
        change = jax.tree.map(lambda old, new: old - 2 * new, state.momentum, momentum)
        return change, Kalman(momentum, ((1 - gain) * before).astype(state.variance.dtype))

    return optax.GradientTransformationExtraArgs(init, update)


class Moments(NamedTuple):
    """What an adaptive server keeps of past steps."""

    first: Any  # m, of the parameters' shapes
    second: Any  # v


SecondMoment = Callable[[jax.Array, jax.Array, float], jax.Array]  # (v, squared step, beta_2) -> v
AdaptiveKind = Literal["adagrad", "adam", "yogi"]
SECOND_MOMENTS: dict[str, SecondMoment] = {
    "adagrad": lambda v, square, b2: v + square,
    "adam": lambda v, square, b2: b2 * v + (1 - b2) * square,
    "yogi": lambda v, square, b2: v - (1 - b2) * square * jnp.sign(v - square),
}


def adaptive(
    kind: AdaptiveKind, momentum: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """FedAdagrad, FedAdam or FedYogi (Reddi et al. 2021, algorithm 2), of updates d:

        m <- beta_1 m + (1 - beta_1) d,    v <- v as `SECOND_MOMENTS[kind]` says,    m / (sqrt(v) + tau)

    with m from 0 and v from tau^2, in float32 at least, and without Adam's correction of their bias. The published
    beta_2 and tau are the defaults.
    """
    second_of = SECOND_MOMENTS[kind]

    def init(params):
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        return Moments(*(optax.tree.full_like(params, value, dtype) for value in (0.0, tau**2)))

    def update(updates, state, params=None):
        first = jax.tree.map(lambda m, d: momentum * m + (1 - momentum) * d, state.first, updates)
        second = jax.tree.map(lambda v, d: second_of(v, d.astype(v.dtype) ** 2, b2), state.second, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), first, second), Moments(first, second)

    return optax.GradientTransformation(init, update)


class Averaged(NamedTuple):
    """What `averaged` keeps."""

    inner: optax.OptState  # of the optimiser
    mean: Any  # of the parameters' shapes
    weight: jax.Array  # [], of the models in it, where the last one counts 1
    decay: jax.Array  # [], d, as it was last


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """The optimiser, beside which the mean of the models theta_k that it has moved is kept, older ones counting less:

        w_k = 1 + d w_{k-1},    mean_k = mean_{k-1} + (theta_k - mean_{k-1}) / w_k

    Averages of iterates are Polyak and Juditsky's (1992), of late ones SWA (arXiv 1803.05407). Where a round's cohort
    is a part of the clients, models go to and fro about a place that the mean is nearer to. Steps stay as they are.

    Example:
      optimizer = averaged(optax.identity(), 0.9)
      mean = average_of(optimizer.init(params), params)   # before any step: params

    Args:
      optimizer: on the negative step.
      decay: d in [0, 1]; about 1 / (1 - d) models count, with 1 all of them alike.
    """
    rule = optax.with_extra_args_support(optimizer)

    def init(params):
        wide = trees.widened(params)  # in half precision late models would not count
        zero = jnp.zeros([], trees.ravel(wide).dtype)
        return Averaged(rule.init(params), optax.tree.zeros_like(wide), zero, zero + decay)

    def update(updates, state, params=None, **sent):
        updates, inner = rule.update(updates, state.inner, params, **sent)
        state = state._replace(decay=jnp.zeros_like(state.decay) + decay)  # the run that goes on may have another
        return updates, Averaged(inner, *_with(state, trees.widened(params)), state.decay)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(state: optax.OptState, params: Any) -> Any:
    """The mean of the models so far, `params` being the last one, of their types; where none is kept, `params`."""
    if not isinstance(state, Averaged):
        return params
    mean, _ = _with(state, trees.widened(params))
    return jax.tree.map(lambda p, m: m.astype(p.dtype), params, mean)


def _with(state: Averaged, params: Any) -> tuple[Any, jax.Array]:
    """(the mean, the weight) with one more model."""
    weight = 1 + state.decay * state.weight
    return jax.tree.map(lambda m, p: m + (p - m) / weight.astype(m.dtype), state.mean, params), weight


ServerOptimizer = Literal["acg", "adagrad", "adam", "eve", "exp", "momentum", "sgd", "yogi"]  # a name in `OPTIMIZERS`
# name -> (momentum -> transform). FedAvgM (Hsu et al. 2019) is `momentum`. `acg` is FedACG (Kim et al. 2024), whose
# lookahead theta + lambda m, held as the parameters, moves by Nesterov's momentum; its clients add the term `prox`.
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adagrad": functools.partial(adaptive, "adagrad"),
    "adam": functools.partial(adaptive, "adam"),
    "yogi": functools.partial(adaptive, "yogi"),
    "acg": functools.partial(optax.trace, nesterov=True),
    "eve": lambda momentum: fedeve(),
    "exp": lambda momentum: fedexp(),
    "momentum": optax.trace,
    "sgd": lambda momentum: optax.identity(),
}


def make(name: ServerOptimizer, momentum: float) -> optax.GradientTransformation:
    """The optimiser `name`.

    `federation.server.move` gives it the clients' stacked updates as `deltas` and who of them takes part as `present`,
    if it takes them.

    Raises:
      ValueError: the name is not known.
    """
    return lookup(OPTIMIZERS, name, "config.server.optimizer")(momentum)
