"""GGN products against the dense matrix 1/N sum_n J_n^T L_n J_n, with L_n in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax import curvature

NUM_EXAMPLES, WIDTH, HIDDEN, NUM_OUTPUTS = 7, 3, 4, 3
MASK = np.array([True, False, True, True, True, False, True])  # padding anywhere, not at the end alone
BOUNDARY_WEIGHT = 7.0


def _network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def _two_fields(params, batch):
    out = _network(params, batch)
    return {"boundary": out[:, :2], "interior": out[:, 2]}


def _two_fields_loss(out, batch):
    return (BOUNDARY_WEIGHT * jnp.sum(out["boundary"] ** 2, axis=1) + out["interior"] ** 2) / 2


def _softmax_hessian(out):
    p = np.exp(out) / np.exp(out).sum()
    return np.diag(p) - np.outer(p, p)


def _bernoulli_hessian(out):
    p = 1 / (1 + np.exp(-out))
    return np.diag(p * (1 - p))


# name: (outputs, loss, L of one example's outputs [K])
LOSSES = {
    "half_squared": (
        _network,
        lambda out, batch: jnp.sum((out - batch["target"]) ** 2, axis=1) / 2,
        lambda out: np.eye(NUM_OUTPUTS),
    ),
    "softmax": (
        _network,
        lambda out, batch: optax.softmax_cross_entropy_with_integer_labels(out, batch["label"]),
        _softmax_hessian,
    ),
    "bernoulli": (
        _network,
        lambda out, batch: jnp.sum(optax.sigmoid_binary_cross_entropy(out, batch["bit"]), axis=1),
        _bernoulli_hessian,
    ),
    "weighted_residuals_in_a_tree": (
        _two_fields,
        _two_fields_loss,
        lambda out: np.diag([BOUNDARY_WEIGHT, BOUNDARY_WEIGHT, 1.0]),
    ),
}


def _problem():
    draw = np.random.default_rng(0)
    shapes = {"w1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, NUM_OUTPUTS), "b2": (NUM_OUTPUTS,)}
    params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}
    batch = {
        "x": draw.normal(size=(NUM_EXAMPLES, WIDTH)),
        "target": draw.normal(size=(NUM_EXAMPLES, NUM_OUTPUTS)),
        "label": draw.integers(NUM_OUTPUTS, size=NUM_EXAMPLES),
        "bit": draw.integers(2, size=(NUM_EXAMPLES, NUM_OUTPUTS)).astype(float),
    }
    return params, {name: jnp.asarray(field) for name, field in batch.items()}


@functools.cache
def _outputs_and_jacobians(outputs):
    """Outputs [N, K] and Jacobians [N, K, P] of all examples."""
    params, batch = _problem()
    flat, unravel = ravel_pytree(params)

    def of(example):
        function = lambda theta: ravel_pytree(outputs(unravel(theta), jax.tree.map(lambda x: x[None], example)))[0]
        return function(flat), jax.jacobian(function)(flat)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(of))(batch))


def _dense(outputs, hessian, mask):
    out, jacobian = _outputs_and_jacobians(outputs)
    return sum(jacobian[n].T @ hessian(out[n]) @ jacobian[n] for n in np.flatnonzero(mask)) / mask.sum()


def _as_matrix(outputs, loss, params, batch, mask, **options):
    """The products with all unit vectors, i.e. the matrix."""
    ggn = curvature.make_ggn(outputs, loss, **options)
    size = ravel_pytree(params)[0].size
    return np.asarray(jax.jit(lambda *args: ggn(*args)(jnp.eye(size)))(params, batch, mask))


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("jacobian", curvature.JACOBIANS)
@pytest.mark.parametrize("name", LOSSES)
def test_products_equal_the_dense_matrix(x64, name, jacobian, micro_batch):
    outputs, loss, hessian = LOSSES[name]
    params, batch = _problem()
    matrix = _as_matrix(outputs, loss, params, batch, jnp.asarray(MASK), jacobian=jacobian, micro_batch=micro_batch)
    np.testing.assert_allclose(matrix, _dense(outputs, hessian, MASK), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("jacobian", curvature.JACOBIANS)
def test_padding_changes_nothing_and_an_empty_client_has_no_curvature(x64, jacobian):
    outputs, loss, _ = LOSSES["softmax"]
    params, batch = _problem()
    garbage = batch | {"x": jnp.where(jnp.asarray(MASK)[:, None], batch["x"], 1e6)}
    ggn = curvature.make_ggn(outputs, loss, jacobian=jacobian, micro_batch=3)
    size = ravel_pytree(params)[0].size
    matrix = jax.jit(lambda batch, mask: ggn(params, batch, mask)(jnp.eye(size)))
    np.testing.assert_array_equal(matrix(garbage, jnp.asarray(MASK)), matrix(batch, jnp.asarray(MASK)))
    np.testing.assert_array_equal(matrix(garbage, jnp.zeros(NUM_EXAMPLES, bool)), np.zeros([size, size]))


def test_without_a_mask_all_examples_count(x64):
    outputs, loss, hessian = LOSSES["softmax"]
    params, batch = _problem()
    everyone = np.ones(NUM_EXAMPLES, bool)
    matrix = _as_matrix(outputs, loss, params, batch, None, micro_batch=3)
    np.testing.assert_allclose(matrix, _dense(outputs, hessian, everyone), rtol=1e-10, atol=1e-12)


def test_unknown_jacobian_names_the_field():
    with pytest.raises(ValueError, match=r"sketch\.jacobian.*'dense'.*matrix_free, rows"):
        curvature.make_ggn(_network, _two_fields_loss, jacobian="dense")
