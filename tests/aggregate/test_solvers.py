"""What the filters let through, what takes the place of a step that fails, and updates of another damping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import BETA, run
from helpers.rules import CLIENTS, SIZE, Dense, apply_rule, assert_close, clients_of, each_form, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import solvers


def test_pinv_counts_the_directions_above_its_cut_off(x64):
    clients = clients_of(2)
    spectrum = np.linalg.eigvalsh(Dense(*clients).total)[::-1][:8]
    rcond = np.sqrt(spectrum[4] * spectrum[5]) / spectrum[0]  # between the fifth and the sixth
    step, info = apply_rule("pinv", uploads_of(*clients), rcond=rcond)
    dense = Dense(*clients)
    assert_close(step, dense.pinv(rcond) @ dense.pull)
    np.testing.assert_allclose(info["effective_rank"], 5, rtol=1e-12)
    np.testing.assert_allclose(info["condition"], spectrum[0] / spectrum[4], rtol=1e-10)


def _nearly_collinear():
    """Two clients whose curvatures differ by an angle of 1e-4 and whose updates differ by one: a lot of noise."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0]
    turned = basis.copy()
    turned[:, 1] = np.cos(1e-4) * basis[:, 1] + np.sin(1e-4) * np.linalg.qr(np.c_[basis, np.eye(12)])[0][:, 2]
    deltas, counts, *_ = clients_of(2)
    return deltas, counts * [1, 1, 0, 0], np.ones((4, 2)) * [1, 0.5], np.stack([basis, turned, basis, basis])


@each_form
def test_a_step_that_explodes_falls_back_to_the_damped_form(x64, form):
    fields = _nearly_collinear()
    options = {"rcond" if form == "pinv" else "damping": 1e-12, "limits.explosion": 0.0}
    free, before = apply_rule(form, uploads_of(*fields), **options)
    longest = np.linalg.norm(fields[0][:2], axis=1).max()
    assert before["fallback"] == 0 and np.linalg.norm(free) > 200 * longest
    step, info = apply_rule(form, uploads_of(*fields), **options | {"limits.explosion": 200.0})
    dense = Dense(*fields)
    beta = solvers.CAREFUL * dense.largest
    assert info["fallback"] == 1
    assert_close(step, dense.solve(beta)(dense.pull + beta * dense.mean), 1e-8)
    np.testing.assert_array_equal(info["spectrum"], before["spectrum"])


@each_form
def test_what_fails_even_damped_is_the_mean(x64, form):
    """Here as no step is short enough."""
    fields = clients_of(2)
    step, info = apply_rule(form, uploads_of(*fields), **{"limits.explosion": 1e-9})
    assert info["fallback"] == 2
    assert_close(step, Dense(*fields).mean, 1e-12)


@pytest.mark.parametrize("name", ["damped", "tikhonov", "diagonal"])
def test_a_step_that_is_not_finite_falls_back_to_the_mean(x64, name):
    fields = clients_of(2)
    step, info = apply_rule(name, uploads_of(*fields), damping=np.nan)
    if name == "diagonal":  # where it divides by what is not finite it takes the mean anyway
        assert info["fallback"] == 0
    else:
        assert info["fallback"] == 2
    assert_close(step, Dense(*fields).mean, 1e-12)


def test_own_damping_undoes_what_the_clients_have_added(x64):
    """Whatever each client's damping, (H_m + beta_m I)^{-1} of its gradient: the step is Levenberg-Marquardt's."""
    draw = np.random.default_rng(3)
    _, counts, values, basis = clients_of(SIZE)
    each = np.einsum("cpr,cr,cqr->cpq", basis, values, basis)
    gradients, damping = draw.normal(size=(CLIENTS, SIZE)), draw.uniform(0.01, 9, CLIENTS)
    deltas = -np.linalg.solve(each + damping[:, None, None] * np.eye(SIZE), gradients[..., None])[..., 0]
    weights = counts / counts.sum()
    wanted = -np.linalg.solve(np.tensordot(weights, each, 1) + BETA * np.eye(SIZE), weights @ gradients)
    valid = np.arange(CLIENTS) != 1

    def step_of(counts, damping):
        sent = [{"damping": jnp.asarray(damping)}]
        visited, (info,), _ = run([(deltas, counts, values, basis)], sent=sent, own_damping=True)
        return visited[-1], info

    assert_close(step_of(counts, damping)[0], wanted, 1e-9)
    without, _ = step_of(np.where(valid, counts, 0), damping)
    for wrong in (-1.0, np.nan, np.inf):
        step, info = step_of(counts, np.where(valid, damping, wrong))
        np.testing.assert_array_equal(info["reasons"]["damping_invalid"], ~valid)
        np.testing.assert_array_equal(step, without)


def test_own_damping_needs_the_clients(x64):
    sent, rule = uploads_of(*clients_of(2)), aggregate.fipa(relative=False, own_damping=True)
    params = jax.tree.map(lambda leaf: leaf[0], sent.delta)
    received, screening = aggregate.receive(sent, params)
    with pytest.raises(ValueError, match=r"uploads\.damping"):
        aggregate.step_of(rule, received, rule.init(params), params, screening)


BOUNDS = ["max_step", "max_divergence", "explosion", "trace_cap", "max_drift"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), np.float32(-1), jnp.float32(-1)])
@pytest.mark.parametrize("name", ["damping", "rcond", *BOUNDS])
def test_numbers_that_are_negative_or_none_are_refused(name, value):
    limits = {name: value} if name in aggregate.Limits._fields else {}
    late = {name: value} if name in aggregate.LateUpdates._fields else {}
    options = {name: value} if not limits | late else {}
    form = "pinv" if name == "rcond" else "damped"
    with pytest.raises(ValueError, match=f"{name}: needed 0 or more, got {value}"):
        aggregate.fipa(form, limits=aggregate.Limits(**limits), late=aggregate.LateUpdates(**late), **options)
    if name == "damping":
        with pytest.raises(ValueError, match="damping: needed 0 or more"):
            aggregate.diagonal(damping=value)
        with pytest.raises(ValueError, match="damping: needed a number, got 'a'"):
            aggregate.fipa(damping="a")
    if limits:
        with pytest.raises(ValueError, match=f"{name}: needed 0 or more"):
            aggregate.kronecker(limits=aggregate.Limits(**limits))


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32])
def test_numbers_of_any_kind_are_looked_at(kind):
    """NumPy's and jax's as Python's own; only what is traced cannot be."""
    with pytest.raises(ValueError, match=r"aggregator\.damping: past\.kind = 'curvature' divides"):
        aggregate.fipa(relative=False, damping=kind(0), past=aggregate.PastRounds("curvature"))
    with pytest.raises(ValueError, match=r"aggregator\.past\.decay: needs a number in \[0, 1\)"):
        aggregate.fipa(past=aggregate.PastRounds("prior", decay=kind(1)))
    with pytest.raises(ValueError, match=r"aggregator\.own_damping: needs"):
        aggregate.damped(kind(0), relative=False, own_damping=True)
    with pytest.raises(ValueError, match=r"aggregator\.span\.decay: needs a number in"):
        aggregate.from_span(span=aggregate.SpanOptions(decay=kind(2)))
    limits = aggregate.Limits(max_step=kind(0), max_divergence=0.5, explosion=kind(0), trace_cap=kind(0))
    aggregate.from_span(limits=limits)
