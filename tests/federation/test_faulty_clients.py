"""Injected faults are what they say, at the rates they say, and change nothing else; rounds go on or are skipped."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import runs
from helpers.clients import NUM_EXAMPLES, make_client, make_data, make_hyper, make_params, network, solve, squared

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client import first_order as client
from fipa_jax.client import terms
from fipa_jax.client.examples import Client
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import Diagonal, Sketch, plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.channel import FAULTS, Channel, ChannelRates, FaultRates, draw_faults, faulty, spoil
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.reporting import metrics
from fipa_jax.run import experiment, whole_run
from fipa_jax.run.loop import Stalled, check_progress
from fipa_jax.run.phase_parts import TRACED

CLIENTS = 3
NONE = dict.fromkeys(FAULTS, 0.0) | {"scale_by": 1e6}
TASK = tasks.Task(lambda key: make_params(), network, squared, lambda out, batch: {"mse": squared(out, batch)})


def _rates(**rates):
    return FaultRates(**{name: jnp.asarray(value) for name, value in (NONE | rates).items()})


def _drawn(round=0, ids=range(4000), **rates):
    """({fault: [C]}, the share of the steps [C])."""
    return jax.jit(draw_faults)(jax.random.fold_in(jax.random.key(0), round), _rates(**rates), jnp.array(ids))


def test_faults_come_at_their_rates_and_apart_from_each_other():
    drawn, part = jax.device_get(_drawn(**dict.fromkeys(FAULTS, 0.3)))
    found = np.stack([drawn[kind] for kind in FAULTS])
    expected = 0.3 * np.ones([5, 5]) * 0.3 + 0.21 * np.eye(5)
    np.testing.assert_allclose(found.astype(float) @ found.T / found.shape[1], expected, atol=0.03)
    slow = drawn["straggle"]
    assert np.all(part[~slow] == 1) and 0 < part[slow].min() < 0.01 and part[slow].max() <= 1
    for those in (slow, *(slow & drawn[kind] for kind in ("drop", "nan", "flip", "scale"))):
        np.testing.assert_allclose(np.quantile(part[those], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.1)


def test_a_clients_fault_is_its_own_and_the_rounds():
    whole, some = (np.asarray(_drawn(nan=0.3, **ids)[0]["nan"]) for ids in ({}, {"ids": [70, 3]}))
    np.testing.assert_array_equal(some, whole[[70, 3]])
    assert np.any(whole != np.asarray(_drawn(round=1, nan=0.3)[0]["nan"]))
    assert not any(drawn.any() for drawn in _drawn()[0].values())
    assert all(drawn.all() for drawn in _drawn(**dict.fromkeys(FAULTS, 1.0))[0].values())


def test_the_keys_are_not_those_of_cohort_training_and_sketches():
    part = _drawn(ids=range(3), straggle=1.0)[1]
    others = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)
    assert not np.any(part == 1 - jax.vmap(lambda key: jax.random.uniform(key, [len(FAULTS) + 1])[-1])(others))


def test_an_upload_arrives_as_its_faults_say():
    one = lambda place: jnp.arange(4) == place
    kinds = {"drop": one(0), "nan": one(1), "flip": one(2), "scale": one(3), "straggle": one(3)}
    delta = {"w": jnp.arange(8.0).reshape(4, 2, 1), "b": jnp.ones([4], jnp.bfloat16)}
    sent = Sketch(jnp.ones([4, 2]), jnp.ones([4, 3, 2]))
    uploads = Uploads(delta, jnp.array([5, 6, 7, 8]), sent, loss=jnp.arange(4.0))
    arrived = spoil(uploads, kinds, jnp.float32(10))
    assert arrived.num_examples.tolist() == [0, 6, 7, 8]
    np.testing.assert_array_equal(arrived.delta["w"][..., 0], [[0, 1], [np.nan, np.nan], [-4, -5], [6, 7]])
    np.testing.assert_array_equal(arrived.delta["b"].astype(float), [1, np.nan, -1, 1])
    np.testing.assert_array_equal(arrived.sketch.eigenvalues, [[1, 1], [1, 1], [1, 1], [10, 10]])
    assert arrived.sketch.basis is sent.basis and arrived.delta["b"].dtype == jnp.bfloat16
    assert arrived.loss is uploads.loss
    diagonal = spoil(uploads._replace(sketch=Diagonal(jnp.ones([4, 3]))), kinds, jnp.float32(10)).sketch
    np.testing.assert_array_equal(diagonal.values[:, 0], [1, 1, 1, 10])
    assert spoil(uploads._replace(sketch=None), kinds, jnp.float32(10)).sketch is None


@pytest.mark.parametrize(("part", "steps"), [(1.0, 6), (0.5, 3), (0.4, 3), (1e-6, 1)])
def test_a_straggler_stops_after_its_part_of_the_steps(x64, part, steps):
    """Two epochs of three batches; rounded up, so that it does something."""
    options = {"batch_size": 3, "epochs": 2}
    own, hyper = make_client(NUM_EXAMPLES), make_hyper()
    found = solve(own, hyper._replace(part=jnp.asarray(part)), **options)
    wanted = solve(own, hyper._replace(steps=jnp.asarray(steps)), **options)
    chex.assert_trees_all_equal(found, wanted)


def _parts(rule=None, **fields):
    local = client.first_order(TASK.loss, TASK.augment, batch_size=3, epochs=2, term=terms.scaffold())
    rule = rule or aggregate.fipa()
    find = plain(lambda outputs, features: sketch.make_sketch(outputs, TASK.loss, rank=2, solver="rows"))
    find = find if rule.needs.curvature == "sketch" else None
    fields = {"server": optax.trace(0.9)} | fields
    return Parts(TASK, local, terms.scaffold(), find, rule, num_clients=CLIENTS, cohort=CLIENTS, **fields)


@functools.cache
def _round(parts):
    return jax.jit(functools.partial(rounds.whole_round, parts))


def _run(parts, num_rounds=2, server_lr=1.0, state=None, **rates):
    """(the state before the last round, that after it, its info)."""
    hyper, one = make_hyper(mu=1.0), jnp.ones([])
    of_channel = ChannelRates() if parts.channel is NOTHING else ChannelRates(faults=_rates(**rates))
    given = Rates(hyper, one, jnp.asarray(server_lr), of_channel)
    indices = np.stack([np.roll(np.arange(NUM_EXAMPLES), m) for m in range(CLIENTS)])
    clients = Client(jnp.asarray(indices), jnp.array([8, 5, 6]))
    state = state or parts_lib.init(parts, make_params())
    for _ in range(num_rounds):
        before = state
        state, info = _round(parts)(state, given, make_data(), clients, jax.random.key(3))
    return before, state, jax.device_get(info)


NOTHING = Channel()
PLAIN = _parts(least_clients=2, channel=NOTHING)
FAULTY = PLAIN._replace(channel=faulty())


@pytest.mark.slow
def test_faults_that_do_not_happen_change_nothing(x64):
    _, wanted, info = _run(PLAIN)
    _, found, same = _run(FAULTY)
    chex.assert_trees_all_equal(found, wanted)
    drawn = same.pop("faults")
    chex.assert_trees_all_equal(same, info)
    assert set(drawn) == set(FAULTS) and not any(kind.any() for kind in drawn.values())


def _round_with(lost, kind):
    """(state before, state after, info) of the first round in which so many clients are lost to a kind of fault."""
    for first in range(30):
        state = parts_lib.init(PLAIN, make_params(), first)
        before, after, info = _run(FAULTY, 1, state=state, **{kind: 0.4})
        if info["faults"][kind].sum() == lost:
            return before, after, info
    raise AssertionError("no such round")


@pytest.mark.parametrize(
    ("kind", "field"), [pytest.param("drop", "absent", marks=pytest.mark.slow), ("nan", "rejected")]
)
def test_a_client_that_is_lost_keeps_its_store(x64, kind, field):
    before, after, info = _round_with(1, kind)
    np.testing.assert_array_equal(info[field], info["faults"][kind])
    changed = np.array([np.any(after.store["w"][m] != before.store["w"][m]) for m in range(CLIENTS)])
    np.testing.assert_array_equal(changed, ~info[field])
    assert not info["skipped"]


@pytest.mark.parametrize("why", ["nobody", "few", "parameters"])
def test_a_skipped_round_changes_the_round_number_alone(x64, why):
    """Momentum, controls, the rule's state: all are as they were."""
    if why == "few":
        before, after, info = _round_with(2, "drop")
    else:
        _, state, _ = _run(FAULTY, 1)
        before, after, info = _run(
            FAULTY, 1, state=state, **{"nobody": {"drop": 1.0}, "parameters": {"server_lr": np.nan}}[why]
        )
        assert np.any(before.server.trace["w"] != 0)
    assert info["skipped"]
    chex.assert_trees_all_equal(after, before._replace(round=before.round + 1))


@pytest.mark.parametrize("undone", [False, True])
def test_a_step_back_needs_nobody(x64, undone):
    """What a rule with trust does where its last step has cost all clients."""

    def apply(received, state, params):
        return jax.tree.map(lambda leaf: -jnp.ones_like(leaf), params), state, {}

    def admit(received, state):
        return received.only(jnp.zeros(CLIENTS, bool)), {}

    rule = aggregate.Aggregator(lambda params: (), apply, admit=admit, withdraws=lambda state: jnp.asarray(undone))
    before, after, info = _run(_parts(rule, server=optax.identity(), channel=NOTHING), 1)
    assert info["skipped"] == (not undone)
    assert np.all(np.asarray(after.params["b"] != before.params["b"]) == undone)


def tiny(**fields):
    """Eight rounds of three clients that take several local steps."""
    config = runs.tiny(**fields)
    config.task.num_clients, config.fipa.rounds, config.fipa.local.batch_size = 3, 8, 4
    config.eval.clients_every = 0
    return config


OFTEN = ":".join(f"faults.{kind}=0.15" for kind in FAULTS)


def _rows(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.mark.slow
def test_every_rule_goes_on_under_all_faults_and_counts_them(tmp_path):
    """The same rounds for the same seed, others for another; side by side with a rule that has no faults."""
    faulty = ("fedavg:term.name=scaffold", "fipa:server.optimizer=exp", "fisher_diagonal")
    config = tiny(compare=(*(f"{rule}:{OFTEN}" for rule in faulty), "fedavg"))
    whole_run.run(config, tmp_path / "all")
    rows = _rows(tmp_path / "all")
    assert len(rows) == 8 * len(config.compare)
    for row in rows:
        assert row["test_mse"] is not None and np.isfinite(row["test_mse"])
        if row["run"] == "fedavg":
            assert "faults_nan" not in row and row["clients_rejected"] == row["clients_absent"] == 0
            continue
        assert row["clients_absent"] == row["faults_drop"]
        assert row["clients_rejected"] == row["rejected_update_not_finite"] <= row["faults_nan"]
        assert row["skipped"] == (row["clients_absent"] + row["clients_rejected"] == 3)
    for kind in FAULTS:
        assert sum(row.get(f"faults_{kind}", 0) for row in rows) > 0
    assert sum(row.get("clients_capped", 0) for row in rows) > 0

    config.compare = config.compare[:1]
    whole_run.run(config, tmp_path / "again")
    assert _rows(tmp_path / "again") == rows[:8]
    config.seed = 1
    whole_run.run(config, tmp_path / "other")
    drawn = lambda rows: [[row[f"faults_{kind}"] for kind in FAULTS] for row in rows]
    assert drawn(_rows(tmp_path / "other")) != drawn(rows[:8])


def test_rates_are_traced_and_whether_there_are_any_is_not():
    built = experiment.build(tiny(compare=("fipa:faults.nan=0.1", "fipa:faults.nan=0.5:faults.flip=0.1")))
    assert len(built.compiled) == 1
    built = experiment.build(tiny(compare=("fipa", "fipa:faults.nan=0.5")))
    assert len(built.compiled) == 2


@pytest.mark.slow
def test_many_rounds_in_a_call_have_the_same_faults(tmp_path):
    for per_call in (1, 5):
        whole_run.run(tiny(compare=(f"fedavg:{OFTEN}",), rounds_per_call=per_call), tmp_path / str(per_call))
    one, five = _rows(tmp_path / "1"), _rows(tmp_path / "5")
    for name in ("skipped", "clients_absent", "clients_rejected", *(f"faults_{k}" for k in FAULTS)):
        assert [row[name] for row in one] == [row[name] for row in five]


@pytest.mark.parametrize("per_call", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_rounds_that_are_skipped_again_and_again_end_the_run(tmp_path, per_call):
    config = tiny(compare=("fedavg:faults.nan=1:max_skips=3",), rounds_per_call=per_call)
    with pytest.raises(Stalled, match=r"3 rounds in a row were skipped, the last one round 2\..*3 clients: "):
        whole_run.run(config, tmp_path)
    rows = _rows(tmp_path)
    assert [row["skipped"] for row in rows] == [True] * 3
    assert len({row["test_mse"] for row in rows}) == 1


def test_skipped_rounds_tell_whether_a_run_goes_on():
    row = {"round": 7, "clients_absent": 2, "rejected_sketch_not_finite": 1}
    for skipped, most in ((9, 10), (9, 0), (0, 1)):
        check_progress("fipa", row, skipped, most)
    with pytest.raises(Stalled, match=r"1 clients: its sketch is not .*; 2 clients: take no.*least_clients"):
        check_progress("fipa", row, 2, 2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("fipa:faults.nan=1.5", r"config\.fipa\.faults\.nan: needs a probability in \[0, 1\], got 1\.5"),
        ("fipa:faults.drop=-1", r"config\.fipa\.faults\.drop"),
        ("fipa:faults.drop=nan", r"config\.fipa\.faults\.drop"),
        ("fipa:faults.dorp=0.1", "did you mean 'drop'"),
        ("fipa:aggregator.limits.explosion=-1", r"config\.fipa\.aggregator\.limits\.explosion"),
        ("fipa:max_skips=-1", r"config\.fipa\.max_skips"),
        ("fipa:least_clients=4", r"config\.fipa\.least_clients: 4 is above the number of clients in a round, 3"),
        ("fedavg:faults.straggle=0.1:local.optimizer=gauss_newton", "faults.straggle: needs a first-order solver"),
        ("fedavg:faults.straggle=0.1:local.steps=1", "takes several steps.*with local.steps = 1"),
    ],
)
def test_what_cannot_be_injected_is_said_before_the_first_round(rule, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny(compare=(rule,)))


def test_every_rate_is_a_field_and_traced():
    fields = runs.tiny().fipa.faults
    assert set(fields) == set(FaultRates._fields)
    assert {f"faults.{name}" for name in fields} <= set(TRACED)
