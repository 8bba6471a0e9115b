"""Derivatives of a sketch's eigenvalues against finite differences in float64; of the rest they are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fipa_jax.curvature.sketch import keeping_energy, make_sketch

EXAMPLES, WIDTH, CLASSES, RANK = 12, 4, 3, 4
WEIGHTS = np.array([1, -0.5, 0.3, 0.7])
MASK = np.arange(EXAMPLES) < 8
LABELS = np.random.default_rng(1).integers(0, CLASSES, EXAMPLES)


def _outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["w"] + params["b"][None])


def _layer(params, batch):
    return batch["x"] @ params["w"] + params["b"][None]


def _loss(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def _given(dtype):
    draw = np.random.default_rng(0)
    params = {"w": draw.normal(size=(WIDTH, CLASSES)), "b": draw.normal(size=CLASSES)}
    return jax.tree.map(lambda x: jnp.asarray(np.float32(x), dtype), (params, draw.normal(size=(EXAMPLES, WIDTH))))


def _sketch(solver, jacobian, params, x, **options):
    outputs = _layer if solver == "head" else _outputs
    options = {"features": lambda params, batch: batch["x"], "rank": RANK, "power_steps": 8} | options
    sketch = make_sketch(outputs, _loss, solver=solver, jacobian=jacobian, micro_batch=5, **options)
    return sketch(jax.random.key(0), params, {"x": x, "y": jnp.asarray(LABELS)}, jnp.asarray(MASK))


def _value(solver, jacobian, params, x):
    return jnp.vdot(jnp.asarray(WEIGHTS, x.dtype), _sketch(solver, jacobian, params, x).eigenvalues)


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize(
    ("solver", "jacobian"),
    [("subspace", "matrix_free"), *(pytest.param(way, way, marks=pytest.mark.slow) for way in ("rows", "head"))],
)
def test_eigenvalues_change_as_differences_say(solver, jacobian, wide):
    """With a mask and micro-batches, whose loop has no reverse mode of its own."""
    run = functools.partial(_value, solver, jacobian)
    with jax.enable_x64(wide):
        given = _given(jnp.result_type(float))
        gradient = jax.device_get(jax.jit(jax.grad(run, argnums=(0, 1)))(*given))
    with jax.enable_x64(True):
        given, draw, compiled = _given(jnp.float64), np.random.default_rng(2), jax.jit(run)
        direction = jax.tree.map(lambda x: draw.normal(size=x.shape), given)
        ends = [compiled(*jax.tree.map(lambda x, d, h=h: x + h * d, given, direction)) for h in (1e-5, -1e-5)]
        wanted = float(ends[0] - ends[1]) / 2e-5
    found = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert abs(wanted) > 0.01
    assert np.all(gradient[1][~MASK] == 0), "examples that are not there"


@pytest.mark.slow
def test_forward_mode_is_the_same_derivative():
    params, x = _given(jnp.float32)
    run = lambda x: _value("subspace", "matrix_free", params, x)
    forward, reverse = jax.jit(lambda x: (jax.jvp(run, (x,), (jnp.ones_like(x),))[1], jnp.sum(jax.grad(run)(x))))(x)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)


@pytest.mark.parametrize(
    "of", [lambda sketch: sketch.basis, lambda sketch: sketch.report.trace], ids=["basis", "report"]
)
def test_all_but_the_eigenvalues_is_refused_in_words(of):
    params, x = _given(jnp.float32)
    run = lambda x: jnp.sum(of(_sketch("subspace", "matrix_free", params, x)))
    for derivative in (jax.grad(run), lambda x: jax.jvp(run, (x,), (x,))[1]):
        with pytest.raises(TypeError, match=r"only the eigenvalues have a derivative.*stop_gradient"):
            jax.jit(derivative).lower(x)
    jax.eval_shape(jax.grad(lambda x: run(jax.lax.stop_gradient(x))), x)


def test_what_would_be_wrong_is_refused_in_words():
    params, x = _given(jnp.float32)
    truncated = lambda x: jnp.sum(_sketch("rows", "rows", params, x, loss_rank=1).eigenvalues)
    with pytest.raises(TypeError, match="with loss_rank nothing has a derivative"):
        jax.eval_shape(jax.grad(truncated), x)
    twice = jax.grad(lambda x: jnp.sum(jax.grad(functools.partial(_value, "rows", "rows", params))(x)))
    with pytest.raises(TypeError, match="once, not twice"):
        jax.eval_shape(twice, x)


def test_a_sketch_cut_by_its_energy_passes_the_derivative_on():
    params, x = _given(jnp.float32)
    batch = {"x": x, "y": jnp.asarray(LABELS)}
    sketch = keeping_energy(make_sketch(_outputs, _loss, rank=RANK), 0.5)
    jax.eval_shape(jax.grad(lambda p: jnp.sum(sketch(jax.random.key(0), p, batch).eigenvalues)), params)
