"""One client on a small network, for the tests of the local solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fipa_jax.client import first_order as client_lib
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper

NUM_EXAMPLES, WIDTH, NUM_OUTPUTS = 8, 3, 3
KEEP = lambda key, batch: batch
INDICES = np.array([3, 1, 7, 0, 5, 2, 6, 4], np.int32)


def make_data():
    draw = np.random.default_rng(0)
    return {
        "x": jnp.asarray(draw.normal(size=(NUM_EXAMPLES, WIDTH))),
        "y": jnp.asarray(draw.normal(size=(NUM_EXAMPLES, NUM_OUTPUTS))),
        "label": jnp.asarray(draw.integers(NUM_OUTPUTS, size=NUM_EXAMPLES)),
    }


def make_params():
    draw = np.random.default_rng(1)
    return {"w": jnp.asarray(draw.normal(size=(WIDTH, NUM_OUTPUTS))), "b": jnp.asarray(draw.normal(size=NUM_OUTPUTS))}


def network(params, batch):
    return jnp.tanh(batch["x"] @ params["w"] + params["b"][None]), ()


def squared(out, batch):
    return jnp.sum((out - batch["y"]) ** 2, axis=1) / 2


def softmax(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def make_client(count, indices=INDICES):
    return Client(jnp.asarray(indices), jnp.asarray(count))


def make_hyper(lr=0.1, damping=0.1, mu=0.0):
    return Hyper(*(jnp.asarray(value) for value in (lr, damping, mu)))


@functools.cache
def _compiled(solver=client_lib.first_order, loss=squared, outputs=network, augment=KEEP, term=None, **options):
    solve = solver(loss, augment, term=term, **options)
    return jax.jit(functools.partial(solve, outputs))


def solve(client, hyper, params=None, data=None, seed=0, store=(), shared=(), **options):
    params, data = params or make_params(), data or make_data()
    return _compiled(**options)(params, data, client, jax.random.key(seed), hyper, store, shared)
