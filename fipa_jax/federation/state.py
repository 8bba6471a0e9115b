"""What does the next round need? The state of a run, a pytree; what clients keep may be in a store on the host."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fipa_jax import trees
from fipa_jax.aggregate.row_blocks import can_share
from fipa_jax.client.examples import take
from fipa_jax.federation.parallel import put, replicate


class State(NamedTuple):
    """All that the next round needs; a pytree of arrays."""

    params: Any  # the global model
    aggregator: Any
    server: optax.OptState
    store: Any  # of the term, stacked over all clients [T, ...], or on the host; inside a stage the cohort's [C, ...]
    shared: Any  # the mean of `store` over all T clients
    round: jax.Array  # [], int32, counted over all phases
    history: Any = ()  # the channel's


def places(state: State, mesh: Mesh) -> State:
    """How a state lies on the devices between rounds: whole on each, but long bases of past rounds by rows.

    With several processes these are whole too, as the first one writes checkpoints without asking the others.
    """
    whole, rows = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), (None, "clients")))

    def of_rule(leaf):
        by_rows = jax.process_count() == 1 and leaf.ndim == 3 and can_share(mesh, leaf.shape[1])
        return rows if by_rows else whole

    everywhere = jax.tree.map(lambda _: whole, state)
    return everywhere._replace(aggregator=jax.tree.map(of_rule, state.aggregator))


def placed(state: State, mesh: Mesh | None) -> State:
    """The state on the device, or on those of the mesh as a round leaves it."""
    return replicate(state, None) if mesh is None else put(state, places(state, mesh))


def fetch(state: State, ids: jax.Array) -> State:
    """The state as the cohort `ids` [C] sees it: of the clients' stores its own, [C, ...]."""
    if isinstance(state.store, HostStore):
        return state._replace(store=state.store.rows(ids))
    return state._replace(store=take(state.store, ids))


def keep(state: State, seen: State, ids: jax.Array) -> State:
    """The state after a round: `seen`, with the stores of all clients.

    They are written in place, on the host and on the device: but within jit, the stores of `state` are gone.
    """
    if isinstance(state.store, HostStore):
        state.store.put(ids, seen.store)
        return seen._replace(store=state.store)
    return seen._replace(store=_put(state.store, ids, seen.store))


def snapshot(state: State) -> State:
    """The state on the host, in copies that later rounds do not write to."""
    on_host = isinstance(state.store, HostStore)
    arrays = state._replace(store=()) if on_host else state
    # Of its own part of what every process holds: not all of them need take the snapshot.
    own = lambda leaf: leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    copies = jax.tree.map(lambda leaf: np.array(own(leaf)), arrays)
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
        return jax.tree.map(jnp.copy, placed(trees.fitted(of_state, state), mesh))
    clients_seen = len(of_state.get("store/ids", ()))
    fitted = trees.fitted(of_state, state._replace(store=store.blank_of(clients_seen)))
    store.put(fitted.store["ids"], fitted.store["rows"])
    return jax.tree.map(jnp.copy, placed(fitted._replace(store=()), mesh))._replace(store=store)


def numbers_of(rule: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """{path: []} of the numbers that a rule's state has by these names, those of `Aggregator.hyper`."""
    leaves = trees.with_paths(rule)
    return {trees.in_words(path): leaf for path, leaf in leaves if path and getattr(path[-1], "key", None) in names}


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked, ids, rows):
    """The stacked tree [T, ...] with `rows` [C, ...] at `ids`, in its place."""
    return jax.tree.map(lambda all_, new: all_.at[ids].set(new), stacked, rows)


class HostStore:
    """The stores of the clients seen so far, on the host; all others have the blank one.

    It grows with the clients seen, not with the population.

    Args:
      blank: pytree of arrays, the store of a client that was never seen.
    """

    def __init__(self, blank: Any):
        self._blank = jax.tree.map(np.asarray, jax.device_get(blank))
        self._row_of: dict[int, int] = {}  # client id -> row
        self._rows = self._blanks(0)

    def __len__(self) -> int:
        """The number of clients seen."""
        return len(self._row_of)

    def rows(self, ids) -> Any:
        """The stores of the clients `ids` [C], stacked [C, ...]: NumPy arrays of their own."""
        found = self._blanks(len(ids))
        seen = [(place, self._row_of[id_]) for place, id_ in enumerate(np.asarray(ids).tolist()) if id_ in self._row_of]
        if seen:
            places, rows = map(list, zip(*seen, strict=True))
            for out, stacked in zip(jax.tree.leaves(found), jax.tree.leaves(self._rows), strict=True):
                out[places] = stacked[rows]
        return found

    def put(self, ids, rows) -> None:
        """Keeps `rows` [C, ...] as the stores of the clients `ids` [C]."""
        places = [self._row_of.setdefault(id_, len(self._row_of)) for id_ in np.asarray(ids).tolist()]
        self._reserve(len(self._row_of))
        for stacked, new in zip(jax.tree.leaves(self._rows), jax.tree.leaves(rows), strict=True):
            stacked[places] = np.asarray(new)

    def snapshot(self) -> dict:
        """{"ids": [S], "rows": copies of their stores [S, ...]} of the clients seen."""
        number = len(self)
        return {
            "ids": np.fromiter(self._row_of, np.int64, number),
            "rows": jax.tree.map(lambda rows: rows[:number].copy(), self._rows),
        }

    def blank_of(self, number: int) -> dict:
        """What a `snapshot` after so many clients looks like."""
        return {"ids": np.zeros(number, np.int64), "rows": self._blanks(number)}

    def _reserve(self, number: int) -> None:
        """Makes room for so many rows; doubling, each row is copied twice at most in the mean."""
        have = len(jax.tree.leaves(self._rows)[0]) if jax.tree.leaves(self._rows) else number
        if number > have:
            more = self._blanks(max(number, 2 * have) - have)
            self._rows = jax.tree.map(lambda old, new: np.concatenate([old, new]), self._rows, more)

    def _blanks(self, number: int) -> Any:
        return jax.tree.map(lambda leaf: np.repeat(leaf[None], number, axis=0), self._blank)
