"""What does the next round need? The state of a run, as a pytree, and its clients' stores, also on the host."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fipa_jax import trees
from fipa_jax.client.examples import take
from fipa_jax.federation.client_store import HostStore
from fipa_jax.federation.parallel import replicate


class State(NamedTuple):
    """All that the next round needs; a pytree of arrays."""

    params: Any  # the global model
    aggregator: Any
    server: optax.OptState
    store: Any  # of the term, stacked over all clients [T, ...], or on the host; inside a stage the cohort's [C, ...]
    shared: Any  # the mean of `store` over all T clients
    round: jax.Array  # [], int32, counted over all phases
    history: Any = ()  # the channel's


def fetch(state: State, ids: jax.Array) -> State:
    """The state as the cohort `ids` [C] sees it: of the clients' stores its own, [C, ...]."""
    if isinstance(state.store, HostStore):
        return state._replace(store=state.store.rows(ids))
    return state._replace(store=take(state.store, ids))


def keep(state: State, seen: State, ids: jax.Array) -> State:
    """The state after a round: `seen`, with the stores of all clients; those on the host are written in place."""
    if isinstance(state.store, HostStore):
        state.store.put(ids, seen.store)
        return seen._replace(store=state.store)
    return seen._replace(store=_put(state.store, ids, seen.store))


def snapshot(state: State) -> State:
    """The state on the host, in copies that later rounds do not write to."""
    on_host = isinstance(state.store, HostStore)
    arrays = state._replace(store=()) if on_host else state
    # Of its own part of what every process holds: not all of them need take the snapshot.
    copies = jax.tree.map(lambda leaf: np.array(leaf.addressable_data(0)), arrays)
    return copies._replace(store=state.store.snapshot()) if on_host else copies


def restored(state: State, leaves: dict[str, np.ndarray], mesh: Mesh | None = None) -> State:
    """The state whose `snapshot` had these leaves.

    Args:
      state: a blank one of the same phase.
      leaves: {path: array}; those that begin with no field of the state are passed over.
      mesh: of the phase's parts.

    Raises:
      ValueError: they are not of such a phase.
    """
    of_state = {path: leaf for path, leaf in leaves.items() if path.partition("/")[0] in State._fields}
    store = state.store
    if not isinstance(store, HostStore):
        return jax.tree.map(jnp.copy, replicate(trees.fitted(of_state, state), mesh))
    clients_seen = len(of_state.get("store/ids", ()))
    fitted = trees.fitted(of_state, state._replace(store=store.blank_of(clients_seen)))
    store.put(fitted.store["ids"], fitted.store["rows"])
    return jax.tree.map(jnp.copy, replicate(fitted._replace(store=()), mesh))._replace(store=store)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked, ids, rows):
    """The stacked tree [T, ...] with `rows` [C, ...] at `ids`, in its place."""
    return jax.tree.map(lambda all_, new: all_.at[ids].set(new), stacked, rows)
