"""What messages give away, on small networks in float64, where the attack is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.curvature import make_gradient, make_sketch
from fipa_jax.privacy import leak

INPUTS, WIDTH, CLASSES, EXAMPLES = 5, 6, 3, 4


def outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]


def loss(out, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(out), batch["label"][:, None], axis=1)[:, 0]


@pytest.fixture
def client(x64):
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape))
    params = {
        "first": {"kernel": array(INPUTS, WIDTH), "bias": array(WIDTH)},
        "last": {"kernel": array(WIDTH, CLASSES), "bias": array(CLASSES)},
    }
    batch = {"x": array(2 * EXAMPLES, INPUTS), "label": jnp.arange(2 * EXAMPLES) % CLASSES}
    own, others = (
        {name: field[rows] for name, field in batch.items()} for rows in (slice(EXAMPLES), slice(EXAMPLES, None))
    )
    pairs = make_sketch(outputs, loss, rank=EXAMPLES * (CLASSES - 1), solver="rows")(jax.random.key(0), params, own)
    return params, own, others, pairs, -np.asarray(make_gradient(outputs, loss)(params, own))


def test_eigenpairs_give_inputs_and_labels_back_which_the_update_does_not(client):
    params, own, _, pairs, update = client
    first, last = leak.dense_layers(params)
    truth = leak.layer_inputs(outputs, params, own, first)
    np.testing.assert_allclose(truth, own["x"], rtol=1e-9)
    parts = leak.blocks(first, params, np.asarray(pairs.basis).T)
    candidates = leak.rebuilt_by_curvature(parts, np.asarray(pairs.eigenvalues), bias=True)
    found = leak.compared(truth, candidates, bias=True)
    assert found.share == 1 and found.error < 1e-6
    mixtures = leak.rebuilt_by_update(leak.blocks(first, params, update[None])[0], bias=True)
    assert leak.compared(truth, mixtures, bias=True).share < 1
    # Labels, by both.
    x = jnp.asarray(candidates[found.nearest])
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    phi = np.concatenate([np.asarray(hidden), np.ones([EXAMPLES, 1])], axis=1)
    np.testing.assert_array_equal(leak.labels_by_both(phi, leak.blocks(last, params, update[None])[0]), own["label"])


def test_one_example_is_in_the_update_already(client):
    params, own, *_ = client
    one = {name: field[:1] for name, field in own.items()}
    first, _ = leak.dense_layers(params)
    update = -np.asarray(make_gradient(outputs, loss)(params, one))
    rebuilt = leak.rebuilt_by_update(leak.blocks(first, params, update[None])[0], bias=True)
    np.testing.assert_allclose(rebuilt, np.repeat(one["x"], WIDTH, axis=0), rtol=1e-9)
    bias = leak.blocks(leak.dense_layers(params)[1], params, update[None])[0][-1:]
    assert leak.label_by_update(bias) == one["label"][0] and leak.label_by_update(bias[:, :1]) == (bias[0, 0] > 0)


def test_members_are_told_by_the_share_that_is_captured(client):
    params, own, others, pairs, update = client
    members, rest = (leak.captured_share(outputs, params, one, pairs.basis) for one in (own, others))
    # A rank of N (K - 1) holds all of H, and of each Jacobian all but the direction in which all logits move alike.
    assert leak.area_under_curve(members, rest) == 1
    assert np.all((members >= 0) & (members <= 1 + 1e-12))
    cosines = leak.alignment(outputs, loss, params, own, update)
    slopes = [
        -np.asarray(make_gradient(outputs, loss)(params, {name: field[n : n + 1] for name, field in own.items()}))
        for n in range(EXAMPLES)
    ]
    wanted = [slope @ update / np.linalg.norm(slope) / np.linalg.norm(update) for slope in slopes]
    np.testing.assert_allclose(cosines, wanted, rtol=1e-9)


def test_a_layer_without_a_bias_gives_directions(client):
    params, own, _, pairs, _ = client
    first, _ = leak.dense_layers(params)
    bare = first._replace(bias=None)
    truth = leak.layer_inputs(outputs, params, own, bare)
    np.testing.assert_allclose(np.linalg.norm(truth, axis=1), 1)
    candidates = leak.rebuilt_by_curvature(
        leak.blocks(bare, params, np.asarray(pairs.basis).T), np.asarray(pairs.eigenvalues), bias=False
    )
    assert leak.compared(truth, candidates, bias=False).share == 1


def test_a_layer_that_sees_an_example_twice_is_refused(client):
    params, own, *_ = client
    first, _ = leak.dense_layers(params)

    def twice(params, batch):
        return outputs(params, batch) + outputs(params, {**batch, "x": batch["x"][:, ::-1]})

    with pytest.raises(ValueError, match="more than once"):
        leak.layer_inputs(twice, params, own, first)


def test_figures_of_the_report():
    assert leak.area_under_curve(np.array([1.0, 2]), np.array([0.0, 1])) == pytest.approx(0.875)
    assert leak.exposure(10, columns=50, inputs=30) == pytest.approx(10 / 31)
    assert leak.compared(np.ones([2, 3]), np.zeros([0, 3]), bias=True).share == 0
