"""Wrappers of a sketcher: the curvature of views, and random numbers that all clients share."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import curvature

EXAMPLES, WIDTH = 6, 3


def _model(params, batch):
    """(outputs [B, 1], features): least squares, whose curvature is that of the inputs."""
    return (batch["x"] @ params["w"])[:, None], types.SimpleNamespace(last=batch["x"])


def _loss(out, batch):
    return (out[:, 0] - batch["y"]) ** 2 / 2


def _augment(key, batch):
    return batch | {"x": batch["x"] * jax.random.rademacher(key, [EXAMPLES, 1], batch["x"].dtype) + 1}


def test_the_sketch_is_of_views():
    """Of the inputs as the augmentation shows them, with whatever the rule asks along handed on."""
    asked = []

    def of_client(outputs, params, key, batch, mask, *more):
        asked.extend(more)
        seen.append(batch)
        return compiled(params, key, batch, mask)

    seen = []
    bare = curvature.plain(lambda outputs, _: curvature.make_sketch(outputs, _loss, rank=WIDTH, solver="rows"))
    compiled = jax.jit(lambda *given: bare.of_client(_model, *given))
    draw = np.random.default_rng(0)
    batch = {"x": jnp.asarray(draw.normal(size=(EXAMPLES, WIDTH))), "y": jnp.zeros(EXAMPLES)}
    params, mask = {"w": jnp.ones(WIDTH)}, jnp.arange(EXAMPLES) < 4
    wrapped = curvature.on_views(bare._replace(of_client=of_client), _augment)
    found = wrapped.of_client(_model, params, jax.random.key(1), batch, mask, "basis")
    inputs = np.asarray(seen[0]["x"], float)
    assert np.allclose(np.abs(inputs - 1), np.abs(np.asarray(batch["x"])), atol=1e-6), "these are the views"
    assert not np.allclose(inputs, batch["x"])
    dense = inputs[:4].T @ inputs[:4] / 4
    values, basis = np.asarray(found.eigenvalues), np.asarray(found.basis)
    own = basis * values @ basis.T
    np.testing.assert_allclose(own, dense, rtol=1e-5, atol=1e-5)
    assert asked == ["basis"]


def test_all_clients_share_their_random_numbers():
    plain = curvature.plain(None)
    ids = jnp.asarray([4, 0, 2])
    assert plain.drawn_by(ids).tolist() == ids.tolist()
    assert curvature.from_one_start(plain).drawn_by(ids).tolist() == [0, 0, 0]
