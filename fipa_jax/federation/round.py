"""What is one round? Who takes part, local training and sketches on every client, and the server's part of it.

Each stage is a function over `Parts`, pure and jittable by itself, so that a run can time it; `whole_round` makes them
one. From `train` on a stage sees the cohort alone: the `Cohort` that a population makes of its ids, and the state of
`state.fetch`. What belongs to all clients may live on the host. Keys derive from the root key, the round's number and
the client's id: neither the order of the clients nor a resume changes them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from fipa_jax import trees
from fipa_jax.aggregate.row_blocks import can_share, fill_up, padded
from fipa_jax.aggregate.uploads import Message
from fipa_jax.client.examples import Client, gather, present, subsample, take
from fipa_jax.client.local_solver import LocalResult
from fipa_jax.curvature import contracts
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.federation.channel import Order
from fipa_jax.federation.parallel import ByRows, map_clients
from fipa_jax.federation.parts import Parts, Rates, model_of, trained_of
from fipa_jax.federation.population import Cohort, sample_cohort
from fipa_jax.federation.server import serve
from fipa_jax.federation.state import State, fetch, keep

DUE = 2**31  # the stream of who sends a sketch; those of the clients' sketches have their numbers


def draw(parts: Parts, round: jax.Array, rates: Rates, root: jax.Array) -> tuple[jax.Array, Order]:
    """(ids [C] of the clients that take part, their orders [C, ...]), from the round's number and the root key."""
    key, sample = jax.random.fold_in(root, round), parts.channel.sample
    if sample is None:
        ids = sample_cohort(_keys_of(round, root)[0], parts.num_clients, parts.cohort)
    else:
        ids = sample(key, parts.num_clients, parts.cohort, rates.channel)
    return ids, parts.channel.draw(Order(), key, ids, rates.channel)


def train(
    parts: Parts, state: State, rates: Rates, cohort: Cohort, root: jax.Array, sketches: Message = None
) -> LocalResult:
    """Every client of the cohort improves the parameters that it has received.

    Args:
      state: as `state.fetch` gives it.
      sketches: the clients' own [C, ...], where local work needs them.

    Returns:
      The clients' results, stacked [C, ...].
    """
    told = parts.channel.tell(trees.select(state.params, parts.trainable), state.history, rates.channel)
    told |= parts.announce(state.aggregator)
    hyper = rates.local._replace(lr=rates.local.lr * rates.lr_decay**state.round, **told)

    def one(state, data, hyper, client, key, store, sketch, order):
        chosen, outputs = model_of(parts, state.params)
        theta = parts.channel.start(chosen, state.history, order)
        if isinstance(sketch, Sketch):
            sketch = sketch._replace(basis=sketch.basis[: trees.ravel(theta).size])
        hyper = hyper._replace(sketch=sketch, part=order.part)
        whole = trained_of(parts, state.params) | theta
        result = parts.local(outputs, whole, data, client, key, hyper, store, state.shared)
        return result._replace(delta={path: result.delta[path] for path in chosen})

    keys = _of_clients(_keys_of(state.round, root)[1], cohort.ids)
    common = _seen_by_all(state), cohort.data, hyper
    return _over(parts, one, common, cohort, cohort.clients, keys, state.store, sketches, cohort.orders)


def sketch(
    parts: Parts, state: State, rates: Rates, cohort: Cohort, results: LocalResult | None, root: jax.Array
) -> Message:
    """Every client of the cohort sketches its curvature where the rule wants it; else what its work has said of it.

    Args:
      results: of the clients' training, or None before it.

    Returns:
      The clients' sketches, diagonals, images or cores, stacked [C, ...].
    """
    sketcher = parts.sketcher
    if sketcher is None:
        return None if results is None else results.message

    def one(state, data, asked, client, key, delta, order):
        chosen, outputs = model_of(parts, state.params)
        theta = parts.channel.start(chosen, state.history, order)
        theta = theta if delta is None else optax.tree.add(theta, delta)
        draw_key, solve_key = jax.random.split(key)
        client = subsample(draw_key, client, parts.sketch_examples)
        batch, mask = gather(data, client.indices), present(client)
        return _filled_up(parts, sketcher.of_client(outputs, theta, solve_key, batch, mask, *asked))

    key = _keys_of(state.round, root)[2]
    keys = _of_clients(key, sketcher.drawn_by(cohort.ids))
    due = sketcher.due and due_of(parts, state.round, cohort.ids, root)
    trained = None
    if parts.aggregator.needs.at == "local":
        trained = contracts.given(results, "results, as the rule wants curvature at the trained parameters").delta
    common = _seen_by_all(state), cohort.data, parts.aggregator.asks(state.aggregator)
    given, how = (cohort.clients, keys, trained, cohort.orders), {"by_rows": _bases_of(parts), "wanted": due}
    sketches = _over(parts, one, common, cohort, *given, **how)
    return sketcher.of_cohort(sketches, state.round)


def due_of(parts: Parts, round: jax.Array, ids: jax.Array, root: jax.Array) -> jax.Array:
    """[C] bool, which of a round's clients `ids` [C] send curvature, where not all of them do."""
    key = jax.random.fold_in(_keys_of(round, root)[2], DUE)
    due = contracts.given(parts.sketcher, "parts.sketcher").due
    return contracts.given(due, "sketcher.due, as not all send any")(round, key, ids)


def by_clients(parts: Parts, train: Callable, sketch: Callable, clock: Callable = lambda stage, result: result):
    """Builds the clients' part of a round: (state, rates, cohort, root) -> (results, sketches).

    Sketches come first where local work needs them.

    Args:
      train, sketch: the stages above, over `parts` already.
      clock: (name of the stage, its result) -> the result; it may measure the time.
    """

    def work(state: State, rates: Rates, cohort: Cohort, root: jax.Array):
        if parts.sketch_first:
            sketches = clock("sketch", sketch(state, rates, cohort, None, root))
            return clock("train", train(state, rates, cohort, root, sketches)), sketches
        results = clock("train", train(state, rates, cohort, root))
        return results, clock("sketch", sketch(state, rates, cohort, results, root))

    return work


def whole_round(
    parts: Parts, state: State, rates: Rates, data: dict, clients: Client, root: jax.Array
) -> tuple[State, dict]:
    """One round of all clients, on the device: (state, info). Jit it, or scan over it.

    Without jit the clients' stores in `state` are written in place, so that it serves once.

    Args:
      data: the training set {field: [N, ...]}.
      clients: all clients, stacked [T, ...].
    """
    ids, orders = draw(parts, state.round, rates, root)
    cohort, seen = Cohort(ids, take(clients, ids), data, orders), fetch(state, ids)
    work = by_clients(parts, functools.partial(train, parts), functools.partial(sketch, parts))
    results, sketches = work(seen, rates, cohort, root)
    seen, info = serve(parts, seen, rates, cohort, results, sketches)
    return keep(state, seen, ids), info


def _over(parts: Parts, one: Callable, common: tuple, cohort: Cohort, *stacked: Any, **options: Any):
    """one(*common, *client) of every client of the cohort, stacked [C, ...]."""
    sizes = cohort.clients.num_examples
    return map_clients(one, common, *stacked, sizes=sizes, chunk=parts.chunk, mesh=parts.mesh, **options)


def _filled_up(parts: Parts, message: Any) -> Any:
    """A client's message, its sketch's rows filled up where the rule spreads them; alone or first of several."""
    if not parts.aggregator.needs.spread:
        return message
    if not isinstance(message, Sketch):
        return (_filled_up(parts, message[0]), *message[1:])
    size = padded(message.basis.shape[0])
    return message._replace(basis=fill_up(message.basis[None], size)[0])


def _bases_of(parts: Parts) -> ByRows:
    """Which of the clients' messages are exchanged over a mesh: long bases, where the rule spreads their rows."""

    def by_rows(messages):
        def one(leaf):
            long = parts.aggregator.needs.spread and leaf.ndim == 3
            return bool(long and can_share(parts.mesh, leaf.shape[1]))

        return jax.tree.map(one, messages)

    return by_rows


def _seen_by_all(state: State) -> State:
    """What all clients of a round may look at."""
    return state._replace(aggregator=(), server=(), store=())


def _keys_of(round: jax.Array, root: jax.Array) -> jax.Array:
    """Of a round: the keys of its cohort, of its training and of its sketches, [3]."""
    return jax.random.split(jax.random.fold_in(root, round), 3)


def _of_clients(key: jax.Array, ids: jax.Array) -> jax.Array:
    """[C], each client's own key."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
