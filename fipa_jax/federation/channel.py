"""What lies between the server and its clients? Nothing; or, for studies, delays and faults, drawn for each client.

The orders of a round, which say what happens to whom, are drawn once and ride in the cohort. Their draws have keys of
their own: all others are what they are without a channel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors
from fipa_jax.curvature.sketch import Diagonal, Sketch

LATE, FAULTY = 0x1A7E, 0xFA17  # streams apart from the keys of cohort, training and sketches, split from the round's


class Order(NamedTuple):
    """What happens to the clients of a round; each [C], or None where it cannot happen."""

    age: jax.Array | None = None  # int32, rounds ago at which the client started
    part: jax.Array | None = None  # in [0, 1], the share of its local steps that it does
    faults: dict[str, jax.Array] | None = None  # {name in `FAULTS`: bool}, what is wrong with its upload


class FaultRates(NamedTuple):
    """How often, as traced probabilities [] of an upload; and how much. The group `faults` of a phase."""

    drop: jax.Array  # it never arrives
    straggle: jax.Array  # the client has done only a part of its local steps, drawn uniformly
    nan: jax.Array  # its update is NaN
    flip: jax.Array  # its update comes with the opposite sign
    scale: jax.Array  # its eigenvalues, or its diagonal, come multiplied by `scale_by`
    scale_by: jax.Array  # []


FAULTS = FaultRates._fields[:-1]


class ChannelRates(NamedTuple):
    """The traced numbers of a channel; None for what it does not do."""

    late: jax.Array | None = None  # [], probability that a client is late
    faults: FaultRates | None = None
    privacy: Any = None  # a `privacy.noisy_sum.PrivacyRates`


State = Any  # what a channel keeps from round to round
Params = Any


def _keep_nothing(params: Params) -> State:
    return ()


def _same_order(order: Order, key: jax.Array, ids: jax.Array, rates: ChannelRates) -> Order:
    return order


def _present_parameters(params: Params, state: State, order: Order) -> Params:
    return params


def _as_sent(uploads: Uploads, params: Params, state: State, order: Order, rates: ChannelRates):
    return uploads, {}


def _unchanged(state: State, params: Params) -> State:
    return state


def _tell_nothing(params: Params, state: State, rates: ChannelRates) -> dict:
    return {}


def _all_of_it(info: dict) -> dict:
    return info


class Channel(NamedTuple):
    """What lies between server and clients, as pure functions; as it stands nothing does."""

    init: Callable[[Params], State] = _keep_nothing
    draw: Callable[[Order, jax.Array, jax.Array, ChannelRates], Order] = _same_order  # (order, key, ids [C], rates)
    start: Callable[[Params, State, Order], Params] = _present_parameters  # the parameters that one client starts from
    # (uploads, params, state, orders, rates) -> (uploads as they arrive, info)
    deliver: Callable[[Uploads, Params, State, Order, ChannelRates], tuple[Uploads, dict]] = _as_sent
    advance: Callable[[State, Params], State] = _unchanged  # (state, the parameters after the round) -> state
    tell: Callable[[Params, State, ChannelRates], dict] = _tell_nothing  # -> fields of `Hyper` that all clients take
    sample: Callable[[jax.Array, int, int, ChannelRates], jax.Array] | None = None  # (key, T, C, rates) -> ids [C]
    show: Callable[[dict], dict] = _all_of_it  # of a round's info what a person may see


def chain(*channels: Channel) -> Channel:
    """One channel after another, first to last also on the way back."""
    if len(channels) == 1:
        return channels[0]

    def init(params):
        return tuple(channel.init(params) for channel in channels)

    def draw(order, key, ids, rates):
        for channel in channels:
            order = channel.draw(order, key, ids, rates)
        return order

    def start(params, states, order):
        for channel, state in zip(channels, states, strict=True):
            params = channel.start(params, state, order)
        return params

    def deliver(uploads, params, states, order, rates):
        info = {}
        for channel, state in zip(channels, states, strict=True):
            uploads, told = channel.deliver(uploads, params, state, order, rates)
            info |= told
        return uploads, info

    def advance(states, params):
        return tuple(channel.advance(state, params) for channel, state in zip(channels, states, strict=True))

    def tell(params, states, rates):
        told = {}
        for channel, state in zip(channels, states, strict=True):
            told |= channel.tell(params, state, rates)
        return told

    def show(info):
        for channel in channels:
            info = channel.show(info)
        return info

    sample = next((channel.sample for channel in channels if channel.sample), None)
    return Channel(init, draw, start, deliver, advance, tell, sample, show)


def late(most: int) -> Channel:
    """Clients that began up to `most` rounds ago, on what the parameters were then.

    A server that does not wait takes the updates of a round's C clients as a buffer that has filled up. With
    probability `rates.late` a client is late, by 1 to `most` rounds, each as likely. The state is the trainable
    parameters of this and past rounds, [most + 1, ...].
    """

    def init(params):
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], most + 1, axis=0), params)

    def draw(order, key, ids, rates):
        return order._replace(age=draw_ages(key, rates.late, most, ids))

    def start(params, history, order):
        return at_age(history, order.age)

    def deliver(uploads, params, history, order, rates):
        moved = jax.vmap(lambda age: optax.tree.sub(params, at_age(history, age)))(order.age)
        info = {"age_mean": jnp.mean(order.age), "age_most": jnp.max(order.age)}
        return uploads._replace(age=order.age, moved=moved), info

    def advance(history, params):
        return jax.tree.map(lambda all_, new: jnp.concatenate([new[None], all_[:-1]]), history, params)

    return Channel(init, draw, start, deliver, advance)


def at_age(history: Params, age: jax.Array) -> Params:
    """The parameters `age` rounds ago, of a history [A, ...]; 0 is now."""
    return jax.tree.map(lambda leaf: leaf[age], history)


def draw_ages(key: jax.Array, share: jax.Array, most: int, ids: jax.Array) -> jax.Array:
    """The ages [C] int32 of the clients `ids` [C], independent of each other; `key` is the round's."""
    uniform = _uniform(key, LATE, ids, 2)
    age = 1 + jnp.floor(uniform[:, 1] * most).astype(jnp.int32)
    return jnp.where(uniform[:, 0] < share, age, 0)


def faulty() -> Channel:
    """Clients whose uploads have the faults of `FaultRates`; `aggregate.screening` says what the server makes of it."""

    def draw(order, key, ids, rates):
        faults, part = draw_faults(key, rates.faults, ids)
        return order._replace(part=part, faults=faults)

    def deliver(uploads, params, state, order, rates):
        return spoil(uploads, order.faults, rates.faults.scale_by), {"faults": order.faults}

    return Channel(draw=draw, deliver=deliver)


def draw_faults(key: jax.Array, rates: FaultRates, ids: jax.Array) -> tuple[dict, jax.Array]:
    """({fault: [C] bool}, [C] the share of the local steps) of the clients `ids` [C]; `key` is the round's."""
    uniform = _uniform(key, FAULTY, ids, len(FAULTS) + 1)
    faults = {name: uniform[:, i] < getattr(rates, name) for i, name in enumerate(FAULTS)}
    return faults, jnp.where(faults["straggle"], 1 - uniform[:, -1], 1)


def spoil(uploads: Uploads, faults: dict[str, jax.Array], scale_by: jax.Array) -> Uploads:
    """The uploads as they arrive with these faults [C]; what a straggler does is in its update already."""

    def spoil_update(leaf):
        nan, flip = (faults[name].reshape(-1, *[1] * (leaf.ndim - 1)) for name in ("nan", "flip"))
        return jnp.where(nan, jnp.nan, jnp.where(flip, -leaf, leaf)).astype(leaf.dtype)

    def scaled(values):
        factor = jnp.where(faults["scale"], scale_by, 1).reshape(-1, *[1] * (values.ndim - 1))
        return (values * factor).astype(values.dtype)

    sketch = uploads.sketch
    if isinstance(sketch, Sketch):
        sketch = sketch._replace(eigenvalues=scaled(sketch.eigenvalues))
    elif isinstance(sketch, Diagonal | Image | Core):
        sketch = sketch._replace(values=scaled(sketch.values))
    elif isinstance(sketch, LayerFactors):
        sketch = sketch._replace(inputs=jax.tree.map(scaled, sketch.inputs))
    num_examples = jnp.where(faults["drop"], 0, uploads.num_examples)
    return uploads._replace(delta=jax.tree.map(spoil_update, uploads.delta), sketch=sketch, num_examples=num_examples)


def _uniform(key: jax.Array, stream: int, ids: jax.Array, number: int) -> jax.Array:
    """[C, number] in [0, 1), of each client's own key."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, stream), ids)
    return jax.vmap(lambda key: jax.random.uniform(key, [number]))(keys)
