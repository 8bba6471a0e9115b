"""Clients on the host: a round sees its cohort's examples alone, and is the round that it is with all on the device."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax.client.examples import Client, gather, present
from fipa_jax.data.partition import Ragged, pad
from fipa_jax.federation.population import SPARSE, Ahead, OnHost, Resident, sample_cohort
from fipa_jax.federation.state import HostStore
from fipa_jax.reporting import metrics
from fipa_jax.run import experiment, whole_run

SIZES = np.array([3, 1, 5, 2, 4, 1])
FIRST = np.concatenate([[0], np.cumsum(SIZES)])


@pytest.fixture
def people():
    """(on the host, on the device): six clients of ragged sizes, whose examples lie mixed."""
    owned = Ragged(np.random.default_rng(0).permutation(SIZES.sum()), FIRST)
    data = {"x": np.arange(2.0 * SIZES.sum(), dtype=np.float32).reshape(-1, 2), "label": np.arange(SIZES.sum())}
    everything = jax.device_put((data, Client(*pad(owned))))
    return OnHost(data, owned, 2, jax.device_put), Resident(*everything)


def test_ragged_is_the_list_of_its_rows():
    owned = Ragged(np.arange(SIZES.sum()), FIRST)
    chex.assert_trees_all_equal(list(owned), np.split(np.arange(SIZES.sum()), FIRST[1:-1]))
    assert owned[-1].tolist() == [15] and len(owned) == 6
    with pytest.raises(IndexError):
        owned[6]


@pytest.mark.parametrize("ids", [(2, 4), (5, 1), (0, 3)])
def test_a_cohort_has_its_own_examples_and_no_others(people, ids):
    on_host, resident = people
    found, wanted = (each.cohort(jnp.asarray(ids)) for each in people)
    np.testing.assert_array_equal(found.clients.num_examples, SIZES[list(ids)])
    for name in ("x", "label"):
        assert found.data[name].shape[0] == 9  # the two largest clients have room, whoever comes
        for m in range(2):
            of = lambda cohort, m=m: gather(cohort.data, cohort.clients.indices[m])[name]
            mine = np.arange(5) < SIZES[ids[m]]
            np.testing.assert_array_equal(of(found)[mine], of(wanted)[mine])
    own = set(np.concatenate([on_host.owned[m] for m in ids]).tolist())
    assert set(np.asarray(found.data["label"]).tolist()) == own, "padding is not an example of the cohort"
    shapes = lambda cohort: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cohort)
    chex.assert_trees_all_equal(shapes(found), shapes(on_host.shapes(2)))
    chex.assert_trees_all_equal(shapes(wanted), shapes(resident.shapes(2)))


def test_figures_of_all_clients_do_not_depend_on_the_place(people, monkeypatch):
    monkeypatch.setattr(
        "fipa_jax.federation.population.BLOCK", 5
    )  # sixteen examples: four blocks, the last one shorter
    evaluate = jax.jit(lambda params, data: {"loss": params * jnp.sum(data["x"], axis=1)})
    per_client = [each.means(each.values(evaluate, 2.0)) for each in people]
    chex.assert_trees_all_close(*per_client, rtol=1e-6)
    figures = [metrics.over_clients(m, each.num_examples) for m, each in zip(per_client, people, strict=True)]
    chex.assert_trees_all_close(*figures, rtol=1e-6)


@pytest.mark.parametrize("term", ["none", "scaffold"])
@pytest.mark.slow
def test_a_run_from_the_host_is_the_run_on_the_device(tmp_path, term):
    """To the bit, and with it what is said of every client; SCAFFOLD's stores come from the host as well."""
    rows = {}
    for place in ("device", "host"):
        config = tiny(cohort=2, examples_on=place, client_store=place, compare=("fipa",), precision="float64")
        config.task.num_clients, config.fipa.rounds, config.fipa.term.name = 5, 3, term
        whole_run.run(config, tmp_path / place)
        rows[place] = metrics.read(tmp_path / place / "metrics.jsonl")
        for row in rows[place]:
            for name in [name for name in row if name.startswith("seconds_")]:
                del row[name]
    for host, device in zip(rows["host"], rows["device"], strict=True):
        means = {name for name in host if name.startswith("client_")}  # summed by NumPy, in another order
        chex.assert_trees_all_close({n: host[n] for n in means}, {n: device[n] for n in means}, rtol=1e-12)
        assert {n: host[n] for n in host if n not in means} == {n: device[n] for n in device if n not in means}
    model = [(tmp_path / place / "fipa.msgpack").read_bytes() for place in ("device", "host")]
    assert model[0] == model[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds_per_call": 2}, r"config\.rounds_per_call: above 1 it needs config\.examples_on = 'device'"),
        ({"compare": ("fipa", "centralised")}, r"config\.compare: .*needs config\.examples_on = 'device'"),
        ({"examples_on": "disk"}, r"config\.examples_on: unknown 'disk'; known: auto, device, host"),
    ],
)
def test_what_does_not_work_from_the_host_is_said_before_the_run(fields, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(tiny(**({"examples_on": "host"} | fields)))


def test_stores_are_those_last_put_and_blank_before():
    blank = {"control": jnp.full([2], 7.0), "steps": jnp.zeros([], int)}
    stores = HostStore(blank)
    for ids in ([4, 10**6], [10**6, 3], [8, 9], [4, 3]):
        before = stores.rows(ids)
        stores.put(ids, jax.tree.map(lambda leaf: leaf + np.reshape(ids, [-1] + [1] * (leaf.ndim - 1)), before))
    found = stores.rows([3, 4, 8, 10**6, 5])
    np.testing.assert_array_equal(found["steps"], [6, 8, 8, 2 * 10**6, 0])
    np.testing.assert_array_equal(found["control"], np.repeat(7.0 + found["steps"][:, None], 2, axis=1))
    assert len(stores) == 5
    found["control"][:] = 0
    assert stores.rows([3])["control"].all(), "the rows are the caller's own"
    nothing = HostStore(())
    nothing.put([1, 2], ())
    assert nothing.rows([1, 7]) == ()


def test_the_next_round_is_fetched_while_this_one_runs(x64):
    """Once each, and in the run's own precision, which a thread does not inherit."""
    called, begun = [], threading.Event()

    def fetch(k):
        called.append(k)
        if k == 1:
            begun.set()
        return jnp.asarray(np.float64(k))

    ahead = Ahead(fetch, last=3)
    assert ahead(0) == 0 and begun.wait(10)
    assert [int(ahead(k)) for k in (1, 2, 3)] == [1, 2, 3] and called == [0, 1, 2, 3]
    assert ahead(2).dtype == np.float64  # a round again


def test_an_error_in_the_thread_is_the_rounds():
    def fetch(k):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Ahead(fetch, last=3)(0)


def test_a_small_cohort_of_many_clients_is_distinct_and_fair():
    """Drawn without a permutation of the population: uniform over clients, and over pairs."""
    total, cohort, draws = 200, 4, 3000
    assert total >= SPARSE * cohort
    ids = np.asarray(
        jax.vmap(lambda key: sample_cohort(key, total, cohort))(jax.random.split(jax.random.key(0), draws))
    )
    assert all(len(set(row)) == cohort for row in ids) and ids.min() >= 0 and ids.max() < total
    counts = np.bincount(ids.reshape(-1), minlength=total)
    expected = draws * cohort / total
    chi_squared = np.sum((counts - expected) ** 2) / expected
    assert abs(chi_squared - total) < 5 * np.sqrt(2 * total)
    gaps = np.bincount((ids[:, 0] - ids[:, 1]) % total, minlength=total)
    assert gaps[0] == 0 and abs(np.sum((gaps[1:] - draws / 199) ** 2) / (draws / 199) - 199) < 5 * np.sqrt(2 * 199)


def test_the_work_of_a_draw_does_not_grow_with_the_population():
    """By the arrays in its program: none has more entries than the square of the cohort."""
    program = jax.make_jaxpr(lambda key: sample_cohort(key, 10**9, 8))(jax.random.key(0))
    sizes = []
    stack = [program.jaxpr]
    while stack:
        jaxpr = stack.pop()
        for eqn in jaxpr.eqns:
            sizes += [np.prod(v.aval.shape) for v in eqn.outvars]
            stack += [sub.jaxpr for sub in jax.tree.leaves(list(eqn.params.values())) if hasattr(sub, "jaxpr")]
    assert max(sizes) <= 64


def test_absent_clients_do_not_exist_on_the_device(people):
    cohort = people[0].cohort(np.array([1, 5]))
    np.testing.assert_array_equal(jax.vmap(present)(cohort.clients).sum(axis=1), [1, 1])
    assert cohort.data["x"].shape == (9, 2)


def test_a_client_without_examples_has_zero_for_a_mean_and_an_empty_row():
    data = {"x": np.arange(6.0, dtype=np.float32)}
    owned = [[4, 5], [], [1]]
    padded = Client(jnp.array([[4, 5], [0, 0], [1, 0]]), jnp.array([2, 0, 1]))
    host, device = OnHost(data, owned, 2, jax.device_put), Resident(data, padded)
    np.testing.assert_array_equal(host.means({"x": data["x"]})["x"], [4.5, 0, 1])
    np.testing.assert_array_equal(device.means({"x": jnp.asarray(data["x"])})["x"], [4.5, 0, 1])
    cohort = host.cohort(jnp.array([1, 0]))
    assert cohort.clients.num_examples.tolist() == [0, 2]
