"""What the rules make of updates that come late: their weight, their targets, and those that are left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import (
    LIKE,
    SIZE,
    Dense,
    apply,
    as_sent,
    as_tree,
    as_vector,
    assert_close,
    clients_of,
    shapes_of,
    uploads_of,
    with_hyper,
)

from fipa_jax import aggregate


def _late(seed=0):
    """(uploads of late clients, their dense matrices, ages, moved [C, P])."""
    draw = np.random.default_rng(seed)
    cohort, ages = clients_of(2, seed), np.array([0, 2, 0, 5])
    moved = draw.normal(size=(4, SIZE)) * (ages > 0)[:, None]
    uploads = uploads_of(*cohort)._replace(age=jnp.asarray(ages), moved=as_tree(moved))
    return uploads, cohort, ages, moved


@functools.cache
def _rule(transport):
    rule = aggregate.fipa(damping=0.3, relative=False, late=aggregate.LateUpdates(transport=transport))
    return rule, jax.jit(functools.partial(apply, rule))


def _step(uploads, transport=True, max_drift=0.0, max_step=0.0):
    rule, compiled = _rule(transport)
    like = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), LIKE)
    state = with_hyper(rule.init(like), **{"late.max_drift": max_drift, "limits.max_step": max_step})
    step, _, info = compiled(uploads, state, like)
    return as_vector(step), jax.tree.map(np.asarray, info)


@pytest.mark.parametrize("transport", [True, False])
def test_a_late_target_is_seen_from_the_present_parameters(x64, transport):
    uploads, (deltas, counts, values, basis), ages, moved = _late()
    dense = Dense(deltas, counts * (1 + ages) ** -0.5, values, basis)
    left = deltas - moved if transport else deltas
    pull = np.einsum("c,cpq,cq->p", dense.weights, dense.each, left)
    assert_close(_step(uploads, transport=transport)[0], dense.solve(0.3)(pull + 0.3 * dense.mean))


def test_a_client_that_has_drifted_too_far_takes_no_part(x64):
    uploads, (deltas, counts, values, basis), _, moved = _late(seed=1)
    drifts = np.einsum("cp,cpq,cq->c", moved, Dense(deltas, counts, values, basis).each, moved) / 2
    assert 0 < drifts[1] != drifts[3] > 0
    bound = (drifts[1] + drifts[3]) / 2
    step, info = _step(uploads, max_drift=bound)
    np.testing.assert_allclose(info["drift"], drifts[drifts <= bound].max(), rtol=1e-9)
    np.testing.assert_array_equal(info["stale"], drifts > bound)
    assert not info["rejected"].any()
    fresh = uploads._replace(num_examples=jnp.where(jnp.asarray(drifts > bound), 0, uploads.num_examples))
    assert_close(step, _step(fresh)[0])
    # Nor do the bounds count its update.
    long = uploads._replace(
        delta=jax.tree.map(lambda x: jnp.where(_rows(drifts > bound, x), 1e3 * x, x), uploads.delta)
    )
    short = {"max_step": 0.1, "max_drift": bound}
    assert_close(_step(long, **short)[0], _step(fresh, max_step=0.1)[0])


@pytest.mark.parametrize("name", ["mean", "fipa", "diagonal"])
def test_an_absent_client_undoes_no_round_whatever_its_age(x64, name):
    """(1 + age)^-s of age -1 is infinite, and 0 times it is NaN."""
    deltas, counts, values, basis = clients_of(SIZE)
    uploads = uploads_of(deltas, np.where(np.arange(4) == 1, 0, counts), values, basis)
    uploads = uploads._replace(moved=jax.tree.map(jnp.zeros_like, uploads.delta))
    rule, params = getattr(aggregate, name)(), jax.tree.map(jnp.asarray, LIKE)
    run = jax.jit(lambda sent: apply(rule, as_sent(rule, sent), rule.init(params), params)[0])
    wanted = run(uploads._replace(age=jnp.zeros(4, jnp.int32)))
    assert_close(as_vector(run(uploads._replace(age=jnp.array([0, -1, 0, 0])))), as_vector(wanted), 1e-12)


def test_a_staleness_by_which_late_clients_count_more_is_refused():
    late = aggregate.LateUpdates(staleness=-1.0)
    for make in (aggregate.mean, aggregate.diagonal, aggregate.fipa, aggregate.kronecker, aggregate.posterior):
        with pytest.raises(ValueError, match=r"late\.staleness: needed 0 or more, got -1"):
            make(late=late)


@pytest.mark.parametrize(
    ("make", "field"), [(aggregate.mean, "mix"), (aggregate.fipa, "transport")], ids=["mix", "transport"]
)
def test_where_a_late_client_began_is_asked_for_if_it_matters(make, field):
    """Without the way since then its age alone would count, and the option would do nothing."""
    params, uploads = jax.tree.map(jnp.asarray, LIKE), uploads_of(*clients_of(2))
    for on in (True, False):
        rule = make(late=aggregate.LateUpdates(**{"mix": False, "transport": False} | {field: on}))
        late = as_sent(rule, uploads)._replace(age=jnp.array([0, 3, 0, 0]))
        if on:
            with pytest.raises(ValueError, match=rf"uploads\.moved: needed beside uploads\.age by .*late\.{field}"):
                shapes_of(rule, late, rule.init(params), params)
        else:
            shapes_of(rule, late, rule.init(params), params)


def _rows(which, leaf):
    return jnp.asarray(which).reshape(-1, *[1] * (leaf.ndim - 1))


def test_a_client_at_its_optimum_pulls_the_model_back(x64):
    """Its update is zero, but the parameters have moved: the bounds count the way from the present ones."""
    uploads, cohort, _, moved = _late()
    still = uploads._replace(delta=jax.tree.map(jnp.zeros_like, uploads.delta), age=jnp.full(4, 2))
    step, info = _step(still, max_step=5.0)
    assert info["fallback"] == 0 and np.linalg.norm(step) > 0.01
    dense = Dense(*cohort)
    assert_close(step, dense.solve(0.3)(-np.einsum("c,cpq,cq->p", dense.weights, dense.each, moved)))


def test_quadratic_losses_do_not_age(x64):
    """With its target transported a client may be as late as it likes: the step is that of the present parameters."""
    draw = np.random.default_rng(5)
    roots, best = draw.normal(size=(4, SIZE, SIZE)), draw.normal(size=(4, SIZE))
    each, theta = np.einsum("mpq,mrq->mpr", roots, roots), draw.normal(size=SIZE)
    values, basis = (x[..., ::-1] for x in np.linalg.eigh(each))
    regular = each + 0.3 * np.eye(SIZE)
    delta_at = lambda at: -np.linalg.solve(regular, np.einsum("mpq,mq->mp", each, at - best)[..., None])[..., 0]
    began, counts = theta + draw.normal(size=(4, SIZE)), np.full(4, 7)
    dense = Dense(delta_at(np.tile(theta, (4, 1))), counts, values, basis)
    now = dense.solve(0.3)(dense.pull + 0.3 * dense.mean)
    old = uploads_of(delta_at(began), counts, values, basis)
    old = old._replace(age=jnp.full(4, 3), moved=as_tree(theta - began))
    assert_close(_step(old)[0], now)
    assert np.linalg.norm(_step(old, transport=False)[0] - now) > 0.1 * np.linalg.norm(now)


@pytest.mark.parametrize("mix", [False, True], ids=["fedbuff", "fedasync"])
def test_the_mean_takes_late_clients_for_less_once_they_are_weighted(x64, mix):
    uploads, (deltas, counts, *_), ages, moved = _late()
    rule = aggregate.mean(late=aggregate.LateUpdates(staleness=0.7, mix=mix))
    step, _, info = jax.jit(functools.partial(apply, rule))(uploads, (), jax.tree.map(jnp.asarray, LIKE))
    fresh = counts / counts.sum() * (1 + ages) ** -0.7
    assert_close(as_vector(step), fresh @ (deltas - moved if mix else deltas))
    assert "stale" not in info, "a bound on the drift is FIPA's"
