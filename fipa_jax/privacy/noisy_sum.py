"""Differential privacy as a channel: what arrives at the server is one message, the noisy mean of the clipped ones.

Everything behind the channel, the server's optimiser, the metrics, the model, is made of that message alone, and costs
no further privacy. Sampling and noise derive from a secret key, not from the run's seed, which anybody may know.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client.local_solver import LocalResult, LocalSolver
from fipa_jax.federation.channel import Channel, ChannelRates, Order
from fipa_jax.privacy.accounting import Plan
from fipa_jax.privacy.mechanism import Frame, noisy_sum, out_of, plain_frame

SAMPLED, NOISE = 0x5A3B, 0x401E  # streams of the secret key


class PrivacyRates(NamedTuple):
    """The traced numbers of a private channel."""

    secret: jax.Array  # key, from the operating system's entropy
    clip: jax.Array  # [], C: the bound on one client's message
    noise: jax.Array  # [], z: the noise multiplier
    rate: jax.Array  # [], q: the probability with which a client takes part
    damping: jax.Array  # [], beta of the frame
    clip_decay: jax.Array  # [], factor on the bound after each round
    rounds: jax.Array  # [] int32, that the budget affords; later ones change nothing
    public: Any = ()  # {field: [N, ...]}, examples that are no client's, at which the server sees curvature


class Spent(NamedTuple):
    """What a private channel keeps from round to round."""

    rounds: jax.Array  # [] int32, rounds released so far
    plan: Plan  # by which they are counted, of [] each
    frame: Frame | tuple = ()  # released once, before the first round; () where there is none


FrameOf = Callable[
    [Any, Spent, PrivacyRates], Frame | None
]  # (trainable parameters, state, rates) -> the round's frame


def no_frame(params: Any, spent: Spent, rates: PrivacyRates) -> None:
    """None: clients train the parameters as they are."""


def released_frame(params: Any, spent: Spent, rates: PrivacyRates) -> Frame:
    """The frame that was released before the first round."""
    return spent.frame


def private(expected: float, sampled: bool = False, frame_of: FrameOf = no_frame, released: bool = False) -> Channel:
    """The channel that lets through nothing of the clients but the noisy mean of their clipped updates.

        step = W (sum_m clip_C(v_m) + z C xi) / (q T),   xi standard normal,  C = clip * clip_decay^k in round k

    Each of them has the same weight, 1 / (q T) of the expected number of clients, so that neither who takes part nor
    how many examples it has shows.

    Args:
      expected: q T, clients that take part in a round on average.
      sampled: whether every client takes part by chance, with probability q (Poisson sampling), or all do.
      frame_of: the coordinates in which clients train, see `mechanism.Frame`.
      released: whether the frame is one that is released before the first round; the parameters are one dense layer's.
    """

    def init(params):
        dtype = jnp.result_type(*jax.tree.leaves(params))
        plan = Plan(*[jnp.zeros([], dtype)] * len(Plan._fields))
        if not released:
            return Spent(jnp.int32(0), plan, ())
        inputs = trees.ravel(params).size // jax.tree.leaves(params)[0].shape[-1]
        return Spent(jnp.int32(0), plan, plain_frame(inputs, inputs, dtype))

    def draw(order: Order, key, ids, rates: ChannelRates) -> Order:
        if not sampled:
            return order
        drawn = _uniform(rates.privacy, key, ids) < rates.privacy.rate
        return order._replace(part=drawn.astype(rates.privacy.rate.dtype))

    def tell(params, spent: Spent, rates: ChannelRates) -> dict:
        return {"frame": frame_of(params, spent, rates.privacy)}

    def deliver(uploads: Uploads, params, spent: Spent, order: Order, rates: ChannelRates):
        given = rates.privacy
        rows = trees.ravel_stacked(uploads.delta)
        present = uploads.num_examples > 0 if order.part is None else (uploads.num_examples > 0) & (order.part > 0)
        key = jax.random.fold_in(jax.random.fold_in(given.secret, NOISE), spent.rounds)
        bound = given.clip * given.clip_decay**spent.rounds
        mean = noisy_sum(key, rows, present, bound, given.noise) / expected
        frame = frame_of(params, spent, given)
        mean = mean if frame is None else out_of(frame, mean)
        open_ = spent.rounds < given.rounds
        step = ravel_pytree(params)[1](jnp.where(open_, mean, 0).astype(mean.dtype))
        info = {"rounds_released": jnp.minimum(spent.rounds + 1, given.rounds)}
        return Uploads(jax.tree.map(lambda leaf: leaf[None], step), jnp.ones([1], mean.dtype)), info

    def advance(spent: Spent, params) -> Spent:
        return spent._replace(rounds=spent.rounds + 1)

    sampling = sample if sampled else None
    return Channel(init, draw, deliver=deliver, advance=advance, tell=tell, sample=sampling, show=show)


def sample(key: jax.Array, num_clients: int, most: int, rates: ChannelRates) -> jax.Array:
    """[most] ids, those first that Poisson sampling draws: every client by itself, with probability q.

    The others fill the round's shape, and do nothing. If more than `most` are drawn, some are left out:
    `accounting.room_for` says how seldom that is.
    """
    uniform = _uniform(rates.privacy, key, jnp.arange(num_clients))
    return jnp.argsort(uniform)[:most]


def _uniform(rates: PrivacyRates, key: jax.Array, ids: jax.Array) -> jax.Array:
    """[C] in [0, 1), each client's own of a round; `key` is the round's, of the run's seed."""
    stream = jax.random.fold_in(rates.secret, SAMPLED)
    words = jax.random.key_data(key).ravel()
    for word in words:
        stream = jax.random.fold_in(stream, word)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(stream, ids)
    return jax.vmap(lambda one: jax.random.uniform(one, dtype=rates.rate.dtype))(keys)


SHOWN = ("rounds_released", "skipped")


def show(info: dict) -> dict:
    """Of a round's `info` what says nothing of single clients: no ids, losses, counts or comparisons."""
    return {name: info[name] for name in SHOWN}


def in_frame(local: LocalSolver) -> LocalSolver:
    """The local solver in the coordinates v of `hyper.frame`: from v = 0, its update is the change of v."""

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        start, unravel = ravel_pytree(params)

        def moved(change, batch):
            return outputs(unravel(start + out_of(hyper.frame, ravel_pytree(change)[0])), batch)

        blank = jax.tree.map(jnp.zeros_like, params)
        return local(moved, blank, data, client, key, hyper._replace(frame=None), store, shared)

    return solve
