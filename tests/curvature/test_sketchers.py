"""Wrappers of a sketcher: the curvature of views, and random numbers that all clients share."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import curvature

EXAMPLES, WIDTH = 6, 3


def _model(params, batch):
    """(outputs [B, 1], features): least squares, whose curvature is that of the inputs."""
    return (batch["x"] @ params["w"])[:, None], types.SimpleNamespace(last=batch["x"])


def _loss(out, batch):
    return (out[:, 0] - batch["y"]) ** 2 / 2


def _augment(key, batch):
    return batch | {"x": batch["x"] * jax.random.rademacher(key, [EXAMPLES, 1], batch["x"].dtype) + 1}


def test_the_sketch_is_of_views():
    """Of the inputs as the augmentation shows them, with whatever the rule asks along handed on."""
    asked = []

    def of_client(outputs, params, key, batch, mask, *more):
        asked.extend(more)
        seen.append(batch)
        return compiled(params, key, batch, mask)

    seen = []
    bare = curvature.plain(lambda outputs, _: curvature.make_sketch(outputs, _loss, rank=WIDTH, solver="rows"))
    compiled = jax.jit(lambda *given: bare.of_client(_model, *given))
    draw = np.random.default_rng(0)
    batch = {"x": jnp.asarray(draw.normal(size=(EXAMPLES, WIDTH))), "y": jnp.zeros(EXAMPLES)}
    params, mask = {"w": jnp.ones(WIDTH)}, jnp.arange(EXAMPLES) < 4
    wrapped = curvature.on_views(bare._replace(of_client=of_client), _augment)
    found = wrapped.of_client(_model, params, jax.random.key(1), batch, mask, "basis")
    inputs = np.asarray(seen[0]["x"], float)
    assert np.allclose(np.abs(inputs - 1), np.abs(np.asarray(batch["x"])), atol=1e-6), "these are the views"
    assert not np.allclose(inputs, batch["x"])
    dense = inputs[:4].T @ inputs[:4] / 4
    values, basis = np.asarray(found.eigenvalues), np.asarray(found.basis)
    own = basis * values @ basis.T
    np.testing.assert_allclose(own, dense, rtol=1e-5, atol=1e-5)
    assert asked == ["basis"]


def test_all_clients_share_their_random_numbers():
    plain = curvature.plain(None)
    ids = jnp.asarray([4, 0, 2])
    assert plain.drawn_by(ids).tolist() == ids.tolist()
    assert curvature.from_one_start(plain).drawn_by(ids).tolist() == [0, 0, 0]


CLIENTS, SHARE, FULL, START = 5, 0.1, 2, 30
IDS = jnp.asarray([7, 3, 11, 0, 5])


def due(round, ids=IDS, seed=0):
    found = SELDOM.due(jnp.int32(round), jax.random.fold_in(jax.random.key(seed), round), ids)
    return np.asarray(found)


SELDOM = curvature.sent_seldom(curvature.plain(None), SHARE, full=FULL, start=START)


def test_few_are_asked_and_as_evenly_as_whole_numbers_can():
    counts = np.array([due(START + k).sum() for k in range(42)])
    assert np.all(counts[:FULL] == CLIENTS)
    later = np.cumsum(counts[FULL:])
    assert np.all(np.abs(later - CLIENTS * SHARE * np.arange(1, 41)) <= 0.5)


def test_who_is_asked_does_not_depend_on_the_order_and_falls_on_all():
    turned = np.asarray([2, 0, 1, 4, 3])
    asked = [due(START + FULL, seed=seed) for seed in range(60)]
    assert np.array_equal(due(START + FULL, IDS[turned], 5), asked[5][turned])
    shares = np.mean(asked, axis=0)
    assert np.all(np.abs(shares - 0.2) < 0.2), shares
    assert len(np.unique(np.argmax(asked, axis=1))) == CLIENTS


def sketches_of(values):
    basis = jnp.zeros([len(values), 8, len(values[0])])
    return curvature.Sketch(jnp.asarray(values), basis)


def test_what_seldom_comes_stands_for_the_rest():
    """Only where a rule asks for it: the mean over all messages, zeros included, is that of all clients."""
    values = [[2.0, 1.0]]
    scale = [float(SELDOM.of_cohort(sketches_of(values), jnp.int32(START + k)).eigenvalues[0, 0]) / 2 for k in (0, 2)]
    np.testing.assert_allclose(scale, [1, 1 / SHARE], rtol=1e-6)
    own = curvature.sent_seldom(curvature.plain(None), SHARE, scaled=False)
    assert own.of_cohort(sketches_of(values), jnp.int32(9)).eigenvalues.tolist() == values


def test_one_client_of_a_round_at_least_is_asked_where_that_is_wanted():
    """Of three clients a tenth would be one in three rounds of ten."""
    seldom = curvature.sent_seldom(curvature.plain(None), 0.1, scaled=False, least=1)
    numbers = [int(seldom.due(jnp.int32(k), jax.random.key(k), jnp.arange(3)).sum()) for k in range(12)]
    assert numbers == [3] + [1] * 11
    with pytest.raises(ValueError, match="with scaled sketches needs 0"):
        curvature.sent_seldom(curvature.plain(None), 0.1, least=1)


def test_the_pairs_above_the_level_are_sent_and_at_first_as_many_as_the_bytes_buy():
    values, pair = jnp.asarray([9.0, 4.0, 1.0]), 4 * 8 + 4
    whole = curvature.Sketch(values, jnp.eye(8)[:, :3])
    sketcher = curvature.Sketcher(lambda outputs, params, key, batch, mask: whole)

    def sent(level, budget=2.5 * pair):
        asked = curvature.above_level(sketcher, budget)
        one = asked.of_client(None, None, None, None, None, jnp.asarray(level))
        cohort = asked.of_cohort(jax.tree.map(lambda leaf: leaf[None], one), 0)
        return jax.tree.map(lambda leaf: leaf[0], cohort)

    for level, number in ((0.0, 2), (0.5, 3), (1.0, 3), (1.5, 2), (9.0, 1), (9.5, 0)):
        got, kept = sent(level), np.arange(3) < number
        np.testing.assert_array_equal(got.eigenvalues, np.where(kept, values, 0))
        np.testing.assert_array_equal(got.basis, np.where(kept, whole.basis, 0))
    assert np.count_nonzero(sent(0.0, pair).eigenvalues) == 1
    assert np.count_nonzero(sent(0.0, 1).eigenvalues) == 1, "a level needs one"
    assert np.count_nonzero(sent(0.0, 1e15).eigenvalues) == 3, "there are no more"
    report = curvature.Report(jnp.zeros(3, np.float32), *[jnp.ones([], np.float32)] * 4, {})
    whole = whole._replace(report=report)
    sketcher = curvature.Sketcher(lambda outputs, params, key, batch, mask: whole)
    with pytest.raises(ValueError, match=r"sketch\.budget: 16 bytes, of which a client's report alone takes 16"):
        sent(0.0, 16)


@pytest.mark.parametrize("bits", [0, 6])
def test_a_link_carries_the_largest_pairs_of_each_client_until_the_deadline(bits):
    """At one byte less there is one pair less; the bytes are the update's, and of each pair its number and vector."""
    values = [[9.0, 4.0, 1.0], [8.0, 2.0, 0.5]]
    plain = curvature.plain(None)._replace(bits=bits)
    update, pair = 4 * 8, 4 + (6 + 4 if bits else 4 * 8)
    for pairs in (1, 2, 3):
        needed = update + pairs * pair
        for size, wanted in ((needed, pairs), (needed - 1, pairs - 1)):
            linked = curvature.within_link(plain, 0.5, size / 62_500, lambda size: 4 * size)
            if not wanted:
                with pytest.raises(ValueError, match=r"sketch\.deadline: .* update and report take 32, an eigenpair"):
                    linked.of_cohort(sketches_of(values), 0)
                continue
            kept = linked.of_cohort(sketches_of(values), 0)
            np.testing.assert_array_equal(kept.eigenvalues, np.asarray(values)[:, :wanted])
            assert kept.basis.shape == (2, 8, wanted)
    endless = curvature.within_link(plain, 1e9, 1e9, lambda size: 4 * size)
    np.testing.assert_array_equal(endless.of_cohort(sketches_of(values), 0).eigenvalues, values)
    asking = curvature.within_link(plain._replace(sends_gradient=True), 0.5, 2 * needed / 62_500, lambda size: 4 * size)
    assert asking.of_cohort(sketches_of(values), 0).eigenvalues.shape[1] == 3
    asking = curvature.within_link(
        plain._replace(sends_gradient=True), 0.5, (needed + 8) / 62_500, lambda size: 4 * size
    )
    assert asking.of_cohort(sketches_of(values), 0).eigenvalues.shape[1] < 3, "the gradient has its bytes too"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: curvature.within_link(curvature.plain(None), 0.0, 1.0, int),
            r"sketch\.link: a link and a",
        ),
        (lambda: curvature.within_link(curvature.plain(None), 1.0, 0.0, int), r"sketch\.deadline: a link and"),
        (lambda: curvature.sent_seldom(curvature.plain(None), 0.0), r"sketch\.share: needs a number above 0"),
        (lambda: curvature.above_level(curvature.plain(None), 0.0), r"sketch\.budget: needs more than 0"),
        (lambda: curvature.above_level(curvature.plain(None), np.inf), r"sketch\.budget: .*a finite number, got inf"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
