"""Many clients, run in chunks and over devices, against one client after another; cohorts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fipa_jax.client.examples import Client, gather, present
from fipa_jax.federation import parallel as simulate
from fipa_jax.federation.population import sample_cohort

CLIENTS = 5  # a multiple of no number of devices and of no chunk
SIZES = jnp.array([2, 9, 1, 9, 4])


def _mesh(devices):
    return jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def _program(one, key):
    """One client's work: products, a factorisation, a loop of its own length, and its own key."""
    noise = jax.random.normal(key, one["a"].shape)
    basis = jnp.linalg.qr(one["a"] + 0.1 * noise)[0]
    power = jax.lax.fori_loop(0, one["trips"], lambda _, b: jnp.sin(one["a"] @ b), basis)
    return {"basis": basis, "norm": jnp.linalg.norm(power), "trips": one["trips"] + 1}


def _clients():
    a = np.random.default_rng(0).normal(size=(CLIENTS, 6, 6)).astype(np.float32)
    stacked = {"a": jnp.asarray(a), "trips": jnp.arange(CLIENTS)}
    return stacked, jax.random.split(jax.random.key(0), CLIENTS)


@functools.cache
def _mapped(chunk, devices, sized=True):
    mesh = _mesh(devices) if devices else None
    sizes = SIZES if sized else None
    run = jax.jit(lambda *args: simulate.map_clients(_program, (), *args, sizes=sizes, chunk=chunk, mesh=mesh))
    return jax.tree.map(np.asarray, run(*_clients()))


WAYS = [(1, 0), (2, 0), (0, 0), (16, 0), (1, 4), (2, 2), (2, 4), (0, 2)]


@pytest.mark.parametrize(("chunk", "devices", "sized"), [(*way, True) for way in WAYS] + [(2, 0, False), (1, 4, False)])
def test_every_way_gives_each_clients_own_result(chunk, devices, sized):
    single = jax.jit(_program)
    wanted = [single(*jax.tree.map(lambda leaf: leaf[m], _clients())) for m in range(CLIENTS)]
    wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *wanted)
    found = _mapped(chunk, devices, sized)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # vmap changes the order of sums


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_one_after_another_the_devices_do_not_change_a_bit(devices):
    for got, want in zip(jax.tree.leaves(_mapped(1, devices)), jax.tree.leaves(_mapped(1, 0)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("devices", [0, 2])
def test_replicated_arrays_are_whole_on_every_device(devices, x64):
    tree = {"a": np.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "n": 4}
    found = simulate.replicate(tree, _mesh(devices) if devices else None)
    np.testing.assert_array_equal(found["a"], tree["a"])
    assert found["a"].dtype == np.float64 and found["n"] == 4
    np.testing.assert_array_equal(jax.random.normal(found["key"], [3]), jax.random.normal(tree["key"], [3]))
    for leaf in (found["a"], found["key"]):
        assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == max(devices, 1)


@jax.custom_batching.custom_vmap
def _largest_beside(size):
    return size


@_largest_beside.def_vmap
def _largest_of_all(axis_size, in_batched, sizes):
    return jnp.max(sizes), False


def test_a_chunk_holds_clients_of_nearly_equal_sizes():
    run = lambda sizes: simulate.map_clients(_largest_beside, (), sizes, sizes=sizes, chunk=2)
    np.testing.assert_array_equal(jax.jit(run)(SIZES), [4, 9, 1, 9, 4])


@pytest.mark.parametrize("hands", [1, 2, 4])
def test_everybody_is_dealt_as_much(hands):
    sizes = np.sort(np.random.default_rng(0).exponential(size=24))[::-1]
    dealt = simulate.deal(len(sizes), hands)
    assert sorted(dealt) == list(range(len(sizes)))
    share = sizes[dealt].reshape(hands, -1)
    assert np.all(np.diff(share, axis=1) <= 0), "each hand's by falling size"
    assert np.ptp(share.sum(axis=1)) <= sizes[0]


def test_a_single_client_keeps_its_axis():
    one = jax.tree.map(lambda leaf: leaf[:1], _clients())
    for chunk in (0, 1, 2):
        result = simulate.map_clients(_program, (), *one, chunk=chunk)
        np.testing.assert_allclose(result["basis"], _mapped(1, 0)["basis"][:1], rtol=1e-4, atol=1e-5)


def test_a_cohort_is_distinct_and_fair():
    total, cohort, draws = 10, 4, 500
    ids = np.asarray(
        jax.vmap(lambda key: sample_cohort(key, total, cohort))(jax.random.split(jax.random.key(0), draws))
    )
    assert ids.shape == (draws, cohort) and ids.min() >= 0 and ids.max() < total
    assert all(len(set(row)) == cohort for row in ids)
    expected, deviation = draws * 0.4, np.sqrt(draws * 0.4 * 0.6)
    assert np.all(np.abs(np.bincount(ids.reshape(-1), minlength=total) - expected) < 5 * deviation)
    np.testing.assert_array_equal(sample_cohort(jax.random.key(1), total, total), np.arange(total))


def test_present_and_gather():
    client = Client(jnp.array([4, 2, 2, 0]), jnp.array(2))
    np.testing.assert_array_equal(present(client), [True, True, False, False])
    data = {"x": jnp.arange(10.0).reshape(5, 2), "y": jnp.arange(5)}
    found = gather(data, client.indices)
    np.testing.assert_array_equal(found["x"], np.arange(10.0).reshape(5, 2)[[4, 2, 2, 0]])
    np.testing.assert_array_equal(found["y"], [4, 2, 2, 0])


@pytest.mark.parametrize(("chunk", "devices"), [(1, 0), (2, 0), (0, 2)])
def test_who_is_not_wanted_does_no_work(chunk, devices):
    """The others' results are their own; one that is not wanted would never come to an end."""
    wanted = jnp.array([False, True, False, True, False])
    clients, keys = _clients()
    endless = clients | {"trips": jnp.where(wanted, clients["trips"], 2**31 - 1)}
    mesh = _mesh(devices) if devices else None
    run = jax.jit(
        lambda *args: simulate.map_clients(_program, (), *args, sizes=SIZES, wanted=wanted, chunk=chunk, mesh=mesh)
    )
    found, whole = jax.tree.map(np.asarray, run(endless, keys)), _mapped(1, 0)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got[np.asarray(wanted)], want[np.asarray(wanted)], rtol=1e-4, atol=1e-5)
        assert not np.any(got[~np.asarray(wanted)])
