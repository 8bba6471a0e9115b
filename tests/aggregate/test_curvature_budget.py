"""A budget of bytes for curvature: the level that spends it, in the mean over rounds, whatever the clients have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import CLIENTS, SIZE, apply, as_tree, clients_of, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate.curvature_budget import within_budget
from fipa_jax.curvature.sketch import Diagonal, Report

RANK, PAIR, REPORT = SIZE, 8 * SIZE + 8 + 4, 14  # bytes: vector, eigenvalue, residual; the report below
PARAMS = {name: np.asarray(leaf, np.float64) for name, leaf in as_tree(np.zeros(SIZE)).items()}


def cohort(seed, level=0.0, first=RANK, asked=True):
    """What clients send above a level, or their `first` pairs where there is none; nothing where they are not asked."""
    deltas, counts, values, bases = clients_of(RANK, seed)
    values = values * np.random.default_rng(seed).lognormal(sigma=0.5, size=(CLIENTS, 1))  # rounds and clients differ
    kept = asked & (values >= level if level > 0 else np.arange(RANK)[None] < first)
    uploads = uploads_of(deltas, counts, values * kept, bases * kept[:, None, :])
    whole, number, flag = jnp.zeros([CLIENTS, RANK], jnp.float32), jnp.zeros(CLIENTS, jnp.float32), [False] * CLIENTS
    flags = {"not_finite": jnp.asarray(flag)}
    report = Report(whole, jnp.full(CLIENTS, asked, jnp.int32), jnp.asarray(flag), number, number, flags)
    return uploads._replace(sketch=uploads.sketch._replace(report=report))


def spend(pairs, rounds, asked=lambda k: True):
    """(pairs sent in each round, the levels they were sent by, the last state), of so many pairs a client."""
    rule = within_budget(aggregate.fipa(), pairs * PAIR + REPORT)
    state, sent, levels, compiled = rule.init(PARAMS), [], [], jax.jit(functools.partial(apply, rule))
    for k in range(rounds):
        (level,) = rule.asks(state)
        uploads = cohort(k, float(level), int(pairs), asked(k))
        _, state, info = compiled(uploads, state, PARAMS)
        assert info["sketch_level"] == level
        sent.append(np.count_nonzero(uploads.sketch.eigenvalues))
        levels.append(float(level))
    return np.array(sent), np.array(levels), state


def test_the_budget_is_spent_in_the_mean_and_soon_made_up_for(x64):
    for pairs in (1.5, 4.0):
        sent, levels, state = spend(pairs, 60)
        bought = pairs * CLIENTS
        assert sent[0] == int(pairs) * CLIENTS and levels[0] == 0 < levels[1]
        over = np.cumsum(sent) - bought * np.arange(1, 61)
        np.testing.assert_allclose(float(state.left), -over[-1], atol=1e-9)
        assert np.max(np.abs(over)) <= 8 * bought, over
        assert abs(np.mean(sent[10:]) / bought - 1) < 0.1


def test_the_level_follows_its_equation(x64):
    pairs, sent, levels = 2.0, *spend(2.0, 12)[:2]
    left = 0.0
    for k in range(1, 11):
        left += pairs * CLIENTS - sent[k - 1]
        aim = max(pairs * CLIENTS + left / 4, pairs * CLIENTS / 4)
        np.testing.assert_allclose(levels[k + 1], levels[k] * np.clip(sent[k] / aim, 0.5, 2), rtol=1e-12)


def test_who_is_not_asked_saves_bytes_for_later_rounds(x64):
    """In a third of the rounds clients are asked: the level waits for them, and three times as much comes."""
    sent, levels, _ = spend(2.0, 90, lambda k: k % 3 == 0)
    quiet = np.arange(89) % 3 != 0
    np.testing.assert_array_equal(levels[1:][quiet], levels[:-1][quiet])
    bought = 60 * CLIENTS * (2.0 + 2 / 3 * REPORT / PAIR)  # who is not asked sends no report
    assert abs(np.sum(sent[30:]) / bought - 1) < 0.15


def test_the_step_is_the_inner_rules(x64):
    inner = aggregate.fipa()
    rule = within_budget(inner, 2.0 * PAIR)
    uploads = cohort(0)
    step, state, _ = apply(rule, uploads, rule.init(PARAMS), PARAMS)
    want, after, _ = apply(inner, uploads, inner.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (step, state.rule), (want, after))


def test_updates_without_sketches_are_refused():
    with pytest.raises(ValueError, match=r"sketch\.budget: needs sketches, got Diagonal"):
        rule = within_budget(aggregate.diagonal(), 100.0)
        uploads = cohort(0)._replace(sketch=Diagonal(jnp.ones([CLIENTS, SIZE])))
        apply(rule, uploads, rule.init(PARAMS), PARAMS)
