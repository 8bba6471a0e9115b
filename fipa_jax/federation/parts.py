"""What is a round made of? Functions and static numbers, chosen once for a phase, and the numbers that are traced."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import Aggregator, announce_nothing
from fipa_jax.client.local_solver import Hyper, LocalSolver
from fipa_jax.client.terms import Term
from fipa_jax.curvature.sketch import Sketcher
from fipa_jax.federation.channel import Channel, ChannelRates
from fipa_jax.federation.state import HostStore, State, placed


class Parts(NamedTuple):
    """What a phase's rounds are made of; static."""

    task: Any  # a `tasks.task.Task`; of it a round needs `outputs`
    local: LocalSolver
    term: Term
    sketcher: Sketcher | None  # None where the rule needs no curvature
    aggregator: Aggregator
    server: optax.GradientTransformation  # on the negative step, without the learning rate
    num_clients: int  # T
    cohort: int  # C
    trainable: str = ".*"  # regular expression over parameter paths: what is sent and aggregated
    also_trained: str = ""  # the same of what clients train, where that is more; "" for no more
    channel: Channel = Channel()  # what lies between server and clients
    announce: Callable[[Any], dict] = announce_nothing  # the rule's state -> fields of `Hyper` that the clients take
    sketch_first: bool = False  # whether local work needs the client's sketch
    sketch_examples: int = 0  # examples of a client that enter its sketch; 0 for all
    update_bytes: Callable[[int], int] | None = None  # P -> bytes of an update as it is sent; None for its arrays
    column_bits: int = 0  # of an entry of the basis that clients are shown, see `few_bits`; 0 for floating point
    first: int = 0  # number of the phase's first round
    least_clients: int = 1  # with fewer clients that take part a round is skipped
    pooled: bool = False  # whether one client holds all examples: nothing is sent
    chunk: int = 1  # clients side by side, see `parallel.map_clients`
    mesh: Mesh | None = None  # devices over which clients are spread


class Rates(NamedTuple):
    """A phase's traced hyper-parameters."""

    local: Hyper
    lr_decay: jax.Array  # [], the local learning rate is lr * lr_decay ** round
    server_lr: jax.Array  # [], gamma
    channel: ChannelRates = ChannelRates()


def init(parts: Parts, params: Any, round: int = 0, on_host: bool = False) -> State:
    """The state before a round.

    Args:
      params: the whole model's.
      round: its number.
      on_host: whether what clients keep lives on the host.
    """
    chosen = trees.select(params, parts.trainable)
    # What is kept of parameters of half precision is kept in float32: sums and moments would not move otherwise.
    wide = trees.widened(chosen)
    blank = jax.tree.map(jnp.copy, parts.term.init(wide))  # MOON's is the parameters themselves: no donation twice
    store = () if on_host else jax.tree.map(lambda leaf: _repeated(leaf, parts.num_clients), blank)
    rule, server, history = parts.aggregator.init(wide), parts.server.init(wide), parts.channel.init(chosen)
    state = State(params, rule, server, store, blank, jnp.asarray(round, jnp.int32), history)
    if parts.mesh is not None:  # placed where a round leaves it, or the second round would compile anew
        state = placed(state, parts.mesh)
    return state._replace(store=HostStore(blank)) if on_host else state


def model_of(parts: Parts, params: Any) -> tuple[dict, Callable]:
    """(the trainable subset of the parameters, the model's outputs as a function of it and a batch)."""

    def outputs(theta, batch):
        return parts.task.outputs(trees.replace(params, theta), batch)

    return trees.select(params, parts.trainable), outputs


def trained_of(parts: Parts, params: Any) -> dict:
    """What clients train, {path: leaf}: what `trainable` names, and what `also_trained` names besides."""
    more = trees.select(params, parts.also_trained, "also_trained") if parts.also_trained else {}
    return trees.select(params, parts.trainable) | more


def _repeated(leaf, number: int) -> jax.Array:
    return jnp.repeat(jnp.asarray(leaf)[None], number, axis=0)
