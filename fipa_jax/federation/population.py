"""Where are the clients and their examples? All on the device, or on the host, with each round's cohort moved over."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.client.examples import Client, present, take
from fipa_jax.federation.channel import Order
from fipa_jax.trees import HostArray

BLOCK = 10_000  # examples moved to the device at a time, where all are evaluated
SPARSE = 50  # a cohort of less than 1/SPARSE of the clients is drawn without a permutation of them all


class Cohort(NamedTuple):
    """The clients of a round, with the examples that they need, or more."""

    ids: jax.Array  # [C] int32, distinct
    clients: Client  # [C, N] and [C], indices into `data`
    data: dict  # {field: [M, ...]}
    orders: Order = Order()  # [C, ...], what happens to them in this round


def sample_cohort(key: jax.Array, num_clients: int, cohort: int) -> jax.Array:
    """[C] ids of the clients that take part: distinct, uniformly drawn; all of them in order if C = T.

    Where the cohort is a small part of the population, the work does not grow with the population: ids are drawn
    independently, and those that repeat an earlier one anew until none does. (No id is preferred over another in this,
    so all cohorts are equally likely.)
    """
    if cohort == num_clients:
        return jnp.arange(num_clients)
    if num_clients < SPARSE * cohort:
        return jax.random.choice(key, num_clients, [cohort], replace=False)
    earlier = jnp.tri(cohort, k=-1, dtype=bool)

    def again(carry):
        key, ids, repeats = carry
        key, draw = jax.random.split(key)
        ids = jnp.where(repeats, jax.random.randint(draw, [cohort], 0, num_clients), ids)
        return key, ids, jnp.any(earlier & (ids[:, None] == ids[None]), axis=1)

    blank = jnp.zeros([cohort], int)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), again, (key, blank, blank == 0))[1]


class Resident(NamedTuple):
    """All clients and examples on the device."""

    data: dict  # {field: [N, ...]}
    clients: Client  # [T, N_max] and [T]

    def cohort(self, ids) -> Cohort:
        """The clients `ids` [C]; the data are all there are."""
        return Cohort(ids, take(self.clients, ids), self.data)

    def shapes(self, cohort: int) -> Cohort:
        """The shapes of a cohort of so many clients."""
        return jax.eval_shape(lambda people, ids: people.cohort(ids), self, jax.ShapeDtypeStruct([cohort], np.int32))

    def values(self, evaluate: Callable, params):
        """evaluate(params, data) of all examples: a pytree of [N, ...]."""
        return evaluate(params, self.data)

    def over(self, data: dict):
        """The same clients with other data of theirs."""
        return self._replace(data=data)

    def means(self, values: dict) -> dict:
        """{name: [T]}, the means over each client's own examples of {name: [N]}."""
        own = jax.vmap(present)(self.clients)
        total = lambda value: jnp.sum(jnp.where(own, value[self.clients.indices], 0), axis=1)
        return jax.tree.map(lambda value: total(value) / jnp.maximum(self.clients.num_examples, 1), values)

    @property
    def num_examples(self) -> jax.Array:
        """[T], of each client."""
        return self.clients.num_examples


class OnHost:
    """All clients and examples on the host, in arrays or memory-mapped files; a round sees its cohort's alone.

    What the device holds does not depend on the population: the cohort's examples are packed one client after another
    into arrays of one size, in which the largest cohort finds room, so that a round compiles once.

    Args:
      data: {field: [N, ...]}, of NumPy's arrays or what can be indexed like one.
      owned: of each of the T clients, the indices of its examples; see `partition.Ragged`.
      cohort: C, clients in a round.
      put: {field: array} -> the same on the device.
    """

    def __init__(self, data: dict, owned: Sequence, cohort: int, put: Callable):
        self.data, self.owned, self._cohort, self._put = data, owned, cohort, put
        self.num_examples = np.fromiter(map(len, owned), np.int32, len(owned))  # [T]
        sizes = np.sort(self.num_examples).astype(np.int64)
        self._width, self._room = int(sizes[-1]), int(sizes[-cohort:].sum())

    def cohort(self, ids) -> Cohort:
        """The clients `ids` [C] and their examples, moved to the device."""
        own = [np.asarray(self.owned[client], np.int64) for client in np.asarray(ids).tolist()]
        counts: HostArray = np.array([len(indices) for indices in own], np.int32)
        first = np.cumsum(counts, dtype=np.int32) - counts
        column = np.arange(self._width, dtype=np.int32)[None]
        # Beyond its own examples a client's row repeats its first one.
        indices: HostArray = first[:, None] + np.where(column < counts[:, None], column, 0)
        chosen = np.concatenate(own)
        packed = {name: self._packed(field, chosen) for name, field in self.data.items()}
        return Cohort(ids, *self._put((Client(indices, counts), packed)))

    def shapes(self, cohort: int) -> Cohort:
        """The shapes of a cohort, of as many clients as a round has."""
        packed = {name: _shape(self._room, *field.shape[1:], dtype=field.dtype) for name, field in self.data.items()}
        return Cohort(_shape(cohort), Client(_shape(cohort, self._width), _shape(cohort)), packed)

    def over(self, data: dict):
        """The same clients with other data of theirs."""
        return OnHost(data, self.owned, self._cohort, self._put)

    def _packed(self, field, chosen):
        rows = np.zeros([self._room, *field.shape[1:]], field.dtype)
        rows[: len(chosen)] = field[chosen]
        rows[len(chosen) :] = rows[0]  # never an input that the network has not seen
        return rows

    def values(self, evaluate: Callable, params):
        """evaluate(params, data) of all examples, moved over block by block: a pytree of [N, ...] on the host."""
        number = len(next(iter(self.data.values())))
        cut = lambda start: {name: np.asarray(field[start : start + BLOCK]) for name, field in self.data.items()}
        parts = [jax.device_get(evaluate(params, self._put(cut(start)))) for start in range(0, number, BLOCK)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def means(self, values: dict) -> dict:
        """{name: [T]}, the means over each client's own examples of {name: [N]}."""
        mean = lambda value, own: value[own].mean() if len(own) else 0
        over = lambda value: np.fromiter((mean(value, own) for own in self.owned), value.dtype, len(self.owned))
        return jax.tree.map(over, values)


def _shape(*sizes: int, dtype: Any = np.int32) -> Any:
    """An array's shape and dtype, where the array itself is to come."""
    return jax.ShapeDtypeStruct(sizes, jax.dtypes.canonicalize_dtype(dtype))


class Ahead:
    """Calls `fetch(k)` for round k, and on a thread already that for round k + 1, while round k runs.

    Args:
      fetch: a function of the round that depends on nothing which a round changes.
      last: the last round.
    """

    def __init__(self, fetch: Callable, last: int):
        self._fetch, self._last = fetch, last
        self._thread, self._found = ThreadPoolExecutor(1, "cohorts"), {}
        # A thread starts with jax's defaults, whatever this one has set. (The field is made when jax is imported.)
        self._precision = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, k: int):
        """What `fetch(k)` returns."""
        found = self._found.pop(k, None) or self._submit(k)
        if k < self._last:
            self._found = {k + 1: self._submit(k + 1)}
        return found.result()

    def _submit(self, k: int):
        def fetch():
            with jax.enable_x64(self._precision):
                return self._fetch(k)

        return self._thread.submit(fetch)
