"""Each client's latest message, beside a server that keeps dense matrices of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import BETA, COHORTS, DECAY, IDS, LATEST, past_of, quadratics, run, solve
from helpers.rules import CLIENTS, SIZE, Dense, as_tree, assert_close

from fipa_jax import aggregate
from fipa_jax.aggregate import LateUpdates
from fipa_jax.aggregate.screening import without_place


@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("form", ["damped", pytest.param("tikhonov", marks=pytest.mark.slow)])
def test_the_latest_messages_of_absent_clients(x64, form, transport):
    found, infos, _ = run(COHORTS, LATEST, form, ids=IDS, late=LateUpdates(transport=transport))
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
        np.testing.assert_allclose(infos[k]["past_share"], old / total, atol=1e-12)
        theta = theta + solve(form, curvature, pull, bulk)
        assert_close(found[k + 1], theta, 1e-8)


@pytest.mark.parametrize("late", [False, True])
def test_with_all_clients_latest_messages_the_step_is_that_of_all_of_them(x64, late):
    """Quadratic losses, Levenberg-Marquardt's local steps: half of the clients say what all would have said."""
    each, best, cohorts, ids = quadratics(seed=1)
    sent = None
    if late:  # every client began elsewhere
        moved = np.random.default_rng(8).normal(size=(len(ids), CLIENTS, SIZE))
        ages = jnp.ones(CLIENTS, jnp.int32)
        sent = [{"age": ages, "moved": as_tree(way)} for way in moved]
        cohorts = [
            lambda theta, began=began, way=way: began(theta[None] - way)
            for began, way in zip(cohorts, moved, strict=True)
        ]
    found, _, _ = run(cohorts, LATEST, ids=ids, sent=sent, late=LateUpdates(staleness=0.0), hyper={"past.decay": 1.0})
    seen = next(k for k in range(len(ids)) if len(np.unique(ids[: k + 1])) == len(each))
    assert 0 < seen < len(ids) - 1
    for before, after in zip(found[seen:], found[seen + 1 :], strict=False):
        gradient = np.einsum("mpq,mq->p", each, before[None] - best) / len(each)
        wanted = -np.linalg.solve(each.mean(0) + BETA * np.eye(SIZE), gradient)
        assert_close(after - before, wanted, 1e-7)


def test_the_latest_messages_keep_the_clients_own_damping(x64):
    """As above, each client with a damping of its own."""
    each, best, _, ids = quadratics(seed=1)
    damping = np.random.default_rng(5).uniform(0.1, 3, size=(len(ids), CLIENTS))

    def cohort(chosen, own):
        values, basis = np.linalg.eigh(each[chosen])
        regular = each[chosen] + own[:, None, None] * np.eye(SIZE)
        gradient = lambda theta: np.einsum("mpq,mq->mp", each[chosen], theta - best[chosen])
        step = lambda theta: -np.linalg.solve(regular, gradient(theta)[..., None])[..., 0]
        return lambda theta: (step(theta), np.full(CLIENTS, 7), values[:, ::-1], basis[..., ::-1])

    cohorts = [cohort(*both) for both in zip(ids, damping, strict=True)]
    sent = [{"damping": jnp.asarray(own)} for own in damping]
    found, _, _ = run(cohorts, LATEST, ids=ids, sent=sent, own_damping=True, hyper={"past.decay": 1.0})
    gradient = np.einsum("mpq,mq->p", each, found[-2][None] - best) / len(each)
    assert_close(found[-1] - found[-2], -np.linalg.solve(each.mean(0) + BETA * np.eye(SIZE), gradient), 1e-7)


def test_of_a_client_at_fault_the_message_before_stays(x64):
    deltas, counts, values, basis = COHORTS[1]
    spoilt = np.where(np.arange(CLIENTS)[:, None] == 2, np.nan, deltas), counts, values, basis
    _, infos, state = run([COHORTS[0], spoilt], LATEST, ids=IDS[:2])
    _, _, first = run(COHORTS[:1], LATEST, ids=IDS[:1])
    assert IDS[1][2] == 7 == IDS[0][3]
    np.testing.assert_array_equal(past_of(state).sketch.basis[7], past_of(first).sketch.basis[7])
    np.testing.assert_array_equal(past_of(state).deltas[7], past_of(first).deltas[7])
    said = DECAY * (5 + 3 + 7)  # of the clients 5, 2 and, at fault now, 7
    np.testing.assert_allclose(infos[1]["past_share"], said / (said + 5 + 1 + 7))
    np.testing.assert_allclose(past_of(state).weights, [1, 5, 3 * DECAY, 7, 0, 5 * DECAY, 0, 7 * DECAY])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("id_", "reason"),
    [(8, "id_unknown"), (205, "id_unknown"), (-1, "id_unknown"), (int(IDS[1][0]), "id_repeated")],
)
def test_who_has_no_place_of_its_own_is_rejected_and_takes_nobodys(x64, id_, reason):
    """The step, and what is kept, are as without it; NumPy would take -1 for the last one. Of two the first counts."""
    deltas, counts, values, basis = COHORTS[1]
    ids = [np.where(np.arange(CLIENTS) == 2, id_, IDS[1])]
    found, infos, state = run([COHORTS[1]], LATEST, ids=ids)
    fewer = deltas, np.where(np.arange(CLIENTS) == 2, 0, counts), values, basis
    wanted, _, without = run([fewer], LATEST, ids=IDS[1:2])
    assert infos[0]["rejected"].tolist() == infos[0]["reasons"][reason].tolist() == [False, False, True, False]
    assert_close(found[-1], wanted[-1], 1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), past_of(state), past_of(without))


@pytest.mark.parametrize("ids", [[0, 2**32 + 1], [-1, 1 - 2**32], [2**31, 3]])
@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_an_id_that_is_none_is_not_cut_to_that_of_another(ids, kind):
    """Without x64 too, where jax has no integers of 64 bits."""
    ids = np.array(ids).astype(kind)
    params, uploads = {"w": jnp.zeros(3)}, aggregate.Uploads({"w": jnp.ones([2, 3])}, jnp.ones(2), ids=ids)
    found = aggregate.receive(uploads, params)[0].ids
    assert found.tolist() == [int(one) if 0 <= one < 2**31 else -1 for one in ids]


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint32", "int64"])
def test_ids_may_be_integers_of_any_size(kind):
    """Also where the number of clients is none that they hold."""
    ids = np.array([0, 100, 120, 200]).astype(kind)
    uploads = aggregate.Uploads({"w": jnp.ones([4, 3])}, jnp.ones(4), ids=ids)
    received, refused = without_place(aggregate.receive(uploads, {"w": jnp.zeros(3)})[0], 300)
    assert received.ids.dtype == jnp.int32 and received.took_part.all()
    assert not any(clients.any() for clients in refused["reasons"].values())


def test_clients_without_examples_take_nobodys_place(x64):
    """As `uploads.collect` and paddings leave them, whatever their ids."""
    blank = lambda leaf: np.zeros_like(leaf[:2])
    padded = [tuple(np.concatenate([leaf, blank(leaf)]) for leaf in cohort) for cohort in COHORTS]
    more = [[*ids, ids[1], ids[1]] for ids in IDS]
    found, wanted = run(padded, LATEST, ids=more), run(COHORTS, LATEST, ids=IDS)
    assert_close(np.stack(found[0]), np.stack(wanted[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), past_of(found[2]), past_of(wanted[2]))


def test_an_absent_client_that_has_drifted_too_far_has_no_say(x64):
    infos = (run(COHORTS[:2], LATEST, ids=IDS[:2], hyper={"late.max_drift": bound})[1] for bound in (1e9, 1e-9))
    (_, near), (_, far) = infos
    assert far["past_share"] == 0 < near["past_share"]


def test_the_bounds_count_in_what_is_remembered_too(x64):
    deltas, counts, values, basis = COHORTS[1]
    cohorts, ids = [COHORTS[0], (1e-4 * deltas, counts, values, basis)], [[0, 1, 2, 3], [4, 5, 6, 7]]
    free = run(cohorts, LATEST, ids=ids)
    bounded = run(cohorts, LATEST, ids=ids, hyper={"limits.max_step": 5.0, "limits.explosion": 100.0})
    assert bounded[1][1]["fallback"] == 0 and free[1][1]["step_ratio"] > 100
    assert_close(bounded[0][-1], free[0][-1])


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_latest_message_is_cut_or_filled_up_to_its_rank(x64, rank):
    kept = past_of(run(COHORTS[:1], LATEST._replace(rank=rank), ids=IDS[:1])[2]).sketch
    assert kept.eigenvalues.shape == (8, rank) and kept.basis.shape == (8, SIZE, rank)
    same = min(rank, 2)
    np.testing.assert_array_equal(kept.eigenvalues[IDS[0], :same], COHORTS[0][2][:, :same])
    np.testing.assert_array_equal(kept.basis[IDS[0], :, :same], COHORTS[0][3][..., :same])
    assert not np.any(kept.eigenvalues[..., same:])
