"""What the server remembers of past cohorts, beside a server that keeps dense matrices of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import (
    BETA,
    COHORTS,
    DECAY,
    IDS,
    LATEST,
    PRIOR,
    TARGETS,
    past_of,
    quadratics,
    rule_of,
    run,
    solve,
)
from helpers.rules import CLIENTS, SIZE, Dense, as_tree, as_vector, assert_close, each_form, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import PastRounds
from fipa_jax.aggregate.past_rounds import Past

each_past = pytest.mark.parametrize("past", [PRIOR, TARGETS, LATEST], ids=["prior", "targets", "latest"])


@each_form
def test_the_prior_is_one_more_client_that_stays(x64, form):
    theta, weight, curvature = np.zeros(SIZE), 0, 0
    found, infos, state = run(COHORTS, PRIOR, form)
    for k, cohort in enumerate(COHORTS):
        dense, size = Dense(*cohort), cohort[1].sum()
        if not k:  # as if there had been such cohorts before
            weight, curvature = DECAY / (1 - DECAY) * size, dense.total
        else:
            weight = DECAY * weight
        share = size / (size + weight)
        curvature = share * dense.total + (1 - share) * curvature
        theta = theta + solve(form, curvature, share * dense.pull, share * dense.mean)
        weight += size
        assert_close(found[k + 1], theta, 1e-8)
        np.testing.assert_allclose(infos[k]["past_share"], 0 if not k else 1 - share, atol=1e-12)
    remembered = np.asarray(past_of(state).sketch.basis[0]) * np.sqrt(np.asarray(past_of(state).sketch.eigenvalues[0]))
    assert_close(remembered @ remembered.T, curvature, 1e-9)
    np.testing.assert_allclose(past_of(state).weights, [weight])


@each_past
def test_the_step_is_compared_with_fedavgs_without_what_is_remembered(x64, past):
    found, infos, _ = run(COHORTS, past, "damped", ids=IDS)
    for k, cohort in enumerate(COHORTS):
        step, average = found[k + 1] - found[k], Dense(*cohort).mean
        length, other = np.linalg.norm(step), np.linalg.norm(average)
        np.testing.assert_allclose(infos[k]["fedavg_norm_ratio"], length / other, rtol=1e-8)
        np.testing.assert_allclose(infos[k]["fedavg_cosine"], step @ average / (length * other), rtol=1e-8)


@pytest.mark.parametrize("form", ["damped", "tikhonov"])
def test_targets_stay_where_they_were(x64, form):
    """The last three cohorts besides this one, each with its own curvature and where it alone would have gone."""
    found, _, _ = run(COHORTS, TARGETS, form)
    theta, messages = np.zeros(SIZE), []
    for k, cohort in enumerate(COHORTS):
        dense, size = Dense(*cohort), cohort[1].sum()
        parts = [(size, dense.total, dense.pull, dense.mean)]
        for weight, curvature, target in messages[-3:]:
            parts.append((weight, curvature, curvature @ (target - theta), target - theta))
        total = sum(part[0] for part in parts)
        merged = [sum(part[0] / total * part[i] for part in parts) for i in (1, 2, 3)]
        alone = theta + solve(form, dense.total, dense.pull, dense.mean)
        messages = [(DECAY * w, *rest) for w, *rest in messages] + [(DECAY * size, dense.total, alone)]
        theta = theta + solve(form, *merged)
        assert_close(found[k + 1], theta, 1e-8)


def test_prior_and_targets_are_recursive_least_squares(x64):
    """On quadratic losses, all cohorts remembered: the parameters minimise the weighted sum of all rounds' models.

    The damping belongs to each model: with it a cohort's own minimiser is where its damped step leads.
    """
    cohorts = quadratics()[2]
    first, _, state = run(cohorts[:1], PRIOR)
    weight = float(past_of(state).weights[0])
    found = run(cohorts, PRIOR)[0]
    messages, theta = [], np.zeros(SIZE)
    for k, cohort in enumerate(cohorts):
        deltas, counts, values, basis = cohort(theta)
        dense = Dense(deltas, counts, values, basis)
        precision = dense.total + BETA * np.eye(SIZE)
        if not k:
            messages.append([weight * DECAY, precision, theta])
        else:
            messages = [[DECAY * w, *rest] for w, *rest in messages]
        messages.append([counts.sum(), precision, theta + np.linalg.solve(precision, dense.pull + BETA * dense.mean)])
        left = sum(w * matrix for w, matrix, _ in messages)
        theta = np.linalg.solve(left, sum(w * matrix @ target for w, matrix, target in messages))
        assert_close(found[k + 1], theta, 1e-7)
    # As targets: from the state that the prior has after the first round, in which one message says the same.
    longer = TARGETS._replace(length=8)
    rule, _ = rule_of(longer)
    state_of_targets = rule.init(as_tree(first[1]))
    blank = past_of(state_of_targets)
    put = lambda empty, value: empty.at[0].set(value)
    messages = Past(
        jax.tree.map(lambda empty, own: put(empty, own[0]), blank.sketch, past_of(state).sketch),
        put(blank.weights, weight),
        put(blank.targets, first[1]),
    )
    shifted = [lambda theta, cohort=cohort: cohort(theta + first[1]) for cohort in cohorts[1:]]
    moved = messages._replace(targets=put(blank.targets, np.zeros(SIZE)))
    again = run(shifted, longer, state=state_of_targets._replace(solver=(moved, ())))[0]
    for theirs, mine in zip(found[1:], again, strict=True):
        assert_close(mine + first[1], theirs, 1e-7)


def test_past_rounds_restore_what_absent_clients_know(x64):
    """Half of the clients a round: with a prior the parameters stay near the minimum of all, without they do not."""
    each, best, cohorts, _ = quadratics(seed=1)
    wanted = np.linalg.solve(each.sum(0), np.einsum("mpq,mq->p", each, best))
    without, slow = run(9 * cohorts), run(9 * cohorts, PRIOR, hyper={"past.decay": 0.9})
    distances = [np.mean([np.linalg.norm(theta - wanted) for theta in found[0][30:]]) for found in (slow, without)]
    assert distances[0] < 0.5 * distances[1]


@pytest.mark.parametrize("past", [PRIOR, TARGETS], ids=["prior", "targets"])
def test_without_a_past_it_is_the_rule_that_remembers_nothing(x64, past):
    assert_close(run(COHORTS, past, hyper={"past.decay": 0.0})[0][-1], run(COHORTS)[0][-1], 1e-9)


def test_with_a_large_damping_the_prior_is_fedavg_at_a_server_step(x64):
    visited = run(COHORTS[:1] * 3, PRIOR, hyper={"damping": 1e9})[0]
    assert_close(visited[-1], 3 * (1 - DECAY) * Dense(*COHORTS[0]).mean, 1e-7)


@each_past
def test_a_round_that_nobody_took_part_in_only_ages_the_past(x64, past):
    nobody = (*COHORTS[0][:1], np.zeros(CLIENTS, int), *COHORTS[0][2:])
    before, after = (past_of(run(cohorts, past, ids=IDS)[2]) for cohorts in (COHORTS[:2], [*COHORTS[:2], nobody]))
    np.testing.assert_allclose(after.weights, DECAY * before.weights)
    np.testing.assert_array_equal(after.sketch.basis, before.sketch.basis)


def test_a_client_at_fault_is_not_remembered(x64):
    deltas, counts, values, basis = COHORTS[1]
    spoilt = np.where(np.arange(CLIENTS)[:, None] == 2, np.nan, deltas), counts, values, basis
    without = deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), values, basis
    faulty, absent = (run([COHORTS[0], cohort, COHORTS[2]], PRIOR) for cohort in (spoilt, without))
    np.testing.assert_array_equal(faulty[0][-1], absent[0][-1])
    jax.tree.map(np.testing.assert_array_equal, past_of(faulty[2]), past_of(absent[2]))


def test_relative_damping_counts_in_units_of_what_is_merged(x64):
    hyper = {"damping": 0.05}
    visited, infos, _ = run(COHORTS, PRIOR, relative=True, hyper=hyper)
    beta = 0.05 * infos[-1]["spectrum"][0]
    state = run(COHORTS[:-1], PRIOR, relative=True, hyper=hyper)[2]
    again = run(COHORTS[-1:], PRIOR, relative=True, state=state)[0]
    absolute = run(COHORTS[-1:], PRIOR, state=state, hyper={"damping": beta})[0]
    assert_close(again[-1], absolute[-1])
    assert_close(visited[-1] - visited[-2], again[-1])  # the prior does not look at where the parameters are


def test_a_failing_step_gives_way_with_past_rounds_too(x64):
    visited, infos, state = run(COHORTS, PRIOR, hyper={"limits.explosion": 1e-9})
    assert all(info["fallback"] == 2 for info in infos) and np.all(np.isfinite(visited))
    assert np.all(np.isfinite(past_of(state).sketch.basis))


@pytest.mark.slow
@each_past
def test_in_float32_it_is_that_of_float64(past):
    with jax.enable_x64(True):
        wanted = run(COHORTS, past, ids=IDS)[0][-1]
    rule, compiled = rule_of(past)
    theta = np.zeros(SIZE, np.float32)
    state = rule.init(as_tree(theta))
    for cohort, ids in zip(COHORTS, IDS, strict=True):
        uploads = uploads_of(*cohort, dtype=np.float32)._replace(ids=jnp.asarray(ids))
        step, state, _ = compiled(uploads, state, as_tree(theta))
        theta = theta + as_vector(step)
    assert theta.dtype == np.float32
    assert_close(theta, wanted, 1e-5)


def test_a_low_rank_keeps_the_largest_part(x64):
    low = PRIOR._replace(rank=3)
    kept = past_of(run(COHORTS, low)[2]).sketch
    assert kept.eigenvalues.shape == (1, 3) and kept.basis.shape == (1, SIZE, 3)
    assert_close(np.asarray(kept.basis[0].T @ kept.basis[0]), np.eye(3), 1e-9)
    first = past_of(run(COHORTS[:1], low)[2]).sketch.eigenvalues[0]
    np.testing.assert_allclose(first, np.linalg.eigvalsh(Dense(*COHORTS[0]).total)[::-1][:3], rtol=1e-9)


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (
            PastRounds("targts"),
            "aggregator.past.kind: unknown 'targts'; known: curvature, .*, prior, targets",
        ),
        (PRIOR._replace(rank=0), "aggregator.past.rank: needs at least 1, got 0"),
        (TARGETS._replace(length=0), "aggregator.past.length: needs at least 1, got 0"),
        (PRIOR._replace(decay=1.0), "aggregator.past.decay: needs"),
        (LATEST._replace(decay=1.1), "aggregator.past.decay: needs"),
        (LATEST._replace(num_clients=0), "aggregator.past.kind: 'latest' needs the number of all clients"),
    ],
)
def test_what_does_not_fit_is_named(past, message):
    with pytest.raises(ValueError, match=message):
        aggregate.fipa(past=past)
