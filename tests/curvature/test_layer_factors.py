"""Kronecker factors of layers beside dense float64 sums over examples and positions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fipa_jax.curvature import products
from fipa_jax.curvature.layer_factors import layers_of, make_layer_factors, matrix_of, packed, unpacked
from fipa_jax.models.layers import tapped


class Net(nn.Module):
    """A convolution with stride and padding, a layer that is used twice, a normalisation and a head."""

    @nn.compact
    def __call__(self, x):
        kind = {"param_dtype": x.dtype}
        x = nn.tanh(nn.Conv(3, (2, 3), (2, 1), padding=((1, 0), (1, 1)), **kind)(x))
        x = nn.LayerNorm(**kind)(x.mean((1, 2)))
        twice = nn.Dense(3, name="twice", **kind)
        return nn.Dense(4, use_bias=False, **kind)(twice(nn.tanh(twice(x))))


def _setting():
    draw = np.random.default_rng(0)
    batch = {"x": jnp.asarray(draw.normal(size=(5, 4, 3, 2))), "y": jnp.asarray([0, 1, 2, 3, 0])}
    params = Net().init(jax.random.key(0), batch["x"])["params"]
    return params, batch


def _outputs(params, batch):
    return Net().apply({"params": params}, batch["x"])


def _loss(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


@functools.cache
def _factors(**options):
    return jax.jit(make_layer_factors(tapped, _outputs, _loss, **options))


def _as_matrices(halves):
    return {path: np.asarray(unpacked(half)) for path, half in halves.items()}


def _convolved(params, batch):
    """(patches [B, 4, ...], by hand; the derivative of the outputs [B, K] in the convolution's values)."""
    x = np.pad(np.asarray(batch["x"]), ((0, 0), (1, 0), (1, 1), (0, 0)))
    rows = [x[:, 2 * i : 2 * i + 2, j : j + 3].reshape(len(x), -1) for i in range(2) for j in range(3)]
    rows = np.stack(rows, axis=1)
    rest = {"params": params}

    def after(values):  # [2, 3, 3] -> [K]
        hidden = nn.LayerNorm(param_dtype=float).apply({"params": params["LayerNorm_0"]}, jnp.tanh(values).mean((0, 1)))
        twice = params["twice"]
        for last in (False, True):
            hidden = hidden @ twice["kernel"] + twice["bias"]
            hidden = hidden if last else jnp.tanh(hidden)
        return hidden @ rest["params"]["Dense_0"]["kernel"]

    kernel, bias = np.asarray(params["Conv_0"]["kernel"]), np.asarray(params["Conv_0"]["bias"])
    values = (rows @ kernel.reshape(-1, 3) + bias).reshape(-1, 2, 3, 3)
    slopes = np.asarray(jax.vmap(jax.jacobian(after))(jnp.asarray(values)))
    return np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2), slopes.reshape(len(x), 4, 6, 3)


@pytest.mark.parametrize("sharing", ["expand", pytest.param("reduce", marks=pytest.mark.slow)])
def test_a_convolutions_factors_are_the_sums_over_its_patches(x64, sharing):
    params, batch = _setting()
    rows, slopes = _convolved(params, batch)
    share = np.asarray(jax.nn.softmax(_outputs(params, batch)))
    hessian = np.stack([np.diag(p) - np.outer(p, p) for p in share])
    if sharing == "reduce":
        rows, slopes = rows.mean(1, keepdims=True), slopes.sum(2, keepdims=True)
    inputs = np.einsum("nta,ntb->ab", rows, rows) / (rows.shape[0] * rows.shape[1])
    outputs = np.einsum("nktg,nkl,nlth->gh", slopes, hessian, slopes) / len(rows)
    found = _factors(sharing=sharing)(jax.random.key(1), params, batch)
    np.testing.assert_allclose(_as_matrices(found.inputs)["Conv_0/kernel"], inputs, atol=1e-12)
    np.testing.assert_allclose(_as_matrices(found.outputs)["Conv_0/kernel"], outputs, atol=1e-12)
    assert set(found.inputs) == {"Conv_0/kernel", "twice/kernel", "Dense_0/kernel"}  # of the normalisation nothing


@pytest.mark.slow
def test_padding_and_micro_batches_change_nothing_and_samples_little(x64):
    params, batch = _setting()
    whole = _factors()(jax.random.key(1), params, batch)
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x[:2], 0)]), batch)
    parts = _factors(micro_batch=2)(jax.random.key(1), params, more, jnp.arange(7) < 5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-12), parts, whole)
    drawn = _factors(samples=4000)(jax.random.key(1), params, batch)
    for path, half in whole.outputs.items():
        assert jnp.max(jnp.abs(drawn.outputs[path] - half)) < 0.1 * jnp.max(jnp.abs(half))
    alone = _factors(inputs_alone=True)(jax.random.key(1), params, batch)
    jax.tree.map(np.testing.assert_array_equal, alone.inputs, whole.inputs)
    assert alone.outputs == {}
    nobody = _factors(micro_batch=2)(jax.random.key(1), params, more, jnp.zeros(7, bool))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nobody))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 6])
def test_a_layer_alone_has_the_gauss_newton_matrix(x64, number):
    """Of one example whatever the loss; of more where the loss's Hessian is the same for all."""
    draw, layer = np.random.default_rng(1), nn.Dense(3, param_dtype=float)
    batch = {"x": jnp.asarray(draw.normal(size=(number, 2))), "y": jnp.asarray(draw.integers(0, 3, number))}
    params = layer.init(jax.random.key(0), batch["x"])["params"]
    outputs = lambda params, batch: layer.apply({"params": params}, batch["x"])
    loss = _loss if number == 1 else (lambda out, batch: jnp.sum(out**2, axis=1) / 2)
    found = make_layer_factors(tapped, outputs, loss)(jax.random.key(1), params, batch)
    place = {"bias": jnp.arange(3), "kernel": 3 + jnp.arange(6).reshape(2, 3)}  # of each parameter in the vector
    order = np.asarray(matrix_of(layers_of(params)["kernel"], place)).reshape(-1)
    dense = np.asarray(products.make_ggn(outputs, loss)(params, batch).product(jnp.eye(9)))[np.ix_(order, order)]
    factors = [_as_matrices(halves)["kernel"] for halves in found]
    np.testing.assert_allclose(np.kron(*factors), dense, atol=1e-14)


@pytest.mark.slow
def test_positions_of_a_sequence_are_taken_one_by_one(x64):
    """[B, T, K] of a layer alone: G is the mean over examples of the sum over positions; coupled ones are refused."""
    draw, layer = np.random.default_rng(2), nn.Dense(3, use_bias=False, param_dtype=float)
    batch = {"x": jnp.asarray(draw.normal(size=(4, 5, 2)))}
    params = layer.init(jax.random.key(0), batch["x"])["params"]
    outputs = lambda params, batch: layer.apply({"params": params}, batch["x"])
    each = lambda out, batch: jnp.mean(jax.nn.logsumexp(out, axis=-1), axis=1)
    found = jax.jit(make_layer_factors(tapped, outputs, each))(jax.random.key(1), params, batch)
    share = np.asarray(jax.nn.softmax(outputs(params, batch)))
    hessian = np.einsum("ntk,kl->ntkl", share, np.eye(3)) - np.einsum("ntk,ntl->ntkl", share, share)
    np.testing.assert_allclose(_as_matrices(found.outputs)["kernel"], hessian.mean((0, 1)), atol=1e-12)
    coupled = lambda out, batch: jnp.sum(jnp.mean(out, axis=1) ** 2, axis=1)
    broken = make_layer_factors(tapped, outputs, coupled)(jax.random.key(1), params, batch)
    assert jnp.all(jnp.isnan(broken.outputs["kernel"])) and jnp.all(jnp.isfinite(broken.inputs["kernel"]))


def test_half_of_a_symmetric_matrix_is_enough():
    for size in (1, 29):
        root = np.random.default_rng(size).normal(size=(size, size)).astype(np.float32)
        matrix = root + root.T
        np.testing.assert_array_equal(unpacked(packed(jnp.asarray(matrix))), matrix)


def test_a_model_without_layers_is_refused():
    outputs = lambda params, batch: batch["x"] @ params["weight"]
    with pytest.raises(ValueError, match="no dense layer or convolution of flax was found"):
        make_layer_factors(tapped, outputs, _loss)(
            jax.random.key(0), {"weight": jnp.ones([2, 3])}, {"x": jnp.ones([4, 2]), "y": jnp.zeros(4, int)}
        )
