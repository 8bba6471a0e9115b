"""A client's own model against dense ridge regression in float64, and the prior against dense curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import curvature, trees
from fipa_jax.client import personal
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper

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
        prior, anchor = personal.spread(setting[0], MOVES), trees.ravel(setting[0])
        one, other = MOVES[0], np.linalg.svd(MOVES)[2][-1]  # no client has moved along the other
        away = [float(personal.quadratic(prior, anchor + move)) for move in (one, other)]
    covariance = MOVES.T @ MOVES / (np.sum(MOVES**2) / P)
    expected = np.linalg.inv(covariance + personal.NOT_SEEN * np.eye(P))
    np.testing.assert_allclose(got, expected, atol=1e-9 / personal.NOT_SEEN)
    np.testing.assert_allclose(away, [move @ expected @ move for move in (one, other)], rtol=1e-6)


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


@pytest.mark.parametrize("own", ["", "top"])
def test_what_a_client_without_examples_says_is_not_heard(own):
    """Of curvature diag(1, 1, 0) tr H / P is 2/3, so that beyond beta there are 15 beta."""
    params = {"k": jnp.ones((3, 1)), "top": jnp.ones(0)}
    values, sound = jnp.ones((2, 2)), jnp.eye(3)[:, :2]
    for lost in (jnp.full((3, 2), jnp.nan), jnp.full((3, 2), jnp.inf), sound):
        sketches = curvature.Sketch(values.at[0].set(lost[0]), jnp.stack([lost, sound]))
        for function in (personal.curvature, curvature_of):
            prior = function(params, sketches, jnp.array([0, 5]), own=own)
            np.testing.assert_allclose(prior.curvature, [15, 15, 0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(prior.scale**2, 0.1 * 2 / 3, rtol=1e-5)
    with pytest.raises(ValueError, match="num_examples: needed 0 or more"):
        personal.curvature(params, sketches, np.array([np.nan, 5]))


@pytest.mark.parametrize("own", ["", "bias"])
@pytest.mark.parametrize("nothing", ["clients", "curvature"])
def test_where_nothing_is_known_the_prior_is_that_of_proximity(setting, own, nothing):
    params, _, sketches, x, y = jax.tree.map(np.float32, setting)
    counts = np.full(C, 0 if nothing == "clients" else 5)
    if nothing == "curvature":
        sketches = sketches._replace(eigenvalues=np.zeros_like(sketches.eigenvalues))
    prior, plain = curvature_of(params, sketches, counts, own=own), personal.proximity(params, own)
    np.testing.assert_allclose(dense(prior), dense(plain), rtol=1e-5, atol=1e-12)
    data, client = {"x": jnp.asarray(x), "y": jnp.asarray(y)}, Client(jnp.arange(4), jnp.asarray(4))
    got, wanted = (trees.ravel(fitted(params, data, client, one, STRENGTH)) for one in (prior, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_spread_of_none_or_of_many_parameters_along_one_way_is_finite():
    params = {"k": jnp.ones(100_000)}
    still = personal.spread(params, jnp.zeros([1, 100_000]))
    away = personal.quadratic(still, jnp.ones(100_000).at[0].set(3.0))
    np.testing.assert_allclose(away, 4 / personal.NOT_SEEN, rtol=1e-5)
    way = jnp.ones(100_000) / 100_000**0.5
    prior = personal.spread(params, way[None])
    assert np.all(prior.curvature > -1)
    eps = jnp.finfo(jnp.float32).eps
    np.testing.assert_allclose(personal._from_round(prior, way) @ way, (personal.NOT_SEEN / eps) ** 0.5, rtol=1e-3)


@pytest.mark.parametrize(("indices", "own"), [([0, 4], 2), ([-1, 0], 1), ([0, 1], 3), ([0, 1], -1)])
def test_a_client_whose_examples_are_not_in_the_data_is_refused(setting, indices, own):
    params, _, _, x, y = jax.tree.map(np.float32, setting)
    client = Client(jnp.asarray(indices), jnp.asarray(own))
    with pytest.raises(ValueError, match=r"client\.(indices|num_examples): needed"):
        personal.personalise(outputs, loss, params, {"x": x[:4], "y": y[:4]}, client, personal.proximity(params), 1)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, np.float32(0), jnp.float32(-1), jnp.float32(np.nan)])
def test_a_strength_or_damping_that_is_not_positive_is_refused(setting, value):
    params, _, sketches, x, y = jax.tree.map(np.float32, setting)
    data, client = {"x": jnp.asarray(x), "y": jnp.asarray(y)}, Client(jnp.arange(4), jnp.asarray(4))
    with pytest.raises(ValueError, match="damping: needed a finite number above 0, got"):
        personal.curvature(params, sketches, np.ones(C), damping=value)
    prior = personal.proximity(params)
    with pytest.raises(ValueError, match="strength: needed a finite number above 0, got"):
        personal.personalise(outputs, loss, params, data, client, prior, value)
    hyper = Hyper(jnp.float32(1), jnp.float32(0), jnp.float32(value))
    with pytest.raises(ValueError, match=r"hyper\.mu: needed a finite number above 0, got"):
        personal.fitter(loss)(outputs, params, data, client, jax.random.key(0), hyper, (), prior)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["proximity", "curvature", "spread"])
def test_half_precision_is_fitted_in_float32_and_rounded_once(setting, kind, dtype):
    params, _, sketches, x, y = jax.tree.map(np.float32, setting)
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    priors = {
        "proximity": lambda params: personal.proximity(params, "bias"),
        "curvature": lambda params: personal.curvature(params, sketches, np.full(C, N), own="bias"),
        "spread": lambda params: personal.spread(params, jnp.asarray(MOVES, jnp.result_type(params["bias"]))),
    }
    data, client = {"x": jnp.asarray(x), "y": jnp.asarray(y)}, Client(jnp.arange(4), jnp.asarray(4))

    def fit(params):
        prior = priors[kind](params)
        assert {part.dtype for part in prior} == {jnp.dtype(jnp.float32)}
        return fitted(params, data, client, prior, STRENGTH)

    got, wanted = fit(narrow), fit(trees.widened(narrow))
    for part, value in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert part.dtype == dtype
        np.testing.assert_allclose(np.float32(part), value, rtol=float(jnp.finfo(dtype).eps), atol=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        personal.proximity,
        lambda params: personal.curvature(params, curvature.Sketch(np.ones((1, 1)), np.ones((1, 3, 1))), np.ones(1)),
        lambda params: personal.spread(params, np.ones((1, 3))),
    ],
    ids=["proximity", "curvature", "spread"],
)
def test_parameters_that_are_no_floating_point_numbers_are_refused(make):
    with pytest.raises(ValueError, match="params: needed floating-point arrays, got int"):
        make({"bias": jnp.arange(3)})


def test_a_pattern_that_no_parameter_has_is_refused(setting):
    with jax.enable_x64(True), pytest.raises(ValueError, match="no parameter path matches 'nonesuch'"):
        personal.proximity(setting[0], own="nonesuch")
