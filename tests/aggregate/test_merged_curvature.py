"""The merged factor F against its dense form, streamed over several blocks, in every way of factorising it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import apply, with_hyper

from fipa_jax import aggregate
from fipa_jax.aggregate import merged_curvature as merge
from fipa_jax.aggregate.fisher_informed import FORMS
from fipa_jax.curvature.sketch import Sketch

CLIENTS, RANK, SIZE = 4, 2, 43  # D = 8
WIDTH = CLIENTS * RANK
EPS = float(np.finfo(np.float32).eps)
RCOND = DAMPING = 1e-3
each_method = pytest.mark.parametrize("method", merge.METHODS)
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two D = 16 rows a block: two whole blocks of F, and a ragged last one of 11 rows."""
    monkeypatch.setattr(merge, "BLOCK", 1)


def _clients(size=SIZE, angle=None, seed=0):
    """(weights [C], deltas [C, P], eigenvalues [C, R], basis [C, P, R]); subspaces `angle` apart, or at random."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(CLIENTS, size, RANK)))[0]
    if angle is not None:  # subspaces that meet in the first two axes and are `angle` off them
        axes = np.linalg.qr(draw.normal(size=(size, RANK * (1 + CLIENTS))))[0]
        each = np.split(axes[:, RANK:], CLIENTS, axis=1)
        basis = np.stack([np.cos(angle) * axes[:, :RANK] + np.sin(angle) * own for own in each])
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, size=(CLIENTS, RANK)), axis=1)
    counts = np.array([5, 1, 3, 7])
    return counts / counts.sum(), draw.normal(size=(CLIENTS, size)), eigenvalues, basis


def _factor(weights, eigenvalues, basis):
    """F [P, D], of the clients that count."""
    present = weights > 0
    scale = np.sqrt(weights[present][:, None] * eigenvalues[present])
    return np.concatenate(list(basis[present] * scale[:, None, :]), axis=1)


def _part(weights, targets, eigenvalues, basis):
    return merge.Part(weights, Sketch(eigenvalues, basis), targets)


SHIFTED = merge.Filter(0.5, 0.0)


@functools.cache
def _compiled(method):
    def run(*clients):
        merged = merge.merge([_part(*clients)], method)
        return merged.spectrum, merge.solve(merged, SHIFTED)

    return jax.jit(run)


@each_dtype
@pytest.mark.parametrize("size", [SIZE, 5], ids=["tall", "wide"])
@each_method
def test_spectrum_and_solution_equal_the_dense_ones(x64, method, size, dtype):
    """With a client of weight 0 that holds NaN, and a pair of zeros."""
    weights, targets, eigenvalues, basis = _clients(size)
    weights, eigenvalues[0, 1], basis[0, :, 1] = weights * [1, 0, 1, 1], 0, 0
    weights /= weights.sum()
    eigenvalues[1], basis[1] = np.nan, np.nan
    given = [np.asarray(field, dtype) for field in (weights, targets, eigenvalues, basis)]
    spectrum, solution = (np.asarray(x) for x in _compiled(method)(*map(jnp.asarray, given)))
    weights, targets, eigenvalues, basis = (field.astype(float) for field in given)

    factor = _factor(weights, eigenvalues, basis)
    values = np.r_[np.linalg.svd(factor)[1] ** 2, np.zeros(WIDTH)][:WIDTH]
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(spectrum, values, rtol=0, atol=2 * WIDTH * eps * values[0])
    assert np.all(np.diff(spectrum) <= 0) and np.all(spectrum >= 0)
    parts = np.split(factor, len(factor.T) // RANK, axis=1)
    projected = np.concatenate([part.T @ target for part, target in zip(parts, targets[weights > 0], strict=True)])
    wanted = factor @ np.linalg.solve(factor.T @ factor + 0.5 * np.eye(len(projected)), projected)
    np.testing.assert_allclose(solution, wanted, rtol=0, atol=50 * eps * np.linalg.norm(targets))
    assert spectrum.dtype == solution.dtype == dtype


def _apply(form, method, clients, damping=DAMPING, store=np.float32):
    """(step [P], info) by the compiled rule in float32, the bases stored as another dtype."""
    uploads, params = _uploads(clients, store)
    rule, compiled = _rule(form, method)
    state = rule.init(params) if form == "pinv" else with_hyper(rule.init(params), damping=damping)
    step, _, info = compiled(uploads, state, params)
    return np.asarray(step), jax.tree.map(np.asarray, info)


def _uploads(clients, store=np.float32):
    weights, deltas, eigenvalues, basis = (jnp.asarray(np.asarray(field, np.float32)) for field in clients)
    return aggregate.Uploads(deltas, weights, Sketch(eigenvalues, basis.astype(store))), jnp.zeros(SIZE)


@functools.cache
def _rule(form, method):
    rule = aggregate.fipa(form, rcond=RCOND, limits=aggregate.Limits(max_step=0.0), merge=method)
    return rule, jax.jit(functools.partial(apply, rule))


def _dense_step(form, clients, damping=DAMPING):
    """In float64, of what float32 is given, so that the difference is the rule's own."""
    weights, deltas, eigenvalues, basis = (np.asarray(np.asarray(field, np.float32), float) for field in clients)
    weights = weights / weights.sum()
    each = np.einsum("cpr,cr,cqr->cpq", basis, eigenvalues, basis)
    total, mean = np.tensordot(weights, each, 1), weights @ deltas
    pull = np.einsum("c,cpq,cq->p", weights, each, deltas)
    if form == "pinv":
        return np.linalg.pinv(total, rcond=RCOND, hermitian=True) @ pull
    beta = damping * np.linalg.eigvalsh(total)[-1]
    system = total + beta * np.eye(len(total))
    return np.linalg.solve(system, pull + beta * mean if form == "damped" else pull)


@pytest.mark.slow
@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-3, 1e-4, 0.0])
@each_method
@each_form
def test_nearly_collinear_clients_in_float32_give_the_step_of_float64(form, method, angle):
    clients = _clients(angle=angle)
    step, info = _apply(form, method, clients)
    wanted = _dense_step(form, clients)
    # All that float32 rounds is the result: what nearly collinear clients amplify by 1 / damping is done in float64.
    assert np.linalg.norm(step - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(info))
    floats = {leaf.dtype for leaf in jax.tree.leaves((step, info)) if np.issubdtype(leaf.dtype, np.floating)}
    assert floats == {np.dtype(np.float32)}, "float64 inside, float32 outside"


@pytest.mark.parametrize("angle", [1e-4, 1e-7, 0.0])
@each_method
@each_form
def test_without_damping_collinear_clients_stay_finite(form, method, angle):
    clients = _clients(angle=angle)
    step, info = _apply(form, method, clients, damping=0.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((step, info)))
    if angle == 0:  # the noise of the directions that are no longer there is not divided by
        assert np.linalg.norm(step) < 10 * np.linalg.norm(clients[1])


@each_method
def test_a_basis_in_bfloat16_changes_the_step_by_its_rounding(method):
    """Each entry by at most 2^-8 of itself, H by at most about twice that, and the step by H's condition at most."""
    clients = _clients(angle=1.0)
    exact, _ = _apply("damped", method, clients, damping=1.0)
    step, _ = _apply("damped", method, clients, damping=1.0, store=jnp.bfloat16)
    assert 0 < np.linalg.norm(step - exact) < 2.0**-8 * np.linalg.norm(exact)
    assert step.dtype == np.float32


@each_method
def test_a_sweep_over_the_hyper_parameters_compiles_once_and_equals_single_calls(method):
    """By a vmap around the compiled rule, which traces it anew outside of the scope of its float64 arithmetic."""
    clients, swept = _clients(angle=1e-4), np.array([1e-3, 1e-1, 0.3], np.float32)
    (uploads, params), (rule, compiled) = _uploads(clients), _rule("damped", method)
    state = jax.vmap(lambda damping: with_hyper(rule.init(params), damping=damping))(swept)
    steps, _, info = jax.jit(jax.vmap(compiled, in_axes=(None, 0, None)))(uploads, state, params)
    values = np.linalg.svd(_factor(clients[0], *clients[2:]))[1]
    np.testing.assert_allclose(np.sqrt(info["spectrum"][0]), values, rtol=0, atol=4 * EPS * values[0])
    for step, damping in zip(steps, swept, strict=True):
        wanted = _dense_step("damped", clients, float(damping))
        assert np.linalg.norm(step - wanted) < 4 * EPS / damping * np.linalg.norm(clients[1])
        single, _ = _apply("damped", method, clients, damping=damping)
        assert np.linalg.norm(step - single) < 4 * EPS / damping * np.linalg.norm(clients[1])
    assert np.linalg.norm(steps[0] - steps[2]) > 0.01 * np.linalg.norm(steps[0]), "the hyper-parameter does nothing"


@each_method
def test_parts_of_several_ranks_stand_side_by_side(x64, method):
    """Their spectrum, a function of it, the quadratic form and the top pairs are those of the dense sum."""
    draw = np.random.default_rng(1)
    wide = np.linalg.qr(draw.normal(size=(1, SIZE, 5)))[0]
    others = np.array([0.7]), draw.normal(size=(1, SIZE)), np.array([[4.0, 3, 2, 1, 0]]), wide
    given = _clients(), others
    each = [np.einsum("c,cpr,cr,cqr->cpq", w, u, values, u) for w, _, values, u in given]
    total = sum(part.sum(0) for part in each)
    pull = sum(np.einsum("cpq,cq->p", part, own[1]) for part, own in zip(each, given, strict=True))

    @jax.jit
    def run(vector):
        merged = merge.merge([_part(*map(jnp.asarray, clients)) for clients in given], method)
        solution, quadratic = merge.solve(merged, SHIFTED), merge.quadratic(merged, vector)
        return merged.spectrum, solution, quadratic, merge.top(merged, 6), merge.top(merged, 15)

    vector = draw.normal(size=SIZE)
    spectrum, solution, quadratic, top, padded = jax.device_get(run(jnp.asarray(vector)))
    wanted = np.linalg.eigvalsh(total)[::-1]
    np.testing.assert_allclose(spectrum, wanted[: WIDTH + 5], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(solution, np.linalg.solve(total + 0.5 * np.eye(SIZE), pull), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(quadratic, vector @ total @ vector, rtol=1e-10)
    np.testing.assert_allclose(top.eigenvalues, wanted[:6], rtol=1e-9)
    np.testing.assert_allclose(top.basis.T @ top.basis, np.eye(6), atol=1e-9)
    np.testing.assert_allclose(total @ top.basis, top.basis * wanted[:6], rtol=0, atol=1e-8)
    # Of the 13 columns one has the eigenvalue zero, two more are beyond F's width.
    np.testing.assert_allclose(padded.eigenvalues[12:], 0, atol=1e-12)
    np.testing.assert_array_equal(padded.basis[:, 13:], 0)
    np.testing.assert_allclose(padded.basis * padded.eigenvalues @ padded.basis.T, total, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "width", "dtype", "backend", "picked"),
    [
        (10, 2, np.float32, "cpu", "gram"),
        (2**20, 2**5, np.float64, "cpu", "qr"),
        (10**6, 10**3, np.float32, "gpu", "gram"),
        (10**6, 10**3, np.float32, "tpu", "tsqr"),
        (2**20 + 1, 2**5, np.float64, "cpu", "tsqr"),
        (2**20, 2**5, np.float32, "tpu", "qr"),
    ],
)
def test_the_rule_of_auto(size, width, dtype, backend, picked):
    assert merge.choose(size, width, np.dtype(dtype), backend) == picked
    assert picked in merge.METHODS


def test_auto_is_the_method_that_it_picks(monkeypatch):
    monkeypatch.setattr(merge, "choose", lambda *_: "gram")
    clients = _clients(angle=1e-2)
    np.testing.assert_array_equal(_apply("damped", "auto", clients)[0], _apply("damped", "gram", clients)[0])


def test_an_unknown_method_lists_the_known_ones():
    """As the rule is made, and where it is called by itself."""
    words = r"aggregator\.merge: unknown 'svd'; known: auto, gram, qr, tsqr"
    with pytest.raises(ValueError, match=words):
        aggregate.fipa(merge="svd")
    with pytest.raises(ValueError, match=words):
        merge.merge([_part(*map(jnp.asarray, _clients()))], "svd")


def _all_of(factor, vector):
    """What functions of a factor there are."""
    return factor.spectrum, merge.solve(factor, SHIFTED), merge.quadratic(factor, vector), merge.top(factor, 6)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["x64 off", "x64 on"])
@each_method
def test_a_factor_can_leave_a_jit(method, wide):
    """Made in one program and used outside, in another program or by single calls; float64 inside, whatever is set."""
    with jax.enable_x64(wide):
        dtype = jnp.result_type(float)
        clients = [jnp.asarray(field, dtype) for field in _clients()]
        vector = jnp.asarray(np.random.default_rng(2).normal(size=SIZE), dtype)
        make = lambda *clients: merge.merge([_part(*clients)], method)
        factor = jax.jit(make)(*clients)
        assert len(jax.tree.leaves(factor)) == 6
        assert factor.eigenvalues.dtype == factor.right.dtype == factor.projected.dtype == np.float64
        wanted = jax.jit(lambda *clients: _all_of(make(*clients), vector))(*clients)
        outside = _all_of if method == "gram" else jax.jit(_all_of)
        results, tolerance = outside(factor, vector), 100 * jnp.finfo(dtype).eps
        chex.assert_trees_all_equal_shapes_and_dtypes(results, wanted)
        chex.assert_trees_all_close(results, wanted, rtol=tolerance, atol=tolerance)
        assert {leaf.dtype for leaf in jax.tree.leaves(wanted)} == {np.dtype(dtype)}


@functools.cache
def _in_float32(form, own):
    """A rule that no compiled program of a device with float64 is shared with."""
    options = {"relative": False, "own_damping": True} if own else {}
    rule = aggregate.fipa(form, rcond=RCOND, limits=aggregate.Limits(0.0, 0.0, 0.0, 0.0), **options)
    return rule, jax.jit(functools.partial(apply, rule))


def _own_dense(clients, damping, own):
    weights, deltas, eigenvalues, basis = (np.asarray(np.asarray(field, np.float32), float) for field in clients)
    weights = weights / weights.sum()
    each = np.einsum("cpr,cr,cqr->cpq", basis, eigenvalues, basis) + own[:, None, None] * np.eye(SIZE)
    total = np.tensordot(weights, each, 1) + (damping - weights @ own) * np.eye(SIZE)
    return np.linalg.solve(total, np.einsum("c,cpq,cq->p", weights, each, deltas))


OWN = np.array([1.0, 0.5, 2, 1])


def _without_float64(form, clients, damping=1e-6):
    """The step, with the clients' own damping where the form is `own`."""
    own, (uploads, params) = form == "own", _uploads(clients)
    rule, compiled = _in_float32("damped" if own else form, own)
    uploads = uploads._replace(damping=jnp.asarray(OWN, jnp.float32) if own else None)
    state = rule.init(params) if form == "pinv" else with_hyper(rule.init(params), damping=damping)
    return np.asarray(compiled(uploads, state, params)[0]), (compiled, uploads, state, params)


def _equal(angle=0.0):
    weights, deltas, eigenvalues, basis = _clients(angle=angle)
    return weights, deltas, np.repeat(eigenvalues[:1], CLIENTS, axis=0), basis


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32 alone"])
@pytest.mark.parametrize("form", [*FORMS, "own"])
def test_at_a_small_damping_equal_and_generic_clients_give_the_step_of_float64(monkeypatch, form, double):
    """Also where a client's own damping is a million times the server's."""
    monkeypatch.setattr(merge, "DOUBLE", merge.DOUBLE if double else ())
    _in_float32.cache_clear()
    for clients in (_clients(angle=1.0), _clients(angle=0.0), _equal()):
        step, _ = _without_float64(form, clients)
        wanted = _own_dense(clients, 1e-6, OWN) if form == "own" else _dense_step(form, clients, 1e-6)
        assert np.linalg.norm(step - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("form", FORMS)
def test_without_float64_nearly_collinear_clients_are_off_as_by_a_rounding_of_their_bases(monkeypatch, form):
    """Float32 alone cannot tell a small angle better than the bases that were sent in it do."""
    monkeypatch.setattr(merge, "DOUBLE", ())
    _in_float32.cache_clear()
    draw = np.random.default_rng(3)
    for angle in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        clients = _clients(angle=angle)
        step, wanted = _without_float64(form, clients)[0], _dense_step(form, clients, 1e-6)

        def rounded(clients=clients):
            signs = draw.choice([-1, 1], size=clients[3].shape) * EPS * np.max(np.abs(clients[3]))
            return _dense_step(form, (*clients[:3], clients[3] + signs), 1e-6)

        moved = np.mean([np.linalg.norm(rounded() - wanted) for _ in range(5)])
        assert np.linalg.norm(step - wanted) < 3 * moved + 1e-6 * np.linalg.norm(wanted), angle


def test_without_float64_the_program_for_a_tpu_holds_none(monkeypatch):
    monkeypatch.setattr(merge, "DOUBLE", ())
    _in_float32.cache_clear()
    for form in (*FORMS, "own"):
        _, (compiled, *given) = _without_float64(form, _clients(angle=1.0))
        text = jax.export.export(compiled, platforms=["tpu"])(*given).mlir_module()
        assert "f32" in text and "f64" not in text


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("form", FORMS)
def test_without_damping_equal_clients_are_divided_by_no_noise(x64, form, method):
    """In float64, where eigenvalues of a Gram matrix are known to eps and singular values to eps squared."""
    for seed in range(5):
        weights, deltas, eigenvalues, basis = _clients(seed=seed)
        eigenvalues, basis = np.repeat(eigenvalues[:1], CLIENTS, axis=0), np.repeat(basis[:1], CLIENTS, axis=0)
        uploads = aggregate.Uploads(
            jnp.asarray(deltas), jnp.asarray(weights), Sketch(*map(jnp.asarray, (eigenvalues, basis)))
        )
        none = {"rcond": 0.0} if form == "pinv" else {"damping": 0.0}
        rule, compiled = _undamped(form, method)
        step, *_ = compiled(uploads, with_hyper(rule.init(jnp.zeros(SIZE)), **none), jnp.zeros(SIZE))
        mean = weights @ deltas
        wanted = mean if form == "damped" else basis[0] @ (basis[0].T @ mean)
        assert np.linalg.norm(step - wanted) < 1e-9 * np.linalg.norm(mean)


@functools.cache
def _undamped(form, method):
    rule = aggregate.fipa(form, limits=aggregate.Limits(0.0, 0.0, 0.0, 0.0), merge=method)
    return rule, jax.jit(functools.partial(apply, rule))
