"""IVON beside its equations in NumPy, beliefs merged beside dense algebra, and FedEve's filter beside its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.centralised import problem

from fipa_jax import aggregate
from fipa_jax.aggregate.screening import Received
from fipa_jax.aggregate.server_optimizers import fedeve
from fipa_jax.client import ivon as lib
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper
from fipa_jax.curvature.sketch import Diagonal


def test_steps_are_those_of_the_equations(x64):
    """Shen et al. 2024, algorithm 1, on a loss with gradient `slopes(theta)`."""
    size, decay, b1, b2, lr = 50.0, 0.1, 0.9, 0.95, 0.3
    rule = lib.scale_by_ivon(size, decay, 0.7, b1, b2)
    slopes = lambda theta: jnp.array([1.0, 3.0]) * theta - 1
    mean = jnp.array([0.3, -0.4])
    state, m, g, h = rule.init(mean), np.asarray(mean), np.zeros(2), np.full(2, 0.7)
    for t in range(1, 4):
        theta, state = lib.draw(jax.random.key(t), mean, state)
        sigma = 1 / np.sqrt(size * (h + decay))
        epsilon = (np.asarray(theta) - m) / sigma
        np.testing.assert_allclose(epsilon, jax.random.normal(jax.random.key(t), (2,)), rtol=1e-9)
        seen = np.asarray(slopes(theta))
        direction, state = rule.update(slopes(theta), state, mean)
        mean = mean - lr * direction
        curved = seen * epsilon / sigma
        g = b1 * g + (1 - b1) * seen
        h = b2 * h + (1 - b2) * curved + (1 - b2) ** 2 * (h - curved) ** 2 / (2 * (h + decay))
        m = m - lr * (g / (1 - b1**t) + decay * m) / (h + decay)
        np.testing.assert_allclose(mean, m, rtol=1e-12)
    np.testing.assert_allclose(state.curvature, h, rtol=1e-12)


def _received(deltas, precisions, counts, **late):
    deltas, precisions = jnp.asarray(deltas), Diagonal(jnp.asarray(precisions))
    return Received(jnp.asarray(counts) > 0, jnp.asarray(counts), {"w": deltas}, precisions, **late)


def test_the_sum_of_natural_parameters(x64):
    draw, counts = np.random.default_rng(0), np.array([3, 0, 5])
    theta, deltas, own = draw.normal(size=4), draw.normal(size=(3, 4)), draw.uniform(1, 2, size=(3, 4))
    rule, weights = aggregate.posterior(), counts / counts.sum()
    deltas[1], params = 0, {"w": jnp.asarray(theta)}
    step, state, _ = rule.apply(_received(deltas, own, counts), rule.init(params), params)
    precision = weights @ own
    np.testing.assert_allclose(state.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(theta + step["w"], (weights[:, None] * own * (theta + deltas)).sum(0) / precision)
    nobody, same, _ = rule.apply(_received(0 * deltas, own, 0 * counts), state, params)
    assert not jnp.any(nobody["w"]) and jnp.array_equal(same.precision, state.precision)


def test_a_late_belief_is_where_its_client_came_to_and_counts_for_less(x64):
    """The product of the densities N(mean_m, 1 / s_m)^(w_m (1 + age)^-s), by its largest value on a grid."""
    draw, counts, ages = np.random.default_rng(0), np.array([3, 2, 5]), np.array([0, 9, 2])
    theta, deltas, own = draw.normal(size=1), draw.normal(size=(3, 1)), draw.uniform(1, 2, size=(3, 1))
    moved = draw.normal(size=(3, 1)) * (ages > 0)[:, None]
    rule = aggregate.posterior(late=aggregate.LateUpdates(staleness=0.7))
    params, fresh = {"w": jnp.asarray(theta)}, counts * (1.0 + ages) ** -0.7
    sent = _received(deltas, own, counts, age=jnp.asarray(ages), moved={"w": jnp.asarray(moved)})
    step, state, _ = rule.apply(sent, rule.init(params), params)
    np.testing.assert_allclose(state.precision, fresh @ own / fresh.sum(), rtol=1e-12)
    np.testing.assert_allclose(state.size, fresh.sum(), rtol=1e-12)
    grid = np.linspace(-10, 10, 200_001)
    unlikely = sum(w * s * (grid - (theta - m + d)) ** 2 for w, s, m, d in zip(fresh, own, moved, deltas, strict=True))
    np.testing.assert_allclose(theta + step["w"], grid[np.argmin(unlikely)], atol=1e-4)
    admm = aggregate.posterior(posterior=aggregate.PosteriorOptions("admm"))
    with pytest.raises(ValueError, match="'admm' needs clients that are not late"):
        admm.apply(sent, admm.init(params), params)


@pytest.mark.parametrize("form", ["sum", "admm"])
def test_a_parameter_of_which_nobody_knows_anything_takes_the_mean_update(x64, form):
    """As the limit of equal precisions that fall to 0."""
    theta, counts = np.array([3.0, -2.0]), np.array([1, 3])
    deltas, own = np.array([[0.1, 0.2], [0.5, -0.4]]), np.array([[1.0, 0.0], [2.0, 0.0]])
    rule = aggregate.posterior(posterior=aggregate.PosteriorOptions(form, prior=0.0, start=0.0))
    params = {"w": jnp.asarray(theta)}
    steps = [
        rule.apply(_received(deltas, known, counts), rule.init(params), params)[0]["w"]
        for known in (own, own + np.array([0, 1e-9]))
    ]
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-6)
    np.testing.assert_allclose(steps[0][1], counts @ deltas[:, 1] / counts.sum(), rtol=1e-12)


def test_admm_on_quadratic_losses_is_the_posterior_in_one_round_and_stays_there(x64):
    """Clients that solve their subproblem exactly: precision and mean by its stationary point, see `ivon`."""
    draw, counts, prior = np.random.default_rng(1), np.array([2.0, 6.0]), 0.2
    weights = counts / counts.sum()
    curvature, pull = draw.uniform(0.5, 2, size=(2, 3)), draw.normal(size=(2, 3))  # loss_m = c theta^2 / 2 - p theta
    rule = aggregate.posterior(posterior=aggregate.PosteriorOptions("admm", prior=prior, start=0.0))
    params, stores = {"w": jnp.zeros(3)}, [lib.duals().init({"w": jnp.zeros(3)})] * 2
    state = rule.init(params)
    for _ in range(3):
        told, results = rule.announce(state)["posterior"], []
        for c, p, store in zip(curvature, pull, stores, strict=True):
            begun = lib.begun(lib.scale_by_ivon(1.0).init(params), _hyper(told), params, store, jnp.array(4.0))
            s = (c + begun.offset["w"]) / told.rho
            results.append((s, (p - begun.linear["w"]) / (c + begun.offset["w"])))
        own = np.stack([s for s, _ in results])
        deltas = np.stack([mean - params["w"] for _, mean in results])
        stores = [
            lib.moved(store, params, {"w": jnp.asarray(d)}, Diagonal(jnp.asarray(s)), told)
            for store, d, s in zip(stores, deltas, own, strict=True)
        ]
        step, state, _ = rule.apply(_received(deltas, own, counts), state, params)
        params = {"w": params["w"] + step["w"]}
        np.testing.assert_allclose(state.precision, prior + weights @ curvature, rtol=1e-12)
        np.testing.assert_allclose(params["w"], weights @ pull / (prior + weights @ curvature), rtol=1e-10)


def _hyper(told, lr=0.1):
    array = jnp.asarray(lr)
    return Hyper(array, array, array, posterior=lib.Posterior(*told))


@pytest.mark.parametrize("form", ["admm", pytest.param("sum", marks=pytest.mark.slow)])
def test_a_client_lowers_its_loss_and_says_how_sure_it_is(x64, form):
    data, clients = problem()
    outputs = lambda params, batch: (batch["x"] @ params["w"], ())
    loss = lambda out, batch: jnp.sum((out - batch["y"]) ** 2, axis=1) / 2
    rule = aggregate.posterior(posterior=aggregate.PosteriorOptions(form, start=0.5))
    params, client = {"w": jnp.full((2, 1), 2.0)}, Client(clients.indices[0], clients.num_examples[0])
    told = rule.announce(rule.init(params))["posterior"]
    term = lib.duals() if form == "admm" else terms.none()
    store = term.init(params)
    solve = jax.jit(lib.ivon(loss, lambda key, batch: batch, batch_size=3, steps=40, term=term), static_argnums=0)
    result = solve(outputs, params, data, client, jax.random.key(0), _hyper(told), store, ())
    x, y = (np.asarray(data[name][clients.indices[0]])[: int(client.num_examples)] for name in ("x", "y"))
    of = lambda w: np.mean((x @ np.asarray(w) - y) ** 2) / 2
    assert of(params["w"] + result.delta["w"]) < of(params["w"])
    assert jnp.all(result.message.values > 0) and result.message.values.shape == (2,)
    assert jax.tree.structure(result.store) == jax.tree.structure(store)


def test_fedeve_is_a_kalman_filter(x64):
    rule, draw = fedeve(), np.random.default_rng(0)
    params = {"w": jnp.zeros(3)}
    state, theta, momentum, variance = rule.init(params), np.zeros(3), np.zeros(3), 0.0
    held = np.zeros(3)  # theta + momentum
    for _ in range(3):
        deltas, present = draw.normal(size=(4, 3)) + 1, np.array([True, True, False, True])
        step = deltas[present].mean(0)
        update, state = rule.update(
            {"w": jnp.asarray(-step)}, state, params, deltas={"w": jnp.asarray(deltas)}, present=jnp.asarray(present)
        )
        held = held - np.asarray(update["w"])
        before = variance + np.mean(step**2) / 3
        noise = np.mean(((deltas[present] - step) ** 2).sum(0)) / 9
        gain = before / (before + noise)
        variance, momentum = (1 - gain) * before, momentum + gain * (step - momentum)
        theta = theta + momentum
        np.testing.assert_allclose(held, theta + momentum, rtol=1e-12)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-12)
