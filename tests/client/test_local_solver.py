"""Wrappers of local solvers: steps that follow the client's sketch, and the loss that it starts from."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import (
    INDICES,
    KEEP,
    make_client,
    make_data,
    make_hyper,
    make_params,
    network,
    squared,
)
from jax.sharding import AxisType, PartitionSpec

from fipa_jax.client import first_order, second_order, terms
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import adaptive_steps, steps_for, with_initial_loss
from fipa_jax.curvature.sketch import Sketch

SOLVERS = {
    "sgd": functools.partial(first_order.first_order, batch_size=3),
    "gauss_newton": functools.partial(second_order.gauss_newton, steps=2),
}


@pytest.mark.parametrize("optimizer", first_order.LINEAR)
def test_the_rule_of_steps_counts_momentum(x64, optimizer):
    """On a parabola of the least curvature the error has shrunk by e^-c, but for the start without momentum."""
    b, lr, least, scale = 0.8, 0.004, jnp.asarray(0.5), 3.0
    reach = 1 / (1 - b) if optimizer in first_order.WITH_MOMENTUM else 1.0
    rule = first_order.LINEAR[optimizer](b) if reach > 1 else first_order.LINEAR[optimizer]()
    theta, state = jnp.asarray(1.0), rule.init(jnp.asarray(1.0))
    for _ in range(int(steps_for(least, reach * jnp.asarray(lr), scale, 10**6))):
        move, state = rule.update(least * theta, state)
        theta = theta - lr * move
    assert abs(np.log(abs(theta)) + scale) < 0.1


def _run(local, count=5, sketch=None, params=None, **hyper):
    local, hyper = jax.jit(functools.partial(local, network)), make_hyper(**hyper)._replace(sketch=sketch)
    return local(params or make_params(), make_data(), make_client(count), jax.random.key(0), hyper, (), ())


@pytest.mark.parametrize("least", [0.5, 2.0])
def test_the_steps_are_those_of_the_sketch(x64, least):
    eigenvalues = jnp.asarray([5.0, least, 0.0])  # the pair that is left out does not count
    local = adaptive_steps(SOLVERS["sgd"](squared, KEEP, epochs=9), scale=1.0, most=15)
    steps = int(steps_for(jnp.asarray(least), jnp.asarray(0.1), 1.0, 15))
    assert 1 < steps <= 15
    wanted = _run(SOLVERS["sgd"](squared, KEEP, steps=steps))
    chex.assert_trees_all_equal(_run(local, sketch=Sketch(eigenvalues, None)), wanted)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("count", [0, 5])
def test_the_initial_loss_is_that_of_what_the_client_received(x64, name, count):
    plain = SOLVERS[name](squared, KEEP)
    result, without = _run(with_initial_loss(plain, squared), count), _run(plain, count)
    own = {field: values[INDICES[:count]] for field, values in make_data().items()}
    wanted = np.mean(squared(network(make_params(), own)[0], own)) if count else 0
    np.testing.assert_allclose(result.before, wanted, rtol=1e-12)
    assert without.before is None
    chex.assert_trees_all_equal(result._replace(before=None), without)


def test_the_initial_loss_holds_the_terms_penalty(x64):
    """That of logits which are shifted by the client's own label frequencies, smoothed by one example a class."""
    draw, label, mu = np.random.default_rng(0), np.array([0, 0, 0, 2, 1]), 0.7
    data, params = {"x": draw.normal(size=(5, 2)), "label": label}, {"w": draw.normal(size=(2, 3))}
    shifted = data["x"] @ params["w"] + mu * np.log((np.bincount(label) + 1) / (5 + 3))
    each = np.log(np.sum(np.exp(shifted), axis=1)) - shifted[np.arange(5), label]

    def loss(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    term = terms.logit_adjustment()
    local = with_initial_loss(
        first_order.first_order(loss, KEEP, steps=1, term=term), loss, weight_decay=0.3, term=term
    )
    client, hyper = Client(jnp.arange(5), jnp.int32(5)), make_hyper()._replace(mu=jnp.asarray(mu))
    given = jax.tree.map(jnp.asarray, (params, data))
    found = local(
        lambda params, batch: (batch["x"] @ params["w"], ()), *given, client, jax.random.key(0), hyper, (), ()
    )
    np.testing.assert_allclose(found.before, np.mean(each) + 0.15 * np.sum(params["w"] ** 2), rtol=1e-12)


SPREAD = {
    "sgd": functools.partial(first_order.first_order, batch_size=3, epochs=2),
    "momentum": functools.partial(
        first_order.first_order, optimizer="momentum", batch_size=4, micro_batch=2, clip_norm=1.0, weight_decay=0.1
    ),
    "adam": functools.partial(first_order.first_order, optimizer="adam", batch_size=0, term=terms.scaffold()),
    "gram": functools.partial(second_order.gauss_newton, system="gram"),
    "cg": functools.partial(second_order.gauss_newton, system="cg", tries=0),
    "natural_gradient": second_order.natural_gradient,
}


@pytest.mark.parametrize("name", SPREAD)
def test_within_shard_map_at_its_defaults_each_device_gets_what_it_gets_alone(name):
    local, draw = SPREAD[name](squared, KEEP), np.random.default_rng(0)
    store = jax.tree.map(jnp.zeros_like, make_params()) if name == "adam" else ()
    basis = np.linalg.qr(draw.normal(size=(2, 12, 2)))[0].astype(np.float32)
    clients = Client(jnp.stack([jnp.asarray(INDICES)] * 2), jnp.asarray([5, 7]))

    def alone(client, key, basis):
        hyper = make_hyper()._replace(sketch=Sketch(jnp.asarray([2.0, 1.0]), basis))
        return local(network, make_params(), make_data(), client, key, hyper, store, store)

    def on_each(*spread):
        return jax.tree.map(lambda x: x[None], alone(*jax.tree.map(lambda x: x[0], spread)))

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = clients, jax.random.split(jax.random.key(0), 2), jnp.asarray(basis)
    together = jax.jit(jax.shard_map(on_each, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")))
    for device, got in enumerate(jax.tree.map(lambda x: x[i], together(*spread)) for i in range(2)):
        wanted = jax.jit(alone)(*jax.tree.map(lambda x, device=device: x[device], spread))
        chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
