"""Delays and faults together are each alone where the other does not happen; what is to happen is drawn once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import KEEP, NUM_EXAMPLES, make_data, make_hyper, make_params, network, squared

from fipa_jax import aggregate, tasks
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.client.first_order import first_order
from fipa_jax.curvature.sketch import make_sketch, plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.channel import FAULTS, Channel, ChannelRates, FaultRates, chain, faulty, late
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.population import Cohort
from fipa_jax.run.programs import jitted

T, MOST = 3, 2
TASK = tasks.Task(lambda key: make_params(), network, squared, lambda out, batch: {"mse": squared(out, batch)})
ROOT = jax.random.key(1)
LATE, FAULTY = late(MOST), faulty()
BOTH = chain(LATE, FAULTY)


@functools.cache
def _parts(channel):
    return Parts(
        task=TASK,
        local=first_order(squared, KEEP, batch_size=3, epochs=2, term=terms.none()),
        term=terms.none(),
        sketcher=plain(lambda outputs, features: make_sketch(outputs, squared, rank=2, solver="rows")),
        aggregator=aggregate.fipa(),
        server=optax.identity(),
        num_clients=T,
        cohort=T,
        channel=channel,
    )


@functools.cache
def _round(channel):
    return jax.jit(functools.partial(rounds.whole_round, _parts(channel)))


STAGES = functools.cache(jitted)


def _clients():
    own = np.stack([np.roll(np.arange(NUM_EXAMPLES), m) for m in range(T)])
    return Client(jnp.asarray(own), jnp.array([8, 5, 6]))


def _rates(share=0.0, **faults):
    of_faults = dict.fromkeys(FAULTS, 0.0) | {"scale_by": 10.0} | faults
    of_faults = FaultRates(**{name: jnp.asarray(value) for name, value in of_faults.items()})
    return Rates(make_hyper(), jnp.ones([]), jnp.ones([]), ChannelRates(jnp.asarray(share), of_faults))


def _run(channel, rates, num_rounds=6):
    """(the last parameters, [info of each round])."""
    state, infos = parts_lib.init(_parts(channel), make_params()), []
    for _ in range(num_rounds):
        state, info = _round(channel)(state, rates, make_data(), _clients(), ROOT)
        infos.append(jax.device_get(info))
    return state.params, infos


OFTEN = {"drop": 0.2, "straggle": 0.4, "nan": 0.2, "flip": 0.2, "scale": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["late", "faulty"])
def test_a_chain_is_each_channel_alone_where_the_other_does_nothing(x64, which):
    rates, alone = (_rates(share=0.6), LATE) if which == "late" else (_rates(**OFTEN), FAULTY)
    params, infos = _run(BOTH, rates)
    wanted, told = _run(alone, rates)
    # Not to the bit: where nobody is late, the way since then is a term of its own, of zeros.
    chex.assert_trees_all_close(params, wanted, rtol=1e-9, atol=1e-12)
    for info, one in zip(infos, told, strict=True):
        assert set(one) < set(info)
        chex.assert_trees_all_close({name: info[name] for name in one}, one, rtol=1e-7, atol=1e-9)
    if which == "late":
        assert len({int(info["age_most"]) for info in infos}) > 1
        assert not any(kind.any() for info in infos for kind in info["faults"].values())
    else:
        assert all(info["age_most"] == 0 for info in infos)
        assert all(any(info["faults"][kind].any() for info in infos) for kind in FAULTS)


def test_a_chain_draws_for_each_what_it_draws_alone(x64):
    rates = _rates(share=0.6, **OFTEN)
    for k in range(4):
        ages, faults, both = (STAGES(_parts(own)).draw(jnp.int32(k), rates, ROOT)[1] for own in (LATE, FAULTY, BOTH))
        chex.assert_trees_all_equal(both, faults._replace(age=ages.age))


def test_a_chain_of_one_is_that_one_and_of_none_is_nothing():
    assert chain(LATE) is LATE
    params = make_params()
    chex.assert_trees_all_equal(Channel().start(params, (), None), params)
    assert jax.tree.leaves(rounds.draw(_parts(Channel()), jnp.int32(0), _rates(), ROOT)[1]) == []


def test_orders_are_drawn_once_a_round():
    drawn = []

    def draw(order, key, ids, rates):
        drawn.append(ids)
        return BOTH.draw(order, key, ids, rates)

    parts = _parts(BOTH)._replace(channel=BOTH._replace(draw=draw))
    whole = functools.partial(rounds.whole_round, parts)
    jax.eval_shape(whole, parts_lib.init(parts, make_params()), _rates(), make_data(), _clients(), ROOT)
    assert len(drawn) == 1


def test_the_orders_of_a_cohort_are_what_its_clients_and_the_server_go_by(x64):
    """Whatever the rates say: of a straggler, a late client and one whose upload is spoilt, by orders put there."""
    rates, stages, parts = _rates(), STAGES(_parts(BOTH)), _parts(BOTH)
    before = jax.tree.map(lambda leaf: leaf - 0.1, make_params())
    old, state = (parts_lib.init(parts, params) for params in (before, make_params()))
    state = state._replace(history=(parts.channel.advance(old.history, make_params())[0], ()))
    ids, orders = stages.draw(state.round, rates, ROOT)
    assert not orders.age.any() and np.all(orders.part == 1) and not any(f.any() for f in orders.faults.values())
    cohort = Cohort(ids, _clients(), make_data(), orders)
    flip = {"flip": jnp.array([False, False, True])}
    ordered = orders._replace(
        part=jnp.array([1e-3, 1, 1]), age=jnp.array([0, 1, 0], jnp.int32), faults=orders.faults | flip
    )

    plain_work, began, work = (
        stages.train(start, rates, cohort._replace(orders=own), ROOT).delta
        for start, own in ((state, orders), (old, orders), (state, ordered))
    )
    of = lambda deltas, one: jax.tree.map(lambda leaf: leaf[one], deltas)
    chex.assert_trees_all_equal(of(work, 1), of(began, 1))
    chex.assert_trees_all_equal(of(work, 2), of(plain_work, 2))
    assert 0 < optax.tree.norm(of(work, 0)) < optax.tree.norm(of(plain_work, 0)), "one step of six"

    results = stages.train(state, rates, cohort, ROOT)
    sketches = stages.sketch(state, rates, cohort, results, ROOT)
    flipped = results._replace(delta=jax.tree.map(lambda leaf: leaf.at[2].multiply(-1), results.delta))
    by_hand, by_order = (
        stages.serve(jax.tree.map(jnp.copy, state), rates, cohort._replace(orders=own), sent, sketches)
        for own, sent in ((ordered._replace(faults=orders.faults), flipped), (ordered, results))
    )
    chex.assert_trees_all_equal(by_hand[0], by_order[0])
    assert by_order[1]["age_most"] == 1 and by_order[1]["faults"]["flip"].tolist() == [False, False, True]
    assert not by_hand[1]["faults"]["flip"].any()
