"""Local training against plain loops and dense solves."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import (
    INDICES,
    KEEP,
    NUM_EXAMPLES,
    make_client,
    make_data,
    make_hyper,
    make_params,
    network,
    softmax,
    solve,
    squared,
)
from jax.flatten_util import ravel_pytree

from fipa_jax import backend
from fipa_jax.client import first_order as client_lib
from fipa_jax.client import second_order, terms
from fipa_jax.client.local_solver import micro_batch_of
from fipa_jax.curvature.sketch import Sketch


@functools.cache
def _gradient(count):
    """Gradient of the mean loss over the first `count` of the client's examples."""
    chosen = lambda data: {name: field[INDICES[:count]] for name, field in data.items()}
    return jax.jit(jax.grad(lambda p, data: jnp.mean(squared(network(p, chosen(data))[0], chosen(data)))))


def _loop(optimizer, count, steps, change=lambda gradient, params: gradient):
    """A plain loop of full-batch steps; returns (params - start, the mean gradient on the way)."""
    start = params = make_params()
    state, total = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        gradient = _gradient(count)(params, make_data())
        total = jax.tree.map(lambda t, g: t + g / steps, total, gradient)
        update, state = optimizer.update(change(gradient, params), state, params)
        params = optax.apply_updates(params, update)
    return jax.tree.map(lambda p, s: p - s, params, start), total


OPTIMIZERS = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr: optax.sgd(lr, momentum=0.7),
    "nesterov": lambda lr: optax.sgd(lr, momentum=0.7, nesterov=True),
    "adam": lambda lr: optax.adam(lr),
    "yogi": lambda lr: _yogi(lr),
}


def _yogi(lr, b1=0.9, b2=0.999, eps=1e-3):
    """Algorithm 2 of Zaheer et al. 2018, with Adam's correction of the bias, m from 0 and v from 1e-6."""

    def update(gradient, state, params):
        count, m, v = state
        count += 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: v - (1 - b2) * jnp.sign(v - g**2) * g**2, v, gradient)
        corrected = lambda m, v: m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
        return jax.tree.map(lambda m, v: -lr * corrected(m, v), m, v), (count, m, v)

    start = lambda params: (0, jax.tree.map(jnp.zeros_like, params), optax.tree.full_like(params, 1e-6))
    return optax.GradientTransformation(start, update)


@pytest.mark.parametrize("optimizer", client_lib.OPTIMIZERS)
def test_first_order_equals_a_plain_loop(x64, optimizer):
    """Full batches of a padded client; the oracle sees its own examples alone."""
    result = solve(make_client(5), make_hyper(), optimizer=optimizer, momentum=0.7, batch_size=0, epochs=4)
    wanted, _ = _loop(OPTIMIZERS[optimizer](0.1), 5, 4)
    chex.assert_trees_all_close(result.delta, wanted, rtol=1e-9, atol=1e-12)


def test_clipping_comes_before_weight_decay(x64):
    clip, decay = 0.1, 0.3

    def change(gradient, params):
        norm = np.linalg.norm(ravel_pytree(gradient)[0])
        assert norm > clip, "nothing is clipped: a test of nothing"
        return jax.tree.map(lambda g, p: g * clip / norm + decay * p, gradient, params)

    options = {"optimizer": "momentum", "momentum": 0.7, "batch_size": 0, "epochs": 3}
    result = solve(make_client(8), make_hyper(), clip_norm=clip, weight_decay=decay, **options)
    wanted, _ = _loop(OPTIMIZERS["momentum"](0.1), 8, 3, change)
    chex.assert_trees_all_close(result.delta, wanted, rtol=1e-9, atol=1e-12)


def test_a_gradient_below_the_bound_is_not_clipped(x64):
    result = solve(make_client(8), make_hyper(), batch_size=0, epochs=3, clip_norm=1e3)
    chex.assert_trees_all_close(result.delta, _loop(optax.sgd(0.1), 8, 3)[0], rtol=1e-9, atol=1e-12)


def _moved(key, batch):
    """A random view: every example is moved by what the key draws for it."""
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


@pytest.mark.parametrize("solver", [client_lib.gradient, second_order.natural_gradient])
def test_a_gradient_is_of_one_random_view_of_each_example(x64, solver):
    """The oracle sees the views that the client's key draws. With an empty sketch the step is -lr g / damping."""
    no_sketch = Sketch(jnp.zeros(1), jnp.zeros([ravel_pytree(make_params())[0].size, 1]))
    hyper = make_hyper(lr=1.0, damping=1.0)._replace(sketch=no_sketch)
    found = [solve(make_client(5), hyper, seed=seed, solver=solver, augment=_moved).delta for seed in (0, 1)]
    for seed, delta in enumerate(found):
        seen = _moved(jax.random.key(seed), {name: field[INDICES] for name, field in make_data().items()})
        own = {name: jnp.zeros_like(field).at[INDICES].set(field) for name, field in seen.items()}
        wanted = jax.tree.map(jnp.negative, _gradient(5)(make_params(), own))
        chex.assert_trees_all_close(delta, wanted, rtol=1e-9, atol=1e-12)
    first, second = (ravel_pytree(delta)[0] for delta in found)
    assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(first)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_what_the_padding_holds_does_not_matter(x64, batch_size):
    options = {"batch_size": batch_size, "epochs": 3}
    one = solve(make_client(5), make_hyper(), **options)
    other = solve(make_client(5, np.where(np.arange(NUM_EXAMPLES) < 5, INDICES, 6)), make_hyper(), **options)
    chex.assert_trees_all_equal(one, other)
    assert np.all(np.isfinite(one.loss)) and np.linalg.norm(ravel_pytree(one.delta)[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("term", ["none", "prox", "logit_adjustment"])
@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "count"),
    [
        pytest.param(4, 2, 7, marks=pytest.mark.slow),
        (6, 3, 4),
        pytest.param(6, 4, 8, marks=pytest.mark.slow),
        (0, 1, 8),
        (0, -1, 5),
    ],
)
def test_micro_batches_do_not_change_the_steps(x64, term, batch_size, micro_batch, count):
    """Whatever of them is padding: the last batch's may be all of one, and of the next a part."""
    options = {"batch_size": batch_size, "epochs": 2, "term": terms.TERMS[term](), "loss": softmax}
    found = solve(make_client(count), make_hyper(mu=0.3), micro_batch=micro_batch, **options)
    wanted = solve(make_client(count), make_hyper(mu=0.3), **options)
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("batch", "wanted"), [(50, 5), (8, 4), (14, 7), (499, 499), (2, 2), (1, 1)])
def test_a_few_examples_are_near_to_five(batch, wanted):
    assert micro_batch_of(-1, batch) == wanted
    assert micro_batch_of(0, batch) == batch


def test_a_gradient_is_computed_for_so_many_examples_at_a_time():
    """On a CPU a few, on an accelerator all; all of them for a term that compares examples, or for none asked."""

    def seen(device, micro_batch, term="none"):
        sizes = set()

        def outputs(params, batch):
            sizes.add(len(batch["x"]))
            features = types.SimpleNamespace(levels=(batch["x"],), last=batch["x"])
            return network(params, batch)[0], features

        local = client_lib.first_order(softmax, KEEP, batch_size=8, micro_batch=micro_batch, term=terms.TERMS[term]())
        data, given = make_data(), (make_client(8), jax.random.key(0), make_hyper(), (), ())
        with backend.traced_for(device):
            jax.eval_shape(lambda params: local(outputs, params, data, *given), make_params())
        return sizes

    assert seen("cpu", 3) == {2} and seen("cpu", 0) == {8} and seen("gpu", 4) == {4}
    assert seen("cpu", -1) == {4} and seen("gpu", -1) == {8} and seen("cpu", -1, "rcl") == {8}
    with pytest.raises(ValueError, match=r"local\.micro_batch: .*set it to 0"):
        seen("cpu", 2, "rcl")


# A loss linear in a parameter per example: a step on a batch moves the batch's own entries by -lr / |batch|.
_VISITS = {
    "outputs": lambda params, batch: (params["theta"][batch["id"]], ()),
    "loss": lambda out, batch: out,
}


def _visits(count, seed=0, **options):
    params, data = {"theta": jnp.zeros(NUM_EXAMPLES)}, {"id": jnp.arange(NUM_EXAMPLES)}
    result = solve(make_client(count), make_hyper(lr=1.0), params, data, seed, **_VISITS, **options)
    return -np.asarray(result.delta["theta"])[INDICES]  # in the client's own order


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
def test_an_epoch_visits_each_example_once(x64, count):
    epochs, batch = 2, 3
    seen = _visits(count, batch_size=batch, epochs=epochs)
    np.testing.assert_array_equal(seen[count:], 0)
    # ceil(N / B) steps an epoch, each of total weight one; the last one over what is left.
    np.testing.assert_allclose(seen.sum(), epochs * -(-count // batch), rtol=1e-12)
    alone = _visits(count, batch_size=1, epochs=epochs)
    np.testing.assert_array_equal(alone[:count], epochs)
    np.testing.assert_array_equal(alone[count:], 0)
    one_epoch = np.sort(_visits(count, batch_size=batch, epochs=1)[:count])
    last = count % batch
    wanted = np.sort(np.r_[np.full(count - last, 1 / batch), np.full(last, 1 / max(last, 1))])
    np.testing.assert_allclose(one_epoch, wanted, rtol=1e-12)


def test_steps_replace_epochs(x64):
    seen = _visits(8, batch_size=3, epochs=9, steps=4)  # 3 + 3 + 2 and 3 of the next epoch
    np.testing.assert_allclose(seen.sum(), 4, rtol=1e-12)
    np.testing.assert_array_equal(_visits(0, batch_size=3, epochs=9, steps=4), 0)


def test_the_key_draws_the_order_anew_for_every_epoch(x64):
    seen = [_visits(8, seed, batch_size=3, epochs=1) for seed in range(4)]
    assert len({tuple(np.round(each, 6)) for each in seen}) > 1
    np.testing.assert_array_equal(_visits(8, 1, batch_size=3, epochs=1), seen[1])
    # The smaller last batch falls on other examples in the second epoch, for some key.
    twice = [_visits(8, seed, batch_size=3, epochs=2) for seed in range(4)]
    assert any(not np.allclose(two, 2 * one) for two, one in zip(twice, seen, strict=True))


def test_loss_is_the_mean_over_the_steps(x64):
    result = solve(make_client(8), make_hyper(lr=0.0), batch_size=0, epochs=3)
    np.testing.assert_allclose(
        result.loss, jnp.mean(squared(network(make_params(), make_data())[0], make_data())), rtol=1e-12
    )


def test_prox_pulls_towards_the_broadcast(x64):
    start = make_params()
    options = {"batch_size": 0, "epochs": 5, "term": terms.TERMS["prox"]()}
    travelled = []
    for mu in (0.0, 1.0, 5.0):
        result = solve(make_client(8), make_hyper(mu=mu), **options)
        pull = lambda g, p: jax.tree.map(lambda g, p, s: g + mu * (p - s), g, p, start)
        chex.assert_trees_all_close(result.delta, _loop(optax.sgd(0.1), 8, 5, pull)[0], rtol=1e-9, atol=1e-12)
        travelled.append(np.linalg.norm(ravel_pytree(result.delta)[0]))
    assert travelled == sorted(travelled, reverse=True)
    chex.assert_trees_all_close(
        _loop(optax.sgd(0.1), 8, 5)[0], solve(make_client(8), make_hyper(), **options).delta, rtol=1e-9
    )


_scaffold = functools.cache(terms.scaffold)


def test_scaffold_corrects_the_gradient_and_remembers_its_mean(x64):
    draw = np.random.default_rng(3)
    store, shared = (jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape)), make_params()) for _ in range(2))
    options = {"store": store, "shared": shared, "term": _scaffold(), "batch_size": 0, "epochs": 4}
    result = solve(make_client(5), make_hyper(mu=1.0), **options)
    correct = lambda gradient, params: jax.tree.map(lambda g, i, c: g - i + c, gradient, store, shared)
    delta, mean_gradient = _loop(optax.sgd(0.1), 5, 4, correct)
    chex.assert_trees_all_close(result.delta, delta, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(result.store, mean_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0, "epochs": 4, "optimizer": "adam", "momentum": 0.7},
        {"batch_size": 3, "epochs": 3},
    ],
    ids=["full_batch", "mini_batch"],
)
def test_an_empty_client_does_not_move(x64, options):
    result = solve(make_client(0), make_hyper(), **options)
    chex.assert_trees_all_equal(result.delta, jax.tree.map(jnp.zeros_like, make_params()))
    np.testing.assert_array_equal(result.loss, 0)


def test_wrong_choices_name_the_field():
    with pytest.raises(ValueError, match=r"local\.optimizer: unknown 'adm'; known: adam, kronecker, momentum, .*yogi"):
        client_lib.first_order(squared, KEEP, optimizer="adm")
