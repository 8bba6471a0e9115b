"""What the server remembers of past cohorts, beside a server that keeps dense matrices of all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import CLIENTS, SIZE, Dense, as_tree, as_vector, assert_close, clients_of, each_form, uploads_of

from fipa_jax import aggregate, past

DECAY, BETA, ROUNDS = 0.7, 0.3, 5
FREE = {"relative": False, "damping": BETA, "max_step": 0.0, "explosion": 0.0, "trace_cap": 0.0, "rcond": 1e-9}
PRIOR = FREE | {"memory": "prior", "memory_decay": DECAY, "memory_rank": SIZE}
TARGETS = PRIOR | {"memory": "targets", "memory_length": 3}


@functools.cache
def _rule(form, **options):
    rule = aggregate.fipa(form, **options)
    return rule, jax.jit(rule.apply)


LATEST = PRIOR | {"memory": "latest", "num_clients": 8}


def _run(cohorts, form="damped", state=None, ids=None, sent=None, **options):
    """(the parameters [P] before each round and at the end, the infos, the last state).

    `sent` holds other fields of each round's uploads.
    """
    rule, apply = _rule(form, **options)
    theta, found, infos = np.zeros(SIZE), [], []
    state = state or rule.init(as_tree(theta))
    for k, cohort in enumerate(cohorts):
        found.append(theta)
        uploads = uploads_of(*(cohort(theta) if callable(cohort) else cohort))
        uploads = uploads._replace(ids=None if ids is None else jnp.asarray(ids[k]), **(sent[k] if sent else {}))
        step, state, info = apply(uploads, state, as_tree(theta))
        theta = theta + as_vector(step)
        infos.append(jax.tree.map(np.asarray, info))
    return [*found, theta], infos, state


def _solve(form, curvature, pull, bulk):
    """The form's step by a dense H, sum_m w_m H_m delta_m and sum_m w_m delta_m."""
    if form == "pinv":
        return np.linalg.pinv(curvature, rcond=FREE["rcond"], hermitian=True) @ pull
    regular = curvature + BETA * np.eye(SIZE)
    return np.linalg.solve(regular, pull + (BETA * bulk if form == "damped" else 0))


COHORTS = [clients_of(2, seed) for seed in range(ROUNDS)]


@each_form
def test_the_prior_is_one_more_client_that_stays(x64, form):
    theta, weight, curvature = np.zeros(SIZE), 0, 0
    found, infos, state = _run(COHORTS, form, **PRIOR)
    for k, cohort in enumerate(COHORTS):
        dense, size = Dense(*cohort), cohort[1].sum()
        if not k:  # as if there had been such cohorts before
            weight, curvature = DECAY / (1 - DECAY) * size, dense.total
        else:
            weight = DECAY * weight
        share = size / (size + weight)
        curvature = share * dense.total + (1 - share) * curvature
        theta = theta + _solve(form, curvature, share * dense.pull, share * dense.mean)
        weight += size
        assert_close(found[k + 1], theta, 1e-8)
        np.testing.assert_allclose(infos[k]["memory_share"], 0 if not k else 1 - share, atol=1e-12)
    remembered = np.asarray(state.past.sketch.basis[0]) * np.sqrt(np.asarray(state.past.sketch.eigenvalues[0]))
    assert_close(remembered @ remembered.T, curvature, 1e-9)
    np.testing.assert_allclose(state.past.weights, [weight])


@pytest.mark.parametrize("form", ["damped", "tikhonov"])
def test_targets_stay_where_they_were(x64, form):
    """The last three cohorts besides this one, each with its own curvature and where it alone would have gone."""
    found, _, _ = _run(COHORTS, form, **TARGETS)
    theta, messages = np.zeros(SIZE), []
    for k, cohort in enumerate(COHORTS):
        dense, size = Dense(*cohort), cohort[1].sum()
        parts = [(size, dense.total, dense.pull, dense.mean)]
        for weight, curvature, target in messages[-3:]:
            parts.append((weight, curvature, curvature @ (target - theta), target - theta))
        total = sum(part[0] for part in parts)
        merged = [sum(part[0] / total * part[i] for part in parts) for i in (1, 2, 3)]
        alone = theta + _solve(form, dense.total, dense.pull, dense.mean)
        messages = [(DECAY * w, *rest) for w, *rest in messages] + [(DECAY * size, dense.total, alone)]
        theta = theta + _solve(form, *merged)
        assert_close(found[k + 1], theta, 1e-8)


def _quadratics(seed=0, number=8):
    """The losses |theta - best_m|^2_{H_m} / 2 of eight clients, cohorts of four of them with exact steps, their ids."""
    draw = np.random.default_rng(seed)
    roots, best = draw.normal(size=(number, SIZE, SIZE)), draw.normal(size=(number, SIZE))
    each = np.einsum("mpq,mrq->mpr", roots, roots)

    def cohort(ids):
        values, basis = np.linalg.eigh(each[ids])
        regular = each[ids] + BETA * np.eye(SIZE)
        step = lambda theta: -np.linalg.solve(regular, np.einsum("mpq,mq->mp", each[ids], theta - best[ids])[..., None])
        return lambda theta: (step(theta)[..., 0], np.full(CLIENTS, 7), values[:, ::-1], basis[..., ::-1])

    ids = [draw.permutation(number)[:CLIENTS] for _ in range(6)]
    return each, best, [cohort(chosen) for chosen in ids], ids


def test_both_memories_are_recursive_least_squares(x64):
    """On quadratic losses, all cohorts remembered: the parameters minimise the weighted sum of all rounds' models.

    The damping belongs to each model: with it a cohort's own minimiser is where its damped step leads.
    """
    cohorts = _quadratics()[2]
    first, _, state = _run(cohorts[:1], **PRIOR)
    weight = float(state.past.weights[0])
    found = _run(cohorts, **PRIOR)[0]
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
    rule, _ = _rule("damped", **TARGETS | {"memory_length": 8})
    blank = rule.init(as_tree(first[1]))
    put = lambda empty, value: empty.at[0].set(value)
    messages = past.Past(
        jax.tree.map(lambda empty, own: put(empty, own[0]), blank.past.sketch, state.past.sketch),
        put(blank.past.weights, weight),
        put(blank.past.targets, first[1]),
    )
    shifted = [lambda theta, cohort=cohort: cohort(theta + first[1]) for cohort in cohorts[1:]]
    moved = messages._replace(targets=put(blank.past.targets, np.zeros(SIZE)))
    again = _run(shifted, state=blank._replace(past=moved), **TARGETS | {"memory_length": 8})[0]
    for theirs, mine in zip(found[1:], again, strict=True):
        assert_close(mine + first[1], theirs, 1e-7)


def test_the_memory_restores_what_absent_clients_know(x64):
    """Half of the clients a round: with a memory the parameters stay near the minimum of all, without they do not."""
    each, best, cohorts, _ = _quadratics(seed=1)
    wanted = np.linalg.solve(each.sum(0), np.einsum("mpq,mq->p", each, best))
    distance = lambda **options: np.mean([np.linalg.norm(t - wanted) for t in _run(9 * cohorts, **options)[0][30:]])
    without, slow = distance(**FREE), distance(**PRIOR | {"memory_decay": 0.9})
    assert slow < 0.5 * without


IDS = [[5, 0, 2, 7], [1, 0, 7, 3], [4, 5, 1, 6], [2, 3, 0, 4], [6, 7, 5, 1]]


@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("form", ["damped", "tikhonov"])
def test_the_latest_messages_of_absent_clients(x64, form, transport):
    found, infos, _ = _run(COHORTS, form, ids=IDS, transport=transport, **LATEST)
    theta, said = np.zeros(SIZE), {}
    for k, (cohort, ids) in enumerate(zip(COHORTS, IDS, strict=True)):
        deltas, counts, _, _ = cohort
        said = {m: (DECAY * weight, *rest) for m, (weight, *rest) in said.items()}
        old = sum(weight for m, (weight, *_) in said.items() if m not in ids)
        new = zip(ids, counts, deltas, Dense(*cohort).each, strict=True)
        said |= {m: (count, curvature, theta, delta) for m, count, delta, curvature in new}
        total = sum(weight for weight, *_ in said.values())
        curvature = pull = bulk = 0
        for weight, matrix, start, delta in said.values():
            left = delta - (theta - start) if transport else delta
            curvature, pull = curvature + weight / total * matrix, pull + weight / total * matrix @ left
            bulk = bulk + weight / total * delta
        np.testing.assert_allclose(infos[k]["memory_share"], old / total, atol=1e-12)
        theta = theta + _solve(form, curvature, pull, bulk)
        assert_close(found[k + 1], theta, 1e-8)


@pytest.mark.parametrize("late", [False, True])
def test_with_all_clients_latest_messages_the_step_is_that_of_all_of_them(x64, late):
    """Quadratic losses, Levenberg-Marquardt's local steps: half of the clients say what all would have said."""
    each, best, cohorts, ids = _quadratics(seed=1)
    sent, options = None, LATEST | {"memory_decay": 1.0, "staleness": 0.0}
    if late:  # every client began elsewhere
        moved = np.random.default_rng(8).normal(size=(len(ids), CLIENTS, SIZE))
        ages = jnp.ones(CLIENTS, jnp.int32)
        sent = [{"age": ages, "moved": as_tree(way)} for way in moved]
        cohorts = [
            lambda theta, began=began, way=way: began(theta[None] - way)
            for began, way in zip(cohorts, moved, strict=True)
        ]
    found, _, _ = _run(cohorts, ids=ids, sent=sent, **options)
    seen = next(k for k in range(len(ids)) if len(np.unique(ids[: k + 1])) == len(each))
    assert 0 < seen < len(ids) - 1
    for before, after in zip(found[seen:], found[seen + 1 :], strict=False):
        gradient = np.einsum("mpq,mq->p", each, before[None] - best) / len(each)
        wanted = -np.linalg.solve(each.mean(0) + BETA * np.eye(SIZE), gradient)
        assert_close(after - before, wanted, 1e-7)


def test_the_latest_messages_keep_the_clients_own_damping(x64):
    """As above, each client with a damping of its own."""
    each, best, _, ids = _quadratics(seed=1)
    damping = np.random.default_rng(5).uniform(0.1, 3, size=(len(ids), CLIENTS))

    def cohort(chosen, own):
        values, basis = np.linalg.eigh(each[chosen])
        regular = each[chosen] + own[:, None, None] * np.eye(SIZE)
        gradient = lambda theta: np.einsum("mpq,mq->mp", each[chosen], theta - best[chosen])
        step = lambda theta: -np.linalg.solve(regular, gradient(theta)[..., None])[..., 0]
        return lambda theta: (step(theta), np.full(CLIENTS, 7), values[:, ::-1], basis[..., ::-1])

    cohorts = [cohort(*both) for both in zip(ids, damping, strict=True)]
    found, _, _ = _run(
        cohorts,
        ids=ids,
        sent=[{"damping": jnp.asarray(own)} for own in damping],
        own_damping=True,
        **LATEST | {"memory_decay": 1.0},
    )
    gradient = np.einsum("mpq,mq->p", each, found[-2][None] - best) / len(each)
    assert_close(found[-1] - found[-2], -np.linalg.solve(each.mean(0) + BETA * np.eye(SIZE), gradient), 1e-7)


def test_of_a_client_at_fault_the_message_before_stays(x64):
    deltas, counts, values, basis = COHORTS[1]
    spoilt = np.where(np.arange(CLIENTS)[:, None] == 2, np.nan, deltas), counts, values, basis
    _, infos, state = _run([COHORTS[0], spoilt], ids=IDS[:2], **LATEST)
    _, _, first = _run(COHORTS[:1], ids=IDS[:1], **LATEST)
    assert IDS[1][2] == 7 == IDS[0][3]
    np.testing.assert_array_equal(state.past.sketch.basis[7], first.past.sketch.basis[7])
    np.testing.assert_array_equal(state.past.deltas[7], first.past.deltas[7])
    said = DECAY * (5 + 3 + 7)  # of the clients 5, 2 and, at fault now, 7
    np.testing.assert_allclose(infos[1]["memory_share"], said / (said + 5 + 1 + 7))
    np.testing.assert_allclose(state.past.weights, [1, 5, 3 * DECAY, 7, 0, 5 * DECAY, 0, 7 * DECAY])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_clients_without_examples_take_nobodys_place(x64):
    """As `uploads.collect` and paddings leave them, whatever their ids."""
    blank = lambda leaf: np.zeros_like(leaf[:2])
    padded = [tuple(np.concatenate([leaf, blank(leaf)]) for leaf in cohort) for cohort in COHORTS]
    more = [[*ids, ids[1], ids[1]] for ids in IDS]
    found, wanted = _run(padded, ids=more, **LATEST), _run(COHORTS, ids=IDS, **LATEST)
    assert_close(np.stack(found[0]), np.stack(wanted[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found[2].past, wanted[2].past)


def test_an_absent_client_that_has_drifted_too_far_has_no_say(x64):
    near, far = (_run(COHORTS[:2], ids=IDS[:2], max_drift=bound, **LATEST)[1][1] for bound in (1e9, 1e-9))
    assert far["memory_share"] == 0 < near["memory_share"]


def test_the_bounds_count_in_what_is_remembered_too(x64):
    deltas, counts, values, basis = COHORTS[1]
    cohorts, ids = [COHORTS[0], (1e-4 * deltas, counts, values, basis)], [[0, 1, 2, 3], [4, 5, 6, 7]]
    free = _run(cohorts, ids=ids, **LATEST)
    bounded = _run(cohorts, ids=ids, **LATEST | {"max_step": 5.0, "explosion": 100.0})
    assert bounded[1][1]["fallback"] == 0 and free[1][1]["step_ratio"] > 100
    assert_close(bounded[0][-1], free[0][-1])


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_latest_message_is_cut_or_filled_up_to_its_rank(x64, rank):
    kept = _run(COHORTS[:1], ids=IDS[:1], **LATEST | {"memory_rank": rank})[2].past.sketch
    assert kept.eigenvalues.shape == (8, rank) and kept.basis.shape == (8, SIZE, rank)
    same = min(rank, 2)
    np.testing.assert_array_equal(kept.eigenvalues[IDS[0], :same], COHORTS[0][2][:, :same])
    np.testing.assert_array_equal(kept.basis[IDS[0], :, :same], COHORTS[0][3][..., :same])
    assert not np.any(kept.eigenvalues[..., same:])


@pytest.mark.parametrize("kind", [PRIOR, TARGETS], ids=["prior", "targets"])
def test_without_a_past_it_is_the_rule_without_memory(x64, kind):
    assert_close(_run(COHORTS, **kind | {"memory_decay": 0.0})[0][-1], _run(COHORTS, **FREE)[0][-1], 1e-9)


def test_with_a_large_damping_the_prior_is_fedavg_at_a_server_step(x64):
    found = _run(COHORTS[:1] * 3, **PRIOR | {"damping": 1e9})[0]
    assert_close(found[-1], 3 * (1 - DECAY) * Dense(*COHORTS[0]).mean, 1e-7)


@pytest.mark.parametrize("kind", [PRIOR, TARGETS, LATEST], ids=["prior", "targets", "latest"])
def test_a_round_that_nobody_took_part_in_only_ages_the_memory(x64, kind):
    nobody = (*COHORTS[0][:1], np.zeros(CLIENTS, int), *COHORTS[0][2:])
    _, _, before = _run(COHORTS[:2], ids=IDS, **kind)
    _, _, after = _run([*COHORTS[:2], nobody], ids=IDS, **kind)
    np.testing.assert_allclose(after.past.weights, DECAY * before.past.weights)
    np.testing.assert_array_equal(after.past.sketch.basis, before.past.sketch.basis)


def test_a_client_at_fault_is_not_remembered(x64):
    deltas, counts, values, basis = COHORTS[1]
    spoilt = np.where(np.arange(CLIENTS)[:, None] == 2, np.nan, deltas), counts, values, basis
    without = deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), values, basis
    found = [_run([COHORTS[0], cohort, COHORTS[2]], **PRIOR) for cohort in (spoilt, without)]
    np.testing.assert_array_equal(found[0][0][-1], found[1][0][-1])
    jax.tree.map(np.testing.assert_array_equal, found[0][2].past, found[1][2].past)


def test_relative_damping_counts_in_units_of_what_is_merged(x64):
    options = PRIOR | {"relative": True, "damping": 0.05}
    found, infos, _ = _run(COHORTS, **options)
    beta = 0.05 * infos[-1]["spectrum"][0]
    again = _run(COHORTS[-1:], state=_run(COHORTS[:-1], **options)[2], **options)[0]
    absolute = _run(COHORTS[-1:], state=_run(COHORTS[:-1], **options)[2]._replace(damping=jnp.asarray(beta)), **PRIOR)[
        0
    ]
    assert_close(again[-1], absolute[-1])
    assert_close(found[-1] - found[-2], again[-1])  # the prior does not look at where the parameters are


def test_a_failing_step_gives_way_with_a_memory_too(x64):
    options = PRIOR | {"explosion": 1e-9}
    found, infos, state = _run(COHORTS, **options)
    assert all(info["fallback"] == 2 for info in infos) and np.all(np.isfinite(found))
    assert np.all(np.isfinite(state.past.sketch.basis))


@pytest.mark.parametrize("kind", [PRIOR, TARGETS, LATEST], ids=["prior", "targets", "latest"])
def test_in_float32_it_is_that_of_float64(kind):
    with jax.enable_x64(True):
        wanted = _run(COHORTS, ids=IDS, **kind)[0][-1]
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
    kept = _run(COHORTS, **PRIOR | {"memory_rank": 3})[2].past.sketch
    assert kept.eigenvalues.shape == (1, 3) and kept.basis.shape == (1, SIZE, 3)
    assert_close(np.asarray(kept.basis[0].T @ kept.basis[0]), np.eye(3), 1e-9)
    first = _run(COHORTS[:1], **PRIOR | {"memory_rank": 3})[2].past.sketch.eigenvalues[0]
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
        _run([(deltas, counts, values, basis)], sent=[{"damping": jnp.asarray(damping)}], **options)[0][-1],
        wanted,
        1e-9,
    )
    there = np.arange(CLIENTS) != 1
    without = _run(
        [(deltas, np.where(there, counts, 0), values, basis)], sent=[{"damping": jnp.asarray(damping)}], **options
    )[0][-1]
    for wrong in (-1.0, np.nan, np.inf):
        sent = [{"damping": jnp.asarray(np.where(there, damping, wrong))}]
        found, (info,), _ = _run([(deltas, counts, values, basis)], sent=sent, **options)
        np.testing.assert_array_equal(info["reasons"]["damping_invalid"], ~there)
        np.testing.assert_array_equal(found[-1], without)


def test_the_bound_in_curvature_norm_shortens_the_step_and_does_not_turn_it(x64):
    free, bounded = _run(COHORTS[:1], **FREE), _run(COHORTS[:1], **FREE | {"max_divergence": 0.01})
    step = free[0][-1]
    np.testing.assert_allclose(free[1][0]["divergence"], step @ Dense(*COHORTS[0]).total @ step / 2, rtol=1e-9)
    assert free[1][0]["divergence"] > 0.01
    np.testing.assert_allclose(bounded[1][0]["divergence"], 0.01, rtol=1e-9)
    assert_close(bounded[0][-1] / np.linalg.norm(bounded[0][-1]), step / np.linalg.norm(step), 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "targts"}, "aggregator.memory: unknown 'targts'; known: none, prior, targets, latest"),
        ({"memory": "prior", "memory_rank": 0}, "aggregator.memory: needs memory_rank"),
        ({"memory": "prior", "trust": True}, "aggregator.trust: needs all clients"),
        ({"memory": "prior", "memory_decay": 1.0}, "aggregator.memory_decay: needs"),
        ({"memory": "latest"}, "aggregator.memory: 'latest' needs the number of all clients"),
        ({"memory": "latest", "num_clients": 3, "memory_decay": 1.1}, "aggregator.memory_decay: needs"),
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
