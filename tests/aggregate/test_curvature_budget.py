"""A budget of bytes for curvature: the level that spends it, in the mean over rounds, whatever the clients have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import CLIENTS, SIZE, apply, as_tree, clients_of, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate.curvature_budget import within_budget
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature.sketch import Diagonal, Report, Sketch

RANK, PAIR, REPORT = SIZE, 8 * SIZE + 8 + 4, 14  # bytes: vector, eigenvalue, residual; the report below
PARAMS = {name: np.asarray(leaf, np.float64) for name, leaf in as_tree(np.zeros(SIZE)).items()}


def cohort(seed, level=0.0, first=RANK, asked=True):
    """What clients send above a level, or their `first` pairs where there is none; nothing where they are not asked."""
    deltas, counts, _, bases = clients_of(RANK, seed)
    values = np.geomspace(1, 1e-3, RANK)[None] * np.random.default_rng(seed).lognormal(sigma=0.5, size=(CLIENTS, 1))
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
        uploads = cohort(k, float(level), max(int(pairs), 1), asked(k))
        _, state, info = compiled(uploads, state, PARAMS)
        assert info["sketch_level"] == level
        sent.append(np.count_nonzero(uploads.sketch.eigenvalues))
        levels.append(float(level))
    return np.array(sent), np.array(levels), state


def test_the_budget_is_spent_in_the_mean_and_soon_made_up_for(x64):
    for pairs in (0.5, 1.5, 4.0):
        sent, levels, state = spend(pairs, 60)
        bought = pairs * CLIENTS
        assert sent[0] == max(int(pairs), 1) * CLIENTS and levels[0] == 0 < levels[1]
        over = np.cumsum(sent) - bought * np.arange(1, 61)
        np.testing.assert_allclose(float(state.left), -over[-1], atol=1e-9)
        assert np.max(np.abs(over)) <= 4 * bought, over
        assert abs(np.mean(sent[10:]) / bought - 1) < 0.1


def test_the_level_follows_its_equation(x64):
    pairs, left = 2.0, 0.0
    sent, levels, _ = spend(pairs, 12)
    bought = pairs * CLIENTS
    for k in range(1, 11):
        left += bought - sent[k - 1]
        aim = max(bought + left / 4, bought / 4)
        came = np.sort(np.ravel(cohort(k, levels[k]).sketch.eigenvalues))[::-1]
        if sent[k] >= aim:
            wanted = came[int(aim) - 1]
        else:
            apart = max(np.mean(np.log(came[: sent[k]] / levels[k])), 1 / 8) if sent[k] else 0
            wanted = levels[k] * (max((sent[k] / aim) ** (apart / 2), 1 / 4) if sent[k] else 1 / 2)
        np.testing.assert_allclose(levels[k + 1], wanted, rtol=1e-12)


def play(number, rounds, wanted, level=0.0):
    """(pairs sent in each round, the levels) of clients whose eigenvalues [C, R] in round k are number(k)."""
    rule, sent, levels = within_budget(TAKES_ALL, wanted * (4 * SIZE + 4)), [], []
    state = rule.init(PARAMS)._replace(level=jnp.asarray(level))
    for k in range(rounds):
        values = number(k)
        values = np.where(values >= float(state.level), values, 0)
        deltas = jax.tree.map(lambda leaf: jnp.zeros([len(values), *leaf.shape]), PARAMS)
        basis = jnp.zeros([len(values), SIZE, values.shape[1]], jnp.float32)
        took_part = jnp.ones(len(values), bool)
        received = Received(took_part, took_part, deltas, Sketch(jnp.asarray(values, jnp.float32), basis))
        _, state, _ = rule.apply(received, state, PARAMS)
        sent.append(np.count_nonzero(values))
        levels.append(float(state.level))
    return np.array(sent), np.array(levels)


TAKES_ALL = aggregate.Aggregator(lambda params: (), lambda received, state, params: (params, state, {}))
SPECTRUM = np.geomspace(1, 1e-3, 20)[None] * np.linspace(0.5, 2, 10)[:, None]  # of ten clients
WANTED = 2.0  # pairs of a client, 20 of ten


def test_a_budget_that_nothing_used_up_is_kept_to_when_it_binds():
    """For forty rounds each client has one pair alone, and the level falls; then each has twenty."""
    sent, _ = play(lambda k: SPECTRUM * (np.arange(20) < (1 if k < 40 else 20)), 80, WANTED, level=0.1)
    assert np.all(sent[5:40] == 10) and sent[40] == 200
    assert np.sum(sent) <= 80 * WANTED * 10 and np.all(sent[60:] <= 1.5 * WANTED * 10), sent[40:]


@pytest.mark.parametrize("scale", [1e-2, 1e-8])
def test_one_weak_client_does_not_make_the_others_send_everything(scale):
    weak = SPECTRUM * np.where(np.arange(10) == 3, scale, 1)[:, None]
    sent, _ = play(lambda k: weak[:, : 2 if k == 0 else 20], 40, WANTED)
    assert np.sum(sent) <= 1.1 * 40 * WANTED * 10 and np.max(sent) <= 3 * WANTED * 10, sent


@pytest.mark.slow
def test_values_that_all_lie_at_the_level_do_not_hold_it():
    """One pair of each client is as large as the level, and the others a thousandth of it."""
    spectrum = np.concatenate([np.ones([10, 1]), np.full([10, 19], 1e-3)], axis=1)
    sent, _ = play(lambda k: spectrum, 120, WANTED, level=1.0)
    assert np.max(sent[:5]) == 10 and np.max(sent) == 200


def test_steep_spectra_do_not_make_it_swing():
    """Eigenvalues of which as many as level^-3 are above a level."""
    steep = np.arange(1, 201).reshape(20, 10).T ** (-1 / 3)
    sent, _ = play(lambda k: steep, 60, WANTED, level=0.9)
    assert np.all(np.abs(sent[30:] / (WANTED * 10) - 1) < 0.3), sent


def test_a_client_that_ignores_the_level_does_not_silence_the_others_for_long():
    """Its twenty pairs are as many as are bought for all; when it stops, the others are heard at once."""

    def values(k):
        loud = np.full([1, 20], 100.0) if k < 60 else np.zeros([1, 20])
        return np.concatenate([loud, SPECTRUM])

    _, levels = play(values, 60, WANTED)
    assert np.max(levels) <= 200
    sent, _ = play(values, 80, WANTED)
    assert np.any(sent[60:75] > 0)


def test_who_is_not_asked_saves_bytes_for_later_rounds(x64):
    """In a third of the rounds clients are asked: the level waits for them, and three times as much comes."""
    sent, levels, _ = spend(2.0, 90, lambda k: k % 3 == 0)
    quiet = np.arange(89) % 3 != 0
    np.testing.assert_array_equal(levels[1:][quiet], levels[:-1][quiet])
    bought = 60 * CLIENTS * (2.0 + 2 / 3 * REPORT / PAIR)  # who is not asked sends no report
    assert abs(np.sum(sent[30:]) / bought - 1) < 0.15


@pytest.mark.slow
def test_the_step_is_the_inner_rules(x64):
    inner = aggregate.fipa()
    rule = within_budget(inner, 2.0 * PAIR)
    uploads = cohort(0)
    step, state, _ = apply(rule, uploads, rule.init(PARAMS), PARAMS)
    want, after, _ = apply(inner, uploads, inner.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (step, state.rule), (want, after))


@pytest.mark.parametrize("budget", [0, -50, np.nan, np.inf, "a", None, np.float32(-1), jnp.float32(np.nan)], ids=str)
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match=r"sketch\.budget: needs more than 0 bytes, a finite number, got"):
        within_budget(TAKES_ALL, budget)


@pytest.mark.parametrize("kind", [int, np.float32, jnp.float32, jnp.bfloat16])
def test_a_budget_is_a_number_of_any_kind(kind):
    """One pair of each client: of ten that sent four each, thirty are owed."""
    values = jnp.ones([10, 4])
    deltas = jax.tree.map(lambda leaf: jnp.zeros([10, *leaf.shape]), PARAMS)
    here = jnp.ones(10, bool)
    received = Received(here, here, deltas, Sketch(values, jnp.zeros([10, SIZE, 4])))
    rule = within_budget(TAKES_ALL, kind(4 * SIZE + 4))
    assert float(rule.apply(received, rule.init(PARAMS), PARAMS)[1].left) == 10 - 40


def test_updates_without_sketches_are_refused():
    with pytest.raises(ValueError, match=r"sketch\.budget: needs sketches, got Diagonal"):
        rule = within_budget(aggregate.diagonal(), 100.0)
        uploads = cohort(0)._replace(sketch=Diagonal(jnp.ones([CLIENTS, SIZE])))
        apply(rule, uploads, rule.init(PARAMS), PARAMS)
