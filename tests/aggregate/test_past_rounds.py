"""What the server remembers of past cohorts, beside a server that keeps dense matrices of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import BETA, COHORTS, DECAY, FREE, IDS, LATEST, PRIOR, TARGETS, quadratics, rule_of, run, solve
from helpers.rules import CLIENTS, SIZE, Dense, as_tree, as_vector, assert_close, clients_of, each_form, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import past_rounds as past


@each_form
def test_the_prior_is_one_more_client_that_stays(x64, form):
    theta, weight, curvature = np.zeros(SIZE), 0, 0
    found, infos, state = run(COHORTS, form, **PRIOR)
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
        np.testing.assert_allclose(infos[k]["memory_share"], 0 if not k else 1 - share, atol=1e-12)
    remembered = np.asarray(state.past.sketch.basis[0]) * np.sqrt(np.asarray(state.past.sketch.eigenvalues[0]))
    assert_close(remembered @ remembered.T, curvature, 1e-9)
    np.testing.assert_allclose(state.past.weights, [weight])


@pytest.mark.parametrize("form", ["damped", "tikhonov"])
def test_targets_stay_where_they_were(x64, form):
    """The last three cohorts besides this one, each with its own curvature and where it alone would have gone."""
    found, _, _ = run(COHORTS, form, **TARGETS)
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


def test_both_memories_are_recursive_least_squares(x64):
    """On quadratic losses, all cohorts remembered: the parameters minimise the weighted sum of all rounds' models.

    The damping belongs to each model: with it a cohort's own minimiser is where its damped step leads.
    """
    cohorts = quadratics()[2]
    first, _, state = run(cohorts[:1], **PRIOR)
    weight = float(state.past.weights[0])
    found = run(cohorts, **PRIOR)[0]
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
    rule, _ = rule_of("damped", **TARGETS | {"memory_length": 8})
    blank = rule.init(as_tree(first[1]))
    put = lambda empty, value: empty.at[0].set(value)
    messages = past.Past(
        jax.tree.map(lambda empty, own: put(empty, own[0]), blank.past.sketch, state.past.sketch),
        put(blank.past.weights, weight),
        put(blank.past.targets, first[1]),
    )
    shifted = [lambda theta, cohort=cohort: cohort(theta + first[1]) for cohort in cohorts[1:]]
    moved = messages._replace(targets=put(blank.past.targets, np.zeros(SIZE)))
    again = run(shifted, state=blank._replace(past=moved), **TARGETS | {"memory_length": 8})[0]
    for theirs, mine in zip(found[1:], again, strict=True):
        assert_close(mine + first[1], theirs, 1e-7)


def test_the_memory_restores_what_absent_clients_know(x64):
    """Half of the clients a round: with a memory the parameters stay near the minimum of all, without they do not."""
    each, best, cohorts, _ = quadratics(seed=1)
    wanted = np.linalg.solve(each.sum(0), np.einsum("mpq,mq->p", each, best))
    distance = lambda **options: np.mean([np.linalg.norm(t - wanted) for t in run(9 * cohorts, **options)[0][30:]])
    without, slow = distance(**FREE), distance(**PRIOR | {"memory_decay": 0.9})
    assert slow < 0.5 * without


@pytest.mark.parametrize("kind", [PRIOR, TARGETS], ids=["prior", "targets"])
def test_without_a_past_it_is_the_rule_without_memory(x64, kind):
    assert_close(run(COHORTS, **kind | {"memory_decay": 0.0})[0][-1], run(COHORTS, **FREE)[0][-1], 1e-9)


def test_with_a_large_damping_the_prior_is_fedavg_at_a_server_step(x64):
    found = run(COHORTS[:1] * 3, **PRIOR | {"damping": 1e9})[0]
    assert_close(found[-1], 3 * (1 - DECAY) * Dense(*COHORTS[0]).mean, 1e-7)


@pytest.mark.parametrize("kind", [PRIOR, TARGETS, LATEST], ids=["prior", "targets", "latest"])
def test_a_round_that_nobody_took_part_in_only_ages_the_memory(x64, kind):
    nobody = (*COHORTS[0][:1], np.zeros(CLIENTS, int), *COHORTS[0][2:])
    _, _, before = run(COHORTS[:2], ids=IDS, **kind)
    _, _, after = run([*COHORTS[:2], nobody], ids=IDS, **kind)
    np.testing.assert_allclose(after.past.weights, DECAY * before.past.weights)
    np.testing.assert_array_equal(after.past.sketch.basis, before.past.sketch.basis)


def test_a_client_at_fault_is_not_remembered(x64):
    deltas, counts, values, basis = COHORTS[1]
    spoilt = np.where(np.arange(CLIENTS)[:, None] == 2, np.nan, deltas), counts, values, basis
    without = deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), values, basis
    found = [run([COHORTS[0], cohort, COHORTS[2]], **PRIOR) for cohort in (spoilt, without)]
    np.testing.assert_array_equal(found[0][0][-1], found[1][0][-1])
    jax.tree.map(np.testing.assert_array_equal, found[0][2].past, found[1][2].past)


def test_relative_damping_counts_in_units_of_what_is_merged(x64):
    options = PRIOR | {"relative": True, "damping": 0.05}
    found, infos, _ = run(COHORTS, **options)
    beta = 0.05 * infos[-1]["spectrum"][0]
    again = run(COHORTS[-1:], state=run(COHORTS[:-1], **options)[2], **options)[0]
    absolute = run(COHORTS[-1:], state=run(COHORTS[:-1], **options)[2]._replace(damping=jnp.asarray(beta)), **PRIOR)[0]
    assert_close(again[-1], absolute[-1])
    assert_close(found[-1] - found[-2], again[-1])  # the prior does not look at where the parameters are


def test_a_failing_step_gives_way_with_a_memory_too(x64):
    options = PRIOR | {"explosion": 1e-9}
    found, infos, state = run(COHORTS, **options)
    assert all(info["fallback"] == 2 for info in infos) and np.all(np.isfinite(found))
    assert np.all(np.isfinite(state.past.sketch.basis))


@pytest.mark.parametrize("kind", [PRIOR, TARGETS, LATEST], ids=["prior", "targets", "latest"])
def test_in_float32_it_is_that_of_float64(kind):
    with jax.enable_x64(True):
        wanted = run(COHORTS, ids=IDS, **kind)[0][-1]
    rule = aggregate.fipa("damped", **kind)
    apply, state, theta = (
        jax.jit(rule.apply),
        rule.init(as_tree(np.zeros(SIZE, np.float32))),
        np.zeros(SIZE, np.float32),
    )
    for cohort, ids in zip(COHORTS, IDS, strict=True):
        uploads = uploads_of(*cohort, dtype=np.float32)._replace(ids=jnp.asarray(ids))
        step, state, _ = apply(uploads, state, as_tree(theta))
        theta = theta + as_vector(step)
    assert_close(theta, wanted, 1e-5)


def test_a_low_rank_keeps_the_largest_part(x64):
    kept = run(COHORTS, **PRIOR | {"memory_rank": 3})[2].past.sketch
    assert kept.eigenvalues.shape == (1, 3) and kept.basis.shape == (1, SIZE, 3)
    assert_close(np.asarray(kept.basis[0].T @ kept.basis[0]), np.eye(3), 1e-9)
    first = run(COHORTS[:1], **PRIOR | {"memory_rank": 3})[2].past.sketch.eigenvalues[0]
    np.testing.assert_allclose(first, np.linalg.eigvalsh(Dense(*COHORTS[0]).total)[::-1][:3], rtol=1e-9)


def test_own_damping_undoes_what_the_clients_have_added(x64):
    """Whatever each client's damping, (H_m + beta_m I)^{-1} of its gradient: the step is Levenberg-Marquardt's."""
    draw = np.random.default_rng(3)
    _, counts, values, basis = clients_of(SIZE)
    each = np.einsum("cpr,cr,cqr->cpq", basis, values, basis)
    gradients, damping = draw.normal(size=(CLIENTS, SIZE)), draw.uniform(0.01, 9, CLIENTS)
    deltas = -np.linalg.solve(each + damping[:, None, None] * np.eye(SIZE), gradients[..., None])[..., 0]
    weights = counts / counts.sum()
    wanted = -np.linalg.solve(np.tensordot(weights, each, 1) + BETA * np.eye(SIZE), weights @ gradients)
    options = FREE | {"own_damping": True}
    assert_close(
        run([(deltas, counts, values, basis)], sent=[{"damping": jnp.asarray(damping)}], **options)[0][-1],
        wanted,
        1e-9,
    )
    there = np.arange(CLIENTS) != 1
    without = run(
        [(deltas, np.where(there, counts, 0), values, basis)], sent=[{"damping": jnp.asarray(damping)}], **options
    )[0][-1]
    for wrong in (-1.0, np.nan, np.inf):
        sent = [{"damping": jnp.asarray(np.where(there, damping, wrong))}]
        found, (info,), _ = run([(deltas, counts, values, basis)], sent=sent, **options)
        np.testing.assert_array_equal(info["reasons"]["damping_invalid"], ~there)
        np.testing.assert_array_equal(found[-1], without)


def test_the_bound_in_curvature_norm_shortens_the_step_and_does_not_turn_it(x64):
    free, bounded = run(COHORTS[:1], **FREE), run(COHORTS[:1], **FREE | {"max_divergence": 0.01})
    step = free[0][-1]
    np.testing.assert_allclose(free[1][0]["divergence"], step @ Dense(*COHORTS[0]).total @ step / 2, rtol=1e-9)
    assert free[1][0]["divergence"] > 0.01
    np.testing.assert_allclose(bounded[1][0]["divergence"], 0.01, rtol=1e-9)
    assert_close(bounded[0][-1] / np.linalg.norm(bounded[0][-1]), step / np.linalg.norm(step), 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "targts"}, "aggregator.past.kind: unknown 'targts'; known: none, prior, targets, latest"),
        ({"memory": "prior", "memory_rank": 0}, "aggregator.past: needs a rank"),
        ({"memory": "prior", "trust": True}, "aggregator.trust: needs all clients"),
        ({"memory": "prior", "memory_decay": 1.0}, "aggregator.past.decay: needs"),
        ({"memory": "latest"}, "aggregator.past.kind: 'latest' needs the number of all clients"),
        ({"memory": "latest", "num_clients": 3, "memory_decay": 1.1}, "aggregator.past.decay: needs"),
        ({"own_damping": True}, "aggregator.own_damping: needs"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        aggregate.fipa(**options)


def test_own_damping_needs_the_clients(x64):
    given, counts = uploads_of(*COHORTS[0]), COHORTS[0][1]
    with pytest.raises(ValueError, match=r"uploads\.damping"):
        aggregate.fipa_step(given.delta, given.sketch, counts, relative=False, own_damping=True)
