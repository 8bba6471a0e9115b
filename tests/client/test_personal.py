"""A client's own model against dense ridge regression in float64, and the prior against dense curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import curvature, trees
from fipa_jax.client import personal
from fipa_jax.client.examples import Client

C, N, INPUTS, K = 3, 12, 4, 2
P = K + INPUTS * K
STRENGTH = 0.3
MOVES = np.random.default_rng(3).normal(size=[C, P])


def model(params, batch):
    return batch["x"] @ params["kernel"] + params["bias"][None]


def outputs(params, batch):
    return model(params, batch), ()


def loss(out, batch):
    return jnp.sum((out - batch["y"]) ** 2, axis=1) / 2


def jacobian(x):
    """[N K, P], the bias first, as the leaves are."""
    return np.concatenate([np.hstack([np.eye(K), np.kron(row[None], np.eye(K))]) for row in x])


@pytest.fixture(scope="module")
def setting():
    """(params, others' x [C, N, d], their sketches, one client's own x [4, d] and y [4, K])."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"bias": jnp.asarray(rng.normal(size=K)), "kernel": jnp.asarray(rng.normal(size=[INPUTS, K]))}
        x, y = rng.normal(size=[C, N, INPUTS]) + rng.normal(size=[C, 1, INPUTS]), rng.normal(size=[C, N, K])
        sketch = curvature.make_sketch(model, loss, rank=P, solver="rows")
        sketches = jax.jit(jax.vmap(lambda x, y: sketch(jax.random.key(0), params, {"x": x, "y": y})))(x, y)
    return params, x, sketches, rng.normal(size=[4, INPUTS]), rng.normal(size=[4, K])


def dense(prior):
    """M [P, P] = S (I + Q diag(g) Q^T) S."""
    scale, basis, values = map(np.asarray, prior[1:])
    middle = np.eye(P) + (basis * values) @ basis.T
    return scale[:, None] * middle * scale[None]


@jax.jit
def fitted(params, data, client, prior, strength):
    return personal.personalise(outputs, loss, params, data, client, prior, strength, steps=1)


curvature_of = jax.jit(personal.curvature, static_argnames="own")


def curvature_left(x, own):
    """[P, P] of one client: J^T J / N, and without what the first `own` parameters explain of it."""
    rows = jacobian(x)
    full = rows.T @ rows / len(x)
    if not own:
        return full
    return full - full[:, :own] @ np.linalg.solve(full[:own, :own], full[:own])


@pytest.mark.parametrize("own", ["", "bias"])
def test_the_prior_is_the_clients_mean_curvature(setting, own):
    params, x, sketches, *_ = setting
    weights = np.array([5, 0, 15])  # the second is left out
    with jax.enable_x64(True):
        prior = curvature_of(params, sketches, weights, damping=0.2, own=own)
        got = dense(prior)
    mean = sum(w * curvature_left(one, K if own else 0) for w, one in zip(weights / 20, x, strict=True))
    trace = sum(w * np.trace(curvature_left(one, 0)) for w, one in zip(weights / 20, x, strict=True))
    beta = np.full(P, 0.2 * trace / P)
    beta[: K if own else 0] *= personal.FREE
    np.testing.assert_allclose(got, mean + np.diag(beta), atol=1e-9 * trace)


@pytest.mark.parametrize("kind", ["curvature", "spread"])
def test_of_a_linear_model_it_is_ridge_regression_with_the_priors_precision(setting, kind):
    params, _, sketches, x, y = setting
    with jax.enable_x64(True):
        prior = {
            "curvature": lambda: curvature_of(params, sketches, np.full(C, N), damping=0.2, own=""),
            "spread": lambda: personal.spread(params, MOVES),
        }[kind]()
        precision, anchor = dense(prior), np.asarray(trees.ravel(params))
        data, client = (
            {"x": jnp.asarray(x), "y": jnp.asarray(y)},
            Client(jnp.arange(4), jnp.asarray(3)),
        )  # one is padding
        mine = fitted(params, data, client, prior, STRENGTH)  # the fourth example is padding
        got = np.asarray(trees.ravel(mine))
    rows, left = jacobian(x[:3]), y[:3].reshape(-1)
    change = np.linalg.solve(rows.T @ rows + STRENGTH * precision, rows.T @ (left - rows @ anchor))
    np.testing.assert_allclose(got, anchor + change, atol=1e-8)


def test_the_spread_of_others_models_is_the_inverse_of_their_covariance(setting):
    with jax.enable_x64(True):
        got = dense(jax.jit(personal.spread)(setting[0], MOVES))
        one, other = MOVES[0], np.linalg.svd(MOVES)[2][-1]  # no client has moved along the other
        away = [
            personal.quadratic(personal.spread(setting[0], MOVES), trees.ravel(setting[0]) + d) for d in (one, other)
        ]
    covariance = MOVES.T @ MOVES / (np.sum(MOVES**2) / P)
    expected = np.linalg.inv(covariance + personal.NOT_SEEN * np.eye(P))
    np.testing.assert_allclose(got, expected, atol=1e-9 / personal.NOT_SEEN)
    np.testing.assert_allclose(away, MOVES[0] @ expected @ MOVES[0], rtol=1e-6)


def test_with_the_strength_of_all_examples_it_is_the_fit_of_all_data(setting):
    """The others' optimum as anchor, their curvature and their number: the posterior of all examples together."""
    _, others, sketches, x, y = setting
    targets = np.random.default_rng(1).normal(size=[C, N, K])
    rows, left = jacobian(others.reshape(-1, INPUTS)), targets.reshape(-1)
    best = np.linalg.lstsq(rows, left, rcond=None)[0]
    with jax.enable_x64(True):
        params = {"bias": jnp.asarray(best[:K]), "kernel": jnp.asarray(best[K:].reshape(INPUTS, K))}
        prior = curvature_of(params, sketches, np.full(C, N), damping=1e-12, own="")
        data, client = {"x": jnp.asarray(x), "y": jnp.asarray(y)}, Client(jnp.arange(4), jnp.asarray(4))
        mine = fitted(params, data, client, prior, float(C * N))
        got = np.asarray(trees.ravel(mine))
    both = np.vstack([rows, jacobian(x)]), np.concatenate([left, y.reshape(-1)])
    np.testing.assert_allclose(got, np.linalg.lstsq(*both, rcond=None)[0], atol=1e-6)


@pytest.mark.slow
def test_the_objective_of_a_network_falls_to_a_stationary_point():
    """Classes, whose loss is not quadratic: the gradient of the objective vanishes."""
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=[6, INPUTS]), rng.integers(0, 2, 6)

    def network(params, batch):
        return jnp.tanh(batch["x"] @ params["kernel"]) @ params["top"], ()

    def entropy(out, batch):
        return jax.nn.logsumexp(out, axis=1) - jnp.take_along_axis(out, batch["label"][:, None], axis=1)[:, 0]

    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(rng.normal(size=[INPUTS, 3])), "top": jnp.asarray(rng.normal(size=[3, 2]))}
        data, prior = {"x": jnp.asarray(x), "label": jnp.asarray(label)}, personal.proximity(params)
        client = Client(jnp.arange(6), jnp.asarray(6))
        mine = jax.jit(lambda p: personal.personalise(network, entropy, p, data, client, prior, STRENGTH, steps=50))(
            params
        )

        def objective(theta):
            away = personal.quadratic(prior, trees.ravel(theta))
            return jnp.sum(entropy(network(theta, data)[0], data)) + STRENGTH / 2 * away

        before, after = (trees.ravel(jax.grad(objective)(theta)) for theta in (params, mine))
    assert np.linalg.norm(after) < 1e-4 * np.linalg.norm(before)


def test_a_pattern_that_no_parameter_has_is_refused(setting):
    with jax.enable_x64(True), pytest.raises(ValueError, match="no parameter path matches 'nonesuch'"):
        personal.proximity(setting[0], own="nonesuch")
