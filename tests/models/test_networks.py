"""The networks and their convolution, against XLA's own convolution and pooling."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from fipa_jax import backend, trees
from fipa_jax.models import convolution
from fipa_jax.models import networks as models
from fipa_jax.models.convolution import LAYOUT, _conv_by_matmul, conv, max_pool


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=2e-5)


def _config(name, **options):
    fields = {"widths": (5, 4), "activation": "tanh", "head_width": 0, "compute_dtype": ""}
    return ml_collections.ConfigDict({"name": name, **fields, **options})


@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [
        ((3, 3), (1, 1), "VALID"),
        ((3, 3), (1, 1), "SAME"),
        ((3, 3), (2, 2), "SAME"),
        ((1, 1), (2, 2), "SAME"),
        ((5, 2), (1, 3), "VALID"),
        ((2, 3), (2, 1), ((1, 0), (2, 1))),
    ],
)
@pytest.mark.parametrize("at_a_time", [3, 5])
def test_conv_equals_xlas_in_value_tangents_and_cotangents(kernel, strides, padding, at_a_time, monkeypatch):
    """Also where the images go through the cache in threes and a remainder, and for a product that is transposed."""
    x, dx = _normal(0, 5, 9, 8, 3), _normal(1, 5, 9, 8, 3)
    w, dw = _normal(2, *kernel, 3, 4), _normal(3, *kernel, 3, 4)

    xlas = lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT)
    patches = np.prod(jax.eval_shape(xlas, x, w).shape[1:3]) * w[..., 0].size
    monkeypatch.setattr(convolution, "CACHE", at_a_time * patches * x.dtype.itemsize)

    def derivatives(function):
        y, push = jax.linearize(function, x, w)
        pulled = jax.linear_transpose(push, x, w)(jnp.cos(y))
        return *jax.jvp(function, (x, w), (dx, dw)), jax.vjp(function, x, w)[1](jnp.sin(y)), push(dx, dw), pulled

    ours = jax.jit(lambda: derivatives(lambda x, w: _conv_by_matmul(x, w, strides, padding, None)))()
    _close(ours, derivatives(xlas))


def test_conv_under_vmap_over_kernels_is_a_loop_over_kernels():
    x, w = _normal(0, 5, 2, 6, 6, 3), _normal(1, 5, 3, 3, 3, 4)
    gradient = jax.grad(lambda w, x: jnp.sum(conv(x, w, (1, 1), "SAME") ** 2))
    _close(jax.vmap(gradient)(w, x), jnp.stack([gradient(w[c], x[c]) for c in range(5)]))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_conv_inside_flax_equals_flaxs_own(device):
    x = _normal(0, 2, 7, 7, 3)
    own, ours = nn.Conv(4, (3, 3), 2), nn.Conv(4, (3, 3), 2, conv_general_dilated=conv)
    variables = own.init(jax.random.key(0), x)
    with backend.traced_for(device):
        _close(ours.apply(variables, x), own.apply(variables, x))


@pytest.mark.parametrize(
    "option",
    [
        {"feature_group_count": 3},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (1, 2)},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ],
)
def test_conv_refuses_what_it_does_not_do(option):
    with pytest.raises(ValueError, match="conv needs"):
        conv(_normal(0, 1, 6, 6, 3), _normal(1, 3, 3, 3, 4), (1, 1), "SAME", **option)


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_equals_the_window_reduction_in_value_tangents_and_cotangents(size):
    x, dx = _normal(0, 2, size, size, 3), _normal(1, 2, size, size, 3)

    def derivatives(pool):
        y, tangent = jax.jvp(pool, (x,), (dx,))
        return y, tangent, jax.vjp(pool, x)[1](jnp.sin(y))

    _close(derivatives(max_pool), derivatives(lambda x: nn.max_pool(x, (2, 2), (2, 2))))


def test_max_pool_gives_a_tie_to_the_first_maximum():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


@pytest.mark.parametrize(("name", "count"), [("cnn_6k", 5_956), ("cnn_23k", 23_711), ("cnn_200k", 197_984)])
def test_cnns_have_the_stated_size(name, count):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(models.build(_config(name), 10).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def _resnet_size(widths, blocks, num_outputs, hidden):
    """Parameters of the published network: 3x3 convolutions without bias, each with a scale and a shift a channel."""
    layer = lambda kernel, before, after: kernel**2 * before * after + 2 * after
    total, before = layer(3, 3, widths[0]), widths[0]
    for width in widths:
        for _ in range(blocks):
            total += layer(3, before, width) + layer(3, width, width)
            total += layer(1, before, width) if before != width else 0
            before = width
    sizes = [before, *([hidden] if hidden else []), num_outputs]
    return total + sum(a * b + b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("hidden", [0, 720])
@pytest.mark.parametrize(
    ("name", "widths", "blocks"), [("resnet20", (16, 32, 64), 3), ("resnet18", (64, 128, 256, 512), 2)]
)
def test_resnets_have_the_published_size(name, widths, blocks, hidden):
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    module = models.build(_config(name, head_width=hidden), 200)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(params) == _resnet_size(widths, blocks, 200, hidden)
    if name == "resnet18":  # the paper fine-tunes 4.4 % of the parameters
        share = sum(size(params[layer]) for layer in module.head_layers) / size(params)
        assert round(100 * share, 1) == (4.4 if hidden else 0.9)


@pytest.mark.parametrize(
    ("name", "shape", "levels", "options"),
    [
        ("mlp", (3, 2, 4), [5, 4], {}),
        ("cnn_6k", (3, 12, 12, 1), [12, 8], {}),
        pytest.param("resnet20", (3, 8, 8, 1), [16, 16, 32, 64], {}, marks=pytest.mark.slow),
        pytest.param("resnet20", (3, 8, 8, 1), [16, 16, 32, 64], {"head_width": 6}, marks=pytest.mark.slow),
    ],
)
def test_the_head_takes_the_body_to_the_outputs(name, shape, levels, options):
    module = models.build(_config(name, **options), 7)
    x = _normal(0, *shape)
    # Away from the start, where a residual block is its shortcut.
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * _normal(2, *leaf.shape), module.init(jax.random.key(1), x))
    outputs, features = jax.jit(module.apply)(variables, x)
    chex.assert_shape(outputs, (3, 7))
    chex.assert_shape(features.levels, [(3, width) for width in levels])
    found, of_head = models.apply_head(module.head_layers, variables["params"], features.body)
    _close(found, outputs)
    _close(of_head.last, features.last)
    final = variables["params"][module.head_layers[-1]]
    _close(outputs, features.last @ final["kernel"] + jnp.reshape(final.get("bias", jnp.zeros(7)), (1, 7)))
    if name == "resnet20":
        assert all(np.any(level < 0) for level in features.levels), "levels come before their ReLU"


@pytest.mark.slow
def test_a_resnet_starts_as_its_shortcuts():
    """The kernels on the residual branches of an identity shortcut do not matter yet; those of the shortcuts do."""
    module, x = models.build(_config("resnet20"), 7), _normal(0, 3, 8, 8, 3)
    params = module.init(jax.random.key(1), x)["params"]
    apply = jax.jit(lambda params: module.apply({"params": params}, x)[0])

    def doubled(pattern):
        change = lambda path, leaf: leaf + 1 if re.search(pattern, path) else leaf
        return trees.replace(params, {path: change(path, leaf) for path, leaf in trees.paths(params).items()})

    _close(apply(doubled("conv[12]/Conv_0/kernel")), apply(params))
    for matters in ("shortcut/Conv_0/kernel", "conv2/GroupNorm_0/scale"):
        assert np.max(np.abs(apply(doubled(matters)) - apply(params))) > 0.1


def test_without_hidden_layers_the_body_is_the_flattened_input():
    x = _normal(0, 3, 2, 2)
    _, features = models.MLP((), 7).init_with_output(jax.random.key(1), x)[0]
    chex.assert_trees_all_equal(features, models.Features((), x.reshape(3, 4), x.reshape(3, 4)))


@pytest.mark.slow
def test_a_resnet_computes_in_bfloat16_and_keeps_its_parameters():
    x = _normal(0, 3, 8, 8, 3)
    full = models.build(_config("resnet20"), 7)
    params = full.init(jax.random.key(1), x)
    half = models.build(_config("resnet20", compute_dtype="bfloat16"), 7)
    assert jax.tree.map(jnp.shape, half.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, params)
    wanted, found = (jax.jit(module.apply)(params, x) for module in (full, half))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, found))} == {jnp.dtype("float32")}
    error = jnp.linalg.norm(found[0] - wanted[0]) / jnp.linalg.norm(wanted[0])
    # Twenty layers, each rounding to 8 bits; equal results would mean that nothing was computed in bfloat16.
    assert 1e-5 < error < 20 * 2.0**-8


@pytest.mark.slow
def test_a_gauss_newton_product_and_the_jacobians_of_examples_agree():
    module = models.build(_config("cnn_6k"), 3)
    x = _normal(0, 4, 12, 12, 2)
    params = module.init(jax.random.key(1), x)
    tangent = jax.tree.map(jnp.sin, params)

    @jax.jit
    def gauss_newton(params, tangent):
        outputs, jvp = jax.linearize(lambda p: module.apply(p, x)[0], params)
        return outputs, jax.linear_transpose(jvp, params)(jvp(tangent))[0]

    outputs, product = gauss_newton(params, tangent)

    def outputs_of_one(params, x):
        return module.apply(params, x[None])[0][0]

    jacobians = jax.jit(jax.vmap(jax.jacrev(outputs_of_one), (None, 0)))(params, x)  # leaves [B, K, ...]
    dense = jnp.concatenate([leaf.reshape(outputs.size, -1) for leaf in jax.tree.leaves(jacobians)], axis=1)
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tangent)])
    expected = dense.T @ (dense @ flat)
    actual = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(product)])
    np.testing.assert_allclose(actual, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"config\.model\.name: unknown 'cnn'; known: cnn_200k, .*mlp"):
        models.build(_config("cnn"), 10)
    with pytest.raises(ValueError, match=r"config\.model\.activation: unknown 'tan'; known: gelu, "):
        models.build(_config("mlp", activation="tan"), 10)
