"""Derivatives of FIPA's step against finite differences of it in float64, in all that it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import aggregate
from fipa_jax.aggregate import merged_curvature as merge
from fipa_jax.curvature.sketch import Sketch

CLIENTS, SIZE, RANK = 4, 21, 2
SENT = ("delta", "eigenvalues", "basis", "num_examples")
PROBE = np.random.default_rng(5).normal(size=SIZE)
FIRST = {"damped": {"damping": 0.1}, "tikhonov": {"damping": 0.1}, "pinv": {"rcond": 0.3}}
BOUNDS = {"max_step": 5.0, "max_divergence": 0.0}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """One whole block of F, and a ragged last one."""
    monkeypatch.setattr(merge, "BLOCK", 1)


def _generic(seed=0):
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(CLIENTS, SIZE, RANK)))[0]
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, size=(CLIENTS, RANK)), axis=1)
    return [draw.normal(size=(CLIENTS, SIZE)), eigenvalues, basis, np.array([5.0, 1, 3, 7])]


def _equal():
    """Clients of one curvature: F has null vectors, and H multiple eigenvalues."""
    delta, eigenvalues, basis, counts = _generic()
    return [delta, np.full_like(eigenvalues, 2.0), np.repeat(basis[:1], CLIENTS, axis=0), counts]


def _apart():
    """One eigenvalue, eight times, which a damping in its units would follow to the side."""
    delta, eigenvalues, _, _ = _generic()
    columns = np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, CLIENTS * RANK)))[0]
    return [delta, np.full_like(eigenvalues, 2.0), columns.reshape(SIZE, CLIENTS, RANK).swapaxes(0, 1), np.ones(4)]


def _gaps():
    """A pair that is zero, a client that is absent, and one that has not moved."""
    delta, eigenvalues, basis, counts = _generic()
    eigenvalues[0, 1], basis[0, :, 1] = 0, 0
    delta[1], counts[1], basis[1], delta[2] = 0, 0, np.nan, 0
    return [delta, eigenvalues, basis, counts]


CLIENTS_OF = {"generic": _generic, "equal": _equal, "apart": _apart, "gaps": _gaps}


def _probed(sent, numbers, form, relative):
    """A number that depends on all of the step."""
    delta, eigenvalues, basis, counts = sent
    hyper = {name: numbers[name] for name in FIRST[form]}
    bounds = aggregate.Limits(explosion=0.0, **{name: numbers[name] for name in BOUNDS})
    hyper |= {} if form == "pinv" else {"relative": relative}
    step, _ = aggregate.fipa_step(delta, Sketch(eigenvalues, basis), counts, form=form, limits=bounds, **hyper)
    return jnp.vdot(step, jnp.asarray(PROBE, step.dtype))


@functools.cache
def _compiled(form, relative):
    run = functools.partial(_probed, form=form, relative=relative)
    return jax.jit(run), jax.jit(jax.grad(run, argnums=(0, 1)))


def _as(dtype, tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64), dtype), tree)


def _differences(run, sent, numbers):
    """{argument: (direction, the central difference along it)}, in float64."""
    draw, found = np.random.default_rng(7), {}
    present = sent[3] > 0
    for place, name in enumerate(SENT):
        direction = draw.normal(size=sent[place].shape) * np.expand_dims(present, tuple(range(1, sent[place].ndim)))
        if name == "eigenvalues":
            direction *= sent[1] > 0  # a pair that is zero is none: at the edge of what is allowed
        ends = [
            run([x + h * direction if i == place else x for i, x in enumerate(sent)], numbers) for h in (1e-6, -1e-6)
        ]
        found[name] = direction, float(ends[0] - ends[1]) / 2e-6
    for name, value in numbers.items():
        if value:
            ends = [run(sent, numbers | {name: value * (1 + h)}) for h in (1e-5, -1e-5)]
            found[name] = 1.0, float(ends[0] - ends[1]) / (2e-5 * value)
    return found


def _check(form, relative, kind, wide, changed):
    sent, numbers = CLIENTS_OF[kind](), FIRST[form] | BOUNDS | changed
    sent = [np.asarray(x, np.float32).astype(float) for x in sent]
    with jax.enable_x64(wide):
        dtype = jnp.result_type(float)
        value, gradient = _compiled(form, relative)
        found = jax.device_get(gradient(_as(dtype, sent), _as(dtype, numbers)))
    with jax.enable_x64(True):
        wanted = _differences(lambda *given: value(*_as(jnp.float64, given)), sent, numbers)
    found = dict(zip(SENT, found[0], strict=True)) | found[1]
    scale = max(abs(difference) for _, difference in wanted.values())
    for name, (direction, difference) in wanted.items():
        assert np.all(np.isfinite(found[name])), name
        np.testing.assert_allclose(np.vdot(direction, found[name]), difference, rtol=1e-4, atol=1e-6 * scale)
    assert abs(wanted["delta"][1]) > 1e-3


CASES = [
    pytest.param("generic", {}, marks=pytest.mark.slow),
    pytest.param("generic", {"max_step": 0.3}, marks=pytest.mark.slow),
    ("equal", {"max_divergence": 0.01}),
    pytest.param("apart", {}, marks=pytest.mark.slow),
    pytest.param("gaps", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "changed"), CASES)
def test_gradients_in_a_process_of_float32_equal_differences(kind, changed):
    _check("damped", False, kind, False, changed)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize(("form", "relative"), [("damped", True), ("tikhonov", True), ("pinv", True)])
@pytest.mark.parametrize(("kind", "changed"), CASES)
def test_gradients_of_every_form_equal_differences(form, relative, kind, changed, wide):
    if kind == "apart" and form != "pinv":
        pytest.skip("the largest of equal eigenvalues, in whose units the damping is, has a kink")
    _check(form, relative, kind, wide, changed)


@pytest.mark.slow
def test_forward_mode_and_a_vmap_over_damping_equal_the_gradient():
    """At the defaults, where an infinite bound once made all of them NaN."""
    sent = _as(jnp.float32, _generic())

    def probed(damping):
        step, _ = aggregate.fipa_step(sent[0], Sketch(*sent[1:3]), sent[3], damping=damping)
        return jnp.vdot(step, jnp.asarray(PROBE, step.dtype))

    swept = jnp.asarray([1e-3, 1e-2], jnp.float32)
    reverse = jax.jit(jax.vmap(jax.grad(probed)))(swept)
    forward = jax.jit(jax.vmap(jax.jacfwd(probed)))(swept)
    assert np.all(np.isfinite(reverse)) and np.all(np.abs(reverse) > 1e-3)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)
    with pytest.raises(TypeError, match="once, not twice"):
        jax.eval_shape(jax.grad(jax.grad(probed)), swept[0])


@pytest.mark.parametrize("kind", ["prior", pytest.param("targets", marks=pytest.mark.slow)])
def test_what_is_remembered_of_eigenvectors_is_refused_and_the_step_is_not(kind):
    rule, (delta, *sketch, counts) = aggregate.fipa(past=aggregate.PastRounds(kind, rank=3, length=2)), _generic()
    params = jnp.zeros(SIZE)
    delta, counts, sketch = _as(jnp.float32, (delta, counts, sketch))

    def after(eigenvalues, rounds):
        state, total = rule.init(params), 0
        for _ in range(rounds):
            received, info = aggregate.receive(aggregate.Uploads(delta, counts, Sketch(eigenvalues, sketch[1])), params)
            step, state, *_ = aggregate.step_of(rule, received, state, params, info)
            total = total + jnp.sum(step)
        return total

    jax.eval_shape(jax.grad(functools.partial(after, rounds=1)), sketch[0])
    with pytest.raises(TypeError, match=r"aggregator\.past: .*stop_gradient"):
        jax.eval_shape(jax.grad(functools.partial(after, rounds=2)), sketch[0])
