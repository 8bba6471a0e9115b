"""What a cohort says of its curvature: each client's sketch, and the rank that the cohort's gradients decide."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import curvature
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import plain, with_rank_by_gradient

CLIENTS, EXAMPLES, WIDTH, RANK = 3, 5, 4, 4
COUNTS = np.array([5, 3, 4])
MASK = np.arange(EXAMPLES)[None] < COUNTS[:, None]


def _model(params, batch):
    """(outputs [B, 1], features): least squares, whose curvature is that of the inputs."""
    features = types.SimpleNamespace(last=batch["x"])
    return (batch["x"] @ params["w"])[:, None], features


def _loss(out, batch):
    return (out[:, 0] - batch["y"]) ** 2 / 2


def _problem():
    draw = np.random.default_rng(0)
    batch = {"x": draw.normal(size=(CLIENTS, EXAMPLES, WIDTH)), "y": draw.normal(size=(CLIENTS, EXAMPLES))}
    return {"w": jnp.asarray(draw.normal(size=WIDTH))}, jax.tree.map(jnp.asarray, batch)


def _make(outputs, features):
    return curvature.make_sketch(outputs, _loss, features=features, rank=RANK, solver="rows")


def _found(sketcher, round, batch=None):
    """What the server has of the whole cohort."""
    params, own = _problem()
    batch = batch or own

    @jax.jit
    def both(batch):
        one = lambda key, batch, mask: sketcher.of_client(_model, params, key, batch, mask)
        keys = jax.random.split(jax.random.key(0), CLIENTS)
        return sketcher.of_cohort(jax.vmap(one)(keys, batch, jnp.asarray(MASK)), jnp.int32(round))

    return jax.tree.map(np.asarray, both(batch))


def _dense():
    """[(gradient, H)] of the clients."""
    params, batch = jax.tree.map(np.asarray, _problem())
    for x, y, mask in zip(batch["x"], batch["y"], MASK, strict=True):
        x, y = x[mask], y[mask]
        yield x.T @ (x @ params["w"] - y) / len(y), x.T @ x / len(y)


def test_a_plain_sketcher_gives_every_client_its_own_sketch(x64):
    sketches = _found(plain(_make), 0)
    for basis, eigenvalues, (_, dense) in zip(sketches.basis, sketches.eigenvalues, _dense(), strict=True):
        np.testing.assert_allclose(basis * eigenvalues @ basis.T, dense, atol=1e-12)
    assert not plain(_make).sends_gradient


def test_the_maker_gets_the_outputs_alone_and_the_inputs_of_the_last_layer():
    params, batch = _problem()
    one = jax.tree.map(lambda x: x[0], batch)

    def make(outputs, features):
        return lambda key, params, batch, mask: (outputs(params, batch), features(params, batch))

    out, phi = plain(make).of_client(_model, params, None, one, None)
    np.testing.assert_array_equal(out, _model(params, one)[0])
    np.testing.assert_array_equal(phi, one["x"])
    without = lambda params, batch: (_model(params, batch)[0], ())
    assert plain(make).of_client(without, params, None, one, None)[1] is None


@pytest.mark.parametrize(("round", "scale"), [(0, 0.5), (3, 1.0)])
def test_the_rank_follows_the_gradients_of_the_cohort(x64, round, scale):
    sketcher = with_rank_by_gradient(plain(_make), _loss, scale)
    whole, cut = _found(plain(_make), round), _found(sketcher, round)
    gradients = np.stack([gradient for gradient, _ in _dense()])
    total = np.linalg.norm(gradients.sum(axis=0))
    kept = []
    for m, own in enumerate(np.linalg.norm(gradients, axis=1)):
        values = whole.eigenvalues[m]
        keep = values >= values[0] * min(0.99, scale / ((round + 1) * (own + total)))
        np.testing.assert_array_equal(cut.eigenvalues[m], values * keep)
        np.testing.assert_array_equal(cut.basis[m], whole.basis[m] * keep)
        kept.append(keep.sum())
    assert 0 < sum(kept) < CLIENTS * RANK, "everything is kept: a test of nothing"
    assert sketcher.sends_gradient


def test_a_client_of_nan_does_not_undo_the_others(x64):
    _, batch = _problem()
    bad = batch | {"y": batch["y"].at[1].set(jnp.nan)}
    sketcher = with_rank_by_gradient(plain(_make), _loss, 1.0)
    found, whole = _found(sketcher, 1, bad), _found(plain(_make), 1)
    gradients = np.stack([gradient for gradient, _ in _dense()])[[0, 2]]
    total = np.linalg.norm(gradients.sum(axis=0))
    for m, own in zip((0, 2), np.linalg.norm(gradients, axis=1), strict=True):
        keep = sketch.above_gradient(sketch.Sketch(whole.eigenvalues[m], None), own, total, 2)
        np.testing.assert_array_equal(found.eigenvalues[m], whole.eigenvalues[m] * keep)
