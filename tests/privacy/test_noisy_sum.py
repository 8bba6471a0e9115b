"""The private channel in a round, against dense float64; and an audit that finds a clip which is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clients import KEEP, NUM_EXAMPLES, make_client, make_data, make_hyper, make_params, network, squared

from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client import first_order
from fipa_jax.federation.channel import ChannelRates, Order, chain, late
from fipa_jax.privacy import accounting, mechanism, noisy_sum
from fipa_jax.privacy.mechanism import Frame
from fipa_jax.privacy.noisy_sum import PrivacyRates

CLIENTS, SIZE, EVERYBODY = 6, 4, Order()
PARAMS = {"a": jnp.zeros([3]), "b": jnp.zeros([1])}


def rates(seed=0, clip=0.5, noise=1.0, rate=1.0, rounds=5, decay=1.0):
    numbers = (jnp.float32(value) for value in (clip, noise, rate, 0.1, decay))
    return ChannelRates(privacy=PrivacyRates(jax.random.key(seed), *numbers, jnp.int32(rounds)))


def uploads(rows, counts=None):
    rows = jnp.asarray(rows, jnp.float32)
    counts = jnp.ones(len(rows)) if counts is None else jnp.asarray(counts)
    return Uploads({"a": rows[:, :3], "b": rows[:, 3:]}, counts)


def delivered(channel, sent, given, order=EVERYBODY, rounds=0):
    state = channel.init(PARAMS)._replace(rounds=jnp.int32(rounds))
    arrived, info = channel.deliver(sent, PARAMS, state, order, given)
    return np.concatenate([np.asarray(leaf, float).ravel() for leaf in arrived.delta.values()]), arrived, info


def test_one_message_arrives_and_it_is_the_mean_of_the_clipped_ones():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(CLIENTS, SIZE)) * np.array([[0.1], [3], [0.2], [1e20], [1], [1]])
    rows[4] = np.nan
    step, arrived, _ = delivered(noisy_sum.private(4.0), uploads(rows, [1, 7, 0, 2, 1, 5]), rates(noise=0.0))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = np.where(lengths > 0.5, rows * 0.5 / lengths, rows)
    np.testing.assert_allclose(
        step, wanted[[0, 1, 3, 5]].sum(axis=0) / 4, rtol=1e-4, atol=1e-6
    )  # 2 is absent, 4 is not a number
    assert arrived.num_examples.shape == (1,) and arrived.sketch is None and arrived.loss is None


def test_noise_is_another_in_each_round_and_by_each_secret_and_ends_with_the_budget():
    channel, sent = noisy_sum.private(float(CLIENTS)), uploads(np.zeros([CLIENTS, SIZE]))
    first, *_, told = delivered(channel, sent, rates())
    again, second = (delivered(channel, sent, rates(), rounds=k)[0] for k in (0, 1))
    other = delivered(channel, sent, rates(seed=1))[0]
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == second) and not np.any(first == other)
    assert told["rounds_released"] == 1
    late_step, *_, told = delivered(channel, sent, rates(rounds=5), rounds=5)
    assert not late_step.any() and told["rounds_released"] == 5


def test_where_the_clip_falls_the_noise_falls_with_it():
    channel, rows = noisy_sum.private(1.0), np.full([CLIENTS, SIZE], 3.0)
    silent = [delivered(channel, uploads(rows), rates(noise=0.0, decay=0.5), rounds=k)[0] for k in (0, 2)]
    np.testing.assert_allclose(np.linalg.norm(silent, axis=1), [0.5 * CLIENTS, 0.125 * CLIENTS], rtol=1e-4)
    steady, falling = (delivered(channel, uploads(0 * rows), rates(decay=d), rounds=2)[0] for d in (1.0, 0.5))
    np.testing.assert_allclose(falling, steady / 4, rtol=1e-5)


def test_the_step_is_taken_out_of_the_frame():
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, 2)))[0]
    frame = Frame(jnp.asarray(basis, jnp.float32), jnp.array([0.5, 0.1]))
    channel = noisy_sum.private(1.0, frame_of=lambda params, spent, given: frame)
    row = np.array([[0.1, 0.2, 0.0, -0.1]])
    turned = np.eye(SIZE) + basis @ np.diag([-0.5, -0.9]) @ basis.T
    np.testing.assert_allclose(delivered(channel, uploads(row), rates(noise=0.0))[0], turned @ row[0], rtol=1e-5)
    np.testing.assert_array_equal(channel.tell(PARAMS, (), rates())["frame"].basis, frame.basis)


def test_clients_train_in_the_frame_they_are_told(x64):
    """One step of descent in v along W^T grad, for theta = start + W v."""
    params, data = make_params(), make_data()
    flat = np.concatenate([np.asarray(params["b"]).ravel(), np.asarray(params["w"]).ravel()])
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(flat.size, 3)))[0]
    frame = Frame(jnp.asarray(basis), jnp.array([0.3, 0.2, 0.1]))
    local = noisy_sum.in_frame(first_order.first_order(squared, KEEP, batch_size=0, steps=1))
    hyper = make_hyper(lr=0.1)._replace(frame=frame)
    client = make_client(NUM_EXAMPLES)
    result = local(network, params, data, client, jax.random.key(0), hyper, (), ())
    gradient = jax.grad(lambda theta: jnp.mean(squared(network(theta, data)[0], data)))(params)
    slope = np.concatenate([np.asarray(gradient["b"]).ravel(), np.asarray(gradient["w"]).ravel()])
    turned = np.eye(flat.size) + basis @ np.diag([-0.7, -0.8, -0.9]) @ basis.T
    got = np.concatenate([np.asarray(result.delta["b"]).ravel(), np.asarray(result.delta["w"]).ravel()])
    np.testing.assert_allclose(got, -0.1 * turned @ slope, rtol=1e-9)


def test_every_client_is_drawn_by_itself_from_the_secret():
    most, drawn = 30, np.zeros([300, 40])
    channel = noisy_sum.private(10.0, sampled=True)

    @jax.jit
    def draw(key, given):
        ids = channel.sample(key, 40, most, given)
        return ids, channel.draw(Order(), key, ids, given).part

    for k in range(300):
        ids, part = draw(jax.random.key(k), rates(rate=0.25))
        assert len(set(np.asarray(ids).tolist())) == most
        drawn[k, np.asarray(ids)[np.asarray(part) > 0]] = 1
    assert drawn.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / drawn.size))
    assert drawn.sum(axis=1).var() == pytest.approx(40 * 0.25 * 0.75, rel=0.35)  # as independent ones have
    other = draw(jax.random.key(0), rates(seed=1, rate=0.25))
    assert not np.array_equal(other[0], draw(jax.random.key(0), rates(rate=0.25))[0])


def test_who_is_not_drawn_adds_nothing():
    channel = noisy_sum.private(1.0, sampled=True)
    order = Order(part=jnp.array([1.0, 0.0]))
    step, *_ = delivered(channel, uploads([[0.1] * 4, [0.2] * 4]), rates(noise=0.0), order)
    np.testing.assert_allclose(step, 0.1, rtol=1e-6)


def test_nothing_of_single_clients_is_shown():
    info = {"ids": 1, "local_loss": 1, "rejected": 1, "step_ratio": 1, "skipped": 0, "rounds_released": 3}
    assert noisy_sum.show(info) == {"skipped": 0, "rounds_released": 3}
    both = chain(late(2), noisy_sum.private(1.0, sampled=True))
    assert both.show(info) == noisy_sum.show(info) and both.sample is noisy_sum.sample


def audited(trials=4000, noise=1.0):
    """A lower bound on epsilon, at 95 %, from what the channel lets through with and without one extreme client."""
    rows = np.zeros([CLIENTS, SIZE], np.float32)
    rows[0] = 25.0  # a hundred times the bound
    channel = noisy_sum.private(1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def scores(there, seeds):
        sent = uploads(rows, np.array([there] + [1] * (CLIENTS - 1)))

        def one(seed):
            given = rates(noise=noise)
            given = given._replace(privacy=given.privacy._replace(secret=jax.random.key(seed)))
            arrived, _ = channel.deliver(sent, PARAMS, channel.init(PARAMS), Order(), given)
            return jnp.sum(arrived.delta["a"]) + jnp.sum(arrived.delta["b"])

        return jax.vmap(one)(seeds)

    seeds = np.arange(2 * trials, dtype=np.uint32)
    with_it, without = np.asarray(scores(1, seeds[:trials])), np.asarray(scores(0, seeds[trials:]))
    best, slack = 0.0, 3 / trials  # the upper bound on a rate of which nothing was seen
    for threshold in np.quantile(np.concatenate([with_it, without]), np.linspace(0.02, 0.98, 49)):
        hits, alarms = np.mean(with_it > threshold), np.mean(without > threshold)
        low = hits - 2.5 * np.sqrt(hits * (1 - hits) / trials) - 1e-3
        high = alarms + 2.5 * np.sqrt(alarms * (1 - alarms) / trials) + slack
        best = max(best, np.log(low / high) if low > 0 else 0)
    return best


def test_an_audit_agrees_with_the_accountant_and_finds_that_the_clip_is_missing(monkeypatch):
    claimed = accounting.epsilon_of(accounting.Plan(1.0, 1e-3), 1)
    assert 0.4 * claimed < audited() <= claimed
    monkeypatch.setattr(mechanism, "clipped", lambda row, bound: row)
    assert audited() > claimed


def test_a_parameter_may_be_a_number():
    state = noisy_sum.private(2.0).init({"a": jnp.zeros(()), "b": jnp.zeros(3)})
    assert state.rounds == 0
