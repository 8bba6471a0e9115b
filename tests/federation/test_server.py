"""The server's part as a deployment calls it: what clients elsewhere have sent, in a loop of the user's own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import KEEP, NUM_EXAMPLES, make_client, make_data, make_hyper, make_params, network, squared

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.past_rounds import PastRounds
from fipa_jax.client import terms
from fipa_jax.client.examples import Client, gather, present
from fipa_jax.client.first_order import first_order
from fipa_jax.curvature.sketch import make_sketch, plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.server import serve
from fipa_jax.federation.state import fetch, keep

T, C, ROUNDS = 4, 3, 4
COUNTS = np.array([NUM_EXAMPLES, 5, 3, 6])
TASK = tasks.Task(lambda key: make_params(), network, squared, lambda out, batch: {"mse": squared(out, batch)})
# Controls of the clients, past rounds, momentum: everything that a state can hold.
PARTS = Parts(
    task=TASK,
    local=first_order(squared, KEEP, batch_size=3, epochs=2, term=terms.scaffold()),
    term=terms.scaffold(),
    sketcher=plain(lambda outputs, features: make_sketch(outputs, squared, rank=3, solver="rows")),
    aggregator=aggregate.fipa(past=PastRounds("prior", rank=4)),
    server=optax.trace(0.9),
    num_clients=T,
    cohort=C,
)
ROOT = jax.random.key(5)


def _rates():
    return Rates(make_hyper(mu=1.0), jnp.asarray(0.9), jnp.asarray(0.8))


def _own_indices():
    return np.stack([np.roll(np.arange(NUM_EXAMPLES), m) for m in range(T)])


@jax.jit
def _at_a_client(params, hyper, data, client, train_key, sketch_key, store, shared):
    """A client's own program: it knows its examples, what the server has sent, and what it has kept."""
    result = PARTS.local(network, params, data, client, train_key, hyper, store, shared)
    solve_key = jax.random.split(sketch_key)[1]
    batch, mask = gather(data, client.indices), present(client)
    return result, PARTS.sketcher.of_client(network, params, solve_key, batch, mask)


def _upload(state, k, one):
    """What client `one` sends in round k: (result, sketch), of NumPy's arrays."""
    hyper = _rates().local
    hyper = hyper._replace(lr=hyper.lr * _rates().lr_decay ** jnp.int32(k))
    _, train_key, sketch_key = jax.random.split(jax.random.fold_in(ROOT, k), 3)
    own = jax.tree.map(lambda leaf: leaf[one], state.store)
    keys = (jax.random.fold_in(key, one) for key in (train_key, sketch_key))
    client = make_client(COUNTS[one], _own_indices()[one])
    return jax.device_get(_at_a_client(state.params, hyper, make_data(), client, *keys, own, state.shared))


@pytest.mark.slow
def test_uploads_of_clients_elsewhere_give_the_round_to_the_bit(x64):
    """No example ever reaches the server, which holds no data; its state is that of the whole round on one device."""
    clients = Client(jnp.asarray(_own_indices()), jnp.asarray(COUNTS))
    whole = jax.jit(functools.partial(rounds.whole_round, PARTS))
    aggregated = jax.jit(functools.partial(serve, PARTS))
    wanted = state = parts_lib.init(PARTS, make_params())
    for k in range(ROUNDS):
        wanted, info = whole(wanted, _rates(), make_data(), clients, ROOT)
        ids, orders = rounds.draw(PARTS, jnp.int32(k), _rates(), ROOT)
        results, sketches = jax.tree.map(
            lambda *leaves: np.stack(leaves), *(_upload(state, k, one) for one in ids.tolist())
        )
        cohort = Cohort(ids, Client(None, COUNTS[ids]), data={}, orders=orders)
        seen, found = aggregated(fetch(state, ids), _rates(), cohort, results, sketches)
        state = keep(state, seen, ids)
        chex.assert_trees_all_equal(state, wanted)
        chex.assert_trees_all_equal(found, info)
    assert int(state.round) == ROUNDS and not np.allclose(state.params["w"], make_params()["w"])
