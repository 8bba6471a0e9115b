"""Late clients: their ages, the parameters that they start from, and whole rounds of the published rules."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import INDICES, NUM_EXAMPLES, make_data, make_hyper, make_params, network, squared

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.limits import Limits
from fipa_jax.aggregate.past_rounds import PastRounds
from fipa_jax.client import first_order as client
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.channel import Channel, ChannelRates, at_age, draw_ages, late
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.server import serve

MOST, T = 3, 4
TASK = tasks.Task(lambda key: make_params(), network, squared, lambda out, batch: {"mse": squared(out, batch)})


def test_ages_come_at_their_rate_and_uniformly():
    draw = jax.jit(lambda share, most, ids: draw_ages(jax.random.key(1), share, most, ids))
    ages = np.asarray(draw(0.5, MOST, jnp.arange(6000)))
    counts = np.bincount(ages, minlength=MOST + 1) / ages.size
    np.testing.assert_allclose(counts, [0.5, 1 / 6, 1 / 6, 1 / 6], atol=0.025)
    # A client's age depends neither on the others nor on their order.
    some = np.asarray(draw(0.5, MOST, jnp.array([70, 3])))
    np.testing.assert_array_equal(some, ages[[70, 3]])
    assert not np.any(np.asarray(draw(0.0, MOST, jnp.arange(50))))
    assert np.all(np.asarray(draw(1.0, 1, jnp.arange(50))) == 1)


def test_a_history_knows_what_was():
    channel = late(3)
    history = channel.init({"a": jnp.zeros(2)})
    for k in (1.0, 2.0):
        history = channel.advance(history, {"a": jnp.full(2, k)})
    found = [float(at_age(history, jnp.int32(age))["a"][0]) for age in range(4)]
    assert found == [2, 1, 0, 0]


SKETCHER = plain(lambda outputs, features: sketch.make_sketch(outputs, TASK.loss, rank=3, solver="rows"))


LATE = late(MOST)


def _parts(rule, channel=LATE):
    local = client.first_order(TASK.loss, TASK.augment, batch_size=0, steps=2)
    sketcher = SKETCHER if rule.needs.curvature == "sketch" else None
    return Parts(TASK, local, terms.none(), sketcher, rule, optax.identity(), num_clients=T, cohort=T, channel=channel)


def _run(parts, num_rounds=6, share=0.6, lr=0.3):
    """(the parameters before each round and at the end, of each round the results, the ages and the info)."""
    root = jax.random.key(2)
    rates = Rates(make_hyper(lr=lr), jnp.ones([]), jnp.ones([]), ChannelRates(late=jnp.asarray(share)))
    own = np.stack([np.roll(INDICES, 2 * m) for m in range(T)])
    people = Client(jnp.asarray(own), jnp.array([NUM_EXAMPLES, 5, 3, 6]))
    state, data, params, rows = parts_lib.init(parts, make_params()), make_data(), [], []
    work = rounds.by_clients(parts, functools.partial(rounds.train, parts), functools.partial(rounds.sketch, parts))

    @jax.jit
    def one(state):
        ids, orders = rounds.draw(parts, state.round, rates, root)
        cohort = Cohort(ids, people, data, orders)
        results, sketches = work(state, rates, cohort, root)
        after, info = serve(parts, state, rates, cohort, results, sketches)
        return after, (results, orders.age, info)

    for _ in range(num_rounds):
        params.append(state.params)
        state, row = one(state)
        rows.append(jax.device_get(row))
    return [*params, state.params], *zip(*rows, strict=True)


@pytest.mark.parametrize("mix", [False, True], ids=["fedbuff", "fedasync"])
def test_rounds_are_the_published_rules(x64, mix):
    found, sent, ages, infos = _run(_parts(aggregate.mean(late=LateUpdates(mix=mix))))
    ages = np.stack(ages)
    assert ages[0].max() > 0 and len(np.unique(ages)) > 2
    assert [info["age_most"] for info in infos] == ages.max(axis=1).tolist() and ages.max() <= MOST
    weights = np.array([NUM_EXAMPLES, 5, 3, 6]) / (NUM_EXAMPLES + 14)
    alone = jax.jit(lambda params, which: _locally(params, which))
    for k, results in enumerate(sent):
        step = jax.tree.map(jnp.zeros_like, found[0])
        for m, age in enumerate(ages[k]):
            began = found[max(k - age, 0)]
            delta = alone(began, m)
            chex.assert_trees_all_close(delta, jax.tree.map(lambda leaf, m=m: leaf[m], results.delta), rtol=1e-9)
            towards = optax.tree.sub(optax.tree.add(began, delta), found[k]) if mix else delta
            step = optax.tree.add_scale(step, weights[m] * (1 + age) ** -0.5, towards)
        chex.assert_trees_all_close(found[k + 1], optax.tree.add(found[k], step), rtol=1e-9, atol=1e-12)


def _locally(params, which):
    local = client.first_order(TASK.loss, TASK.augment, batch_size=0, steps=2)
    own = jnp.roll(jnp.asarray(INDICES), 2 * which)
    data = Client(own, jnp.array([NUM_EXAMPLES, 5, 3, 6])[which])
    return local(network, params, make_data(), data, jax.random.key(0), make_hyper(lr=0.3), (), ()).delta


@pytest.mark.slow
def test_without_late_clients_nothing_changes(x64):
    rule = aggregate.fipa(past=PastRounds("prior", rank=3))
    never, *_, infos = _run(_parts(rule), num_rounds=3, share=0.0)
    without, *_ = _run(_parts(rule, Channel()), num_rounds=3)
    chex.assert_trees_all_close(never, without, rtol=1e-9, atol=1e-12)
    assert all(not info["stale"].any() and info["drift"] == 0 for info in infos)


def test_a_round_of_stale_clients_alone_is_skipped_and_ages_go_on(x64):
    """The history is of rounds, skipped ones too: what they leave are the parameters as they were."""
    rule = aggregate.fipa(late=LateUpdates(max_drift=1e-12), limits=Limits(max_step=0.0))
    found, _, ages, infos = _run(_parts(rule), share=1.0)
    for k, (age_of, info) in enumerate(zip(ages, infos, strict=True)):
        began = [found[max(k - age, 0)] for age in age_of]
        moved = [any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (x, found[k])), strict=True)) for x in began]
        np.testing.assert_array_equal(info["stale"], moved)
        assert info["skipped"] == all(moved)
    assert any(info["skipped"] for info in infos) and not all(info["skipped"] for info in infos)
