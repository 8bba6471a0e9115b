"""A last layer is what computes as one, whatever the shapes say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contracts import loss

from fipa_jax import curvature
from fipa_jax.curvature import solver_choice

N, F, K, RANK = 30, 6, 3, 4


class Network(nn.Module):
    """A body and a dense head, as flax has it; also compiled, and in another precision."""

    dtype: type = None

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(8, dtype=self.dtype)(x))
        return nn.Dense(K, name="head", dtype=self.dtype)(nn.tanh(x)), nn.tanh(x)


def problem():
    rng = np.random.default_rng(1)
    head = {"bias": rng.normal(size=K), "kernel": rng.normal(size=(F, K)) / 10}
    batch = {"x": rng.normal(size=(N, F)), "y": rng.normal(size=(N, K)), "keep": rng.random((N, K)) < 0.5}
    as_arrays = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float64))
    return as_arrays(head), as_arrays(batch)


def features(params, batch):
    return jnp.tanh(batch["x"])


def head(params, batch):
    return features(params, batch) @ params["kernel"] + params["bias"][None]


# What is a last layer on `features`, written in several ways.
LAYERS = {
    "plain": head,
    "compiled": jax.jit(head),
    "einsum": lambda p, b: jnp.einsum("bf,fk->bk", features(p, b), p["kernel"]) + p["bias"][None],
    "one by one": jax.vmap(lambda p, b: jnp.tanh(b["x"]) @ p["kernel"] + p["bias"], in_axes=(None, 0)),
    "kept from memory": jax.checkpoint(head),
    "with terms that cancel": lambda p, b: (
        jax.nn.relu(features(p, b) + 1) @ p["kernel"] - p["kernel"].sum(0)[None] + p["bias"][None]
    ),
}
# What has the shapes of one and is none.
OTHERS = {
    "temperature": lambda p, b: 10 * head(p, b),
    "temperature of each": lambda p, b: head(p, b) * jnp.arange(1.0, K + 1)[None],
    "cap": lambda p, b: 5 * jnp.tanh(head(p, b) / 5),
    "dropout": lambda p, b: jnp.where(b["keep"], head(p, b), 0),
    "normalised kernel": lambda p, b: features(p, b) @ (p["kernel"] / jnp.linalg.norm(p["kernel"], axis=0)[None]),
    "scaled kernel": lambda p, b: head(p | {"kernel": 3 * p["kernel"]}, b),
    "bias twice": lambda p, b: head(p, b) + p["bias"][None],
    "softmax": lambda p, b: jax.nn.softmax(head(p, b)),
    "squares": lambda p, b: features(p, b) @ p["kernel"] ** 2 + p["bias"][None],
    "compiled temperature": jax.jit(lambda p, b: 10 * head(p, b)),
    "loop": lambda p, b: jax.lax.fori_loop(0, 2, lambda _, total: total + head(p, b), 0 * head(p, b)),
}


def dense(outputs, params, batch):
    """H by its formula, the loss being half the squared error."""
    rows = jax.jacobian(lambda p: outputs(p, batch))(params)
    rows = np.concatenate([np.reshape(rows[name], (N * K, -1)) for name in ("bias", "kernel")], axis=1)
    return rows.T @ rows / N


def sketched(outputs, solver, params, batch):
    make = curvature.make_sketch(outputs, loss, rank=RANK, solver=solver, features=features, tolerance=1e-8)
    return jax.jit(make)(jax.random.key(0), params, batch)


BY_LANCZOS = {"compiled"}  # whose closed form takes longer to compile than one of its kind needs


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in BY_LANCZOS)) for name in (*LAYERS, *OTHERS)]
)
def test_auto_is_right_whatever_stands_behind_the_layer(name, x64):
    outputs, (params, batch) = (LAYERS | OTHERS)[name], problem()
    wanted = np.linalg.eigvalsh(dense(outputs, params, batch))[::-1][:RANK]
    found = sketched(outputs, "auto", params, batch)
    if found.report.flags["not_last_layer"]:  # which the program's text could not tell: nothing is claimed
        assert name == "other features" and not np.any(found.eigenvalues) and not found.report.converged
    else:
        np.testing.assert_allclose(found.eigenvalues, wanted, rtol=1e-6)


def seen_by_head(outputs, params, batch):
    """(whether the closed form is said not to hold, H by its products)."""

    @jax.jit
    def see(params, batch):
        matrix = curvature.make_ggn(outputs, loss, jacobian="head", features=features)(params, batch)
        return matrix.not_last_layer, matrix.product(jnp.eye(F * K + K))

    return see(params, batch)


@pytest.mark.parametrize("name", LAYERS)
def test_the_closed_form_holds_however_a_last_layer_is_written(name, x64):
    params, batch = problem()
    differs, matrix = seen_by_head(LAYERS[name], params, batch)
    assert not differs
    np.testing.assert_allclose(matrix, dense(LAYERS[name], params, batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("zero", [False, True])  # a head begins at zero, where its outputs tell nothing
def test_the_closed_form_says_where_it_does_not_hold(name, zero, x64):
    params, batch = problem()
    if zero and name not in ("normalised kernel", "squares", "softmax", "cap"):
        params = jax.tree.map(jnp.zeros_like, params)
    differs, matrix = seen_by_head(OTHERS[name], params, batch)
    assert differs and np.all(np.isnan(matrix))  # so that nobody takes them for products


def test_a_sketch_by_a_closed_form_that_does_not_hold_is_empty(x64):
    params, batch = problem()
    found = sketched(OTHERS["temperature"], "head", params, batch)
    assert found.report.flags["not_last_layer"] and not np.any(found.eigenvalues) and not found.report.converged


@pytest.mark.parametrize("compiled", [False, True])
def test_the_closed_form_is_chosen_for_networks_of_flax(compiled):
    network = Network()
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(N, F)), jnp.float32), "y": jnp.zeros([N, K])}
    params = network.init(jax.random.key(0), batch["x"])["params"]
    apply = jax.jit(network.apply) if compiled else network.apply

    def run(chosen, batch):
        return apply({"params": params | {"head": chosen}}, batch["x"])

    search = solver_choice.Search("auto", RANK, 10, 2, 1e-3)
    view = solver_choice.View(0, "matrix_free", lambda p, b: run(p, b)[1], 0)
    chosen, seen = solver_choice.resolve(lambda p, b: run(p, b)[0], params["head"], batch, search, view)
    assert (chosen.solver, seen.jacobian) == ("lanczos", "head")
