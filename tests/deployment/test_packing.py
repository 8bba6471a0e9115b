"""Numbers in few bits travel as few bits: what arrives is what a simulation has, in as many bytes as it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.deployed import Deployed, config_of, gap

from fipa_jax.client import compression
from fipa_jax.curvature import few_bits
from fipa_jax.curvature.common_basis import Core, in_few_bits
from fipa_jax.deployment import packing, wire
from fipa_jax.deployment.agreement import work_of
from fipa_jax.deployment.packing import Bits, packed, unpacked

SPAN = "fipa_span:aggregator.span.columns=6:aggregator.span.fresh=2:aggregator.span.bits=3:sketch.share=0.4"
RTOL = 1e-6  # some roundings of float32


def columns_of(size, number, bits):
    """Columns as they arrive."""
    whole = np.random.default_rng(number).normal(size=(size, number)).astype(np.float32)
    whole[: size // 3] *= 1e-5  # blocks of different scales
    return np.asarray(few_bits.columns_sent(jax.random.key(number), whole, bits))


def update_of(seed, size, bits, dtype="float32"):
    """An update as it arrives: turned, rounded, turned back."""
    vector = jnp.asarray(np.random.default_rng(seed).standard_t(2, size=size), dtype)
    compressor = compression.compressor_of(compression.Compression("few_bits", bits=bits))
    return np.asarray(compressor.apply(jax.random.key(seed), vector, jnp.zeros_like(vector))[0])


def same(got, wanted, rtol=RTOL):
    """But for roundings of the largest entries, which turning shares out."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("size", [1, 255, 257, 1000])
def test_an_update_arrives_as_it_was_rounded_in_the_bytes_that_are_counted(bits, size):
    vector = update_of(size, size, bits)
    update = {
        "delta/a": vector[: size // 2],
        "delta/b": vector[size // 2 :].reshape(-1, 1),
        "num_examples": np.ones([]),
    }
    sent = packed(update, Bits(update=bits))
    assert set(sent) == {"delta/integers", "delta/scales", "num_examples"}
    assert sum(array.nbytes for name, array in sent.items() if "delta" in name) == few_bits.bytes_of(size, bits)
    got = unpacked(sent, Bits(update=bits), update)
    for name, array in update.items():
        same(got[name], array)
        assert got[name].dtype == array.dtype and got[name].shape == array.shape


def test_in_float64_too():
    with jax.enable_x64(True):
        vector = update_of(0, 700, 8, "float64")
    got = unpacked(packed({"delta/a": vector}, Bits(update=8)), Bits(update=8), {"delta/a": vector})
    assert vector.dtype == np.float64
    same(got["delta/a"], vector, rtol=1e-14)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize(("size", "columns"), [(8, 0), (8, 1), (8, 5), (8, 8), (60, 30), (60, 60)])
def test_a_core_arrives_as_it_was_rounded(bits, size, columns):
    """Of several blocks too, where columns that are not in use do not travel."""
    draw = np.random.default_rng(columns)
    root = np.zeros([size, size], np.float32)
    root[:, :columns] = draw.normal(size=(size, columns)) * np.logspace(0, -3, columns)
    core = Core(root.T @ root)
    core = np.asarray(in_few_bits(jax.random.key(0), core, bits).values if bits else core.values)
    sent = packed({packing.CORE: core}, Bits(curvature=bits))
    assert bool(sent) == bool(columns)
    got = unpacked(sent, Bits(curvature=bits), {packing.CORE: core})
    np.testing.assert_allclose(got[packing.CORE], core, rtol=10 * RTOL, atol=1e-12)


@pytest.mark.parametrize("used", [0, 2, 4])
def test_columns_that_are_not_in_use_do_not_travel(used):
    basis = np.zeros([300, 4], np.float32)
    basis[:, :used] = columns_of(300, used, 4)
    sent = packed({packing.ASKED: basis}, Bits(asked=4))
    assert sum(array.nbytes for array in sent.values()) == used * few_bits.bytes_of(300, 4)
    got = unpacked(sent, Bits(asked=4), {packing.ASKED: basis})[packing.ASKED]
    same(got, basis)
    assert not np.any(got[:, used:])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_eigenvectors_arrive_as_they_were_rounded(bits):
    basis = columns_of(700, 3, bits)
    sent = packed({packing.BASIS: basis}, Bits(curvature=bits))
    assert sum(array.nbytes for array in sent.values()) == 3 * few_bits.bytes_of(700, bits)
    same(unpacked(sent, Bits(curvature=bits), {packing.BASIS: basis})[packing.BASIS], basis)


def test_a_number_that_is_not_finite_spoils_its_block_and_is_seen():
    vector = update_of(0, 600, 8).copy()
    vector[300] = np.nan
    got = unpacked(packed({"delta/a": vector}, Bits(update=8)), Bits(update=8), {"delta/a": vector})["delta/a"]
    assert np.isnan(got[256:512]).all() and np.isfinite(got[:256]).all() and np.isfinite(got[512:]).all()


def faults(sent):
    """{what is wrong: arrays} of an update of 600 entries in 3 bits."""
    integers, scales = sent["delta/integers"], sent["delta/scales"]
    yield "no integers", {"delta/scales": scales}
    yield "no scales", {"delta/integers": integers}
    yield "too short", sent | {"delta/integers": integers[:, :-1]}
    yield "two vectors", {name: np.repeat(array, 2, axis=0) for name, array in sent.items()}
    yield "of another type", sent | {"delta/scales": scales.astype(np.float64)}
    yield "flat", sent | {"delta/integers": integers[0]}
    yield "an integer that no rounding makes", sent | {"delta/integers": integers | 0xFF}
    yield "a negative scale", sent | {"delta/scales": -scales}
    yield "a scale without end", sent | {"delta/scales": np.full_like(scales, np.inf)}


def test_what_no_client_packs_is_refused():
    vector = update_of(0, 600, 3)
    sent = packed({"delta/a": vector}, Bits(update=3))
    for what, arrays in faults(sent):
        with pytest.raises(wire.Malformed, match="delta"):
            unpacked(arrays, Bits(update=3), {"delta/a": vector})
            pytest.fail(what)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_few_entries_arrive_in_the_bytes_that_are_counted_and_no_more_than_were_asked_for(dtype):
    compressor = compression.compressor_of(compression.Compression("top_k", share=0.1))
    with jax.enable_x64(dtype == "float64"):
        vector = jnp.asarray(np.random.default_rng(0).normal(size=95), dtype)
        update = np.asarray(compressor.apply(jax.random.key(0), vector, jnp.zeros_like(vector))[0])
    forms = {"delta/a": update[:40].reshape(5, 8), "delta/b": update[40:]}
    bits = Bits(kept=0.1)
    sent = packed(forms, bits)
    assert sum(array.nbytes for array in sent.values()) == compressor.bytes_of(95) == 8 * 10
    for name, array in unpacked(sent, bits, forms).items():
        np.testing.assert_array_equal(array, forms[name])
        assert array.dtype == dtype
    places, values = sent[packing.PLACES], sent[packing.VALUES]
    more = np.arange(11, dtype=np.int32)
    for wrong in (
        {packing.PLACES: places[::-1].copy()},
        {packing.PLACES: places + 95},
        {packing.PLACES: places - 95},
        {packing.PLACES: places.astype(np.int64)},
        {packing.PLACES: places[:-1]},
        {packing.PLACES: more, packing.VALUES: more.astype(np.float32)},
        {packing.VALUES: values.astype(np.float64)},
        {packing.VALUES: values[None]},
    ):
        with pytest.raises(wire.Malformed, match="delta/places"):
            unpacked(sent | wrong, bits, forms)
    with pytest.raises(wire.Malformed, match="delta/places"):
        unpacked({}, bits, forms)


def test_cores_and_bases_that_are_too_large_are_refused():
    core = np.eye(3, dtype=np.float32)
    for bits in (0, 8):
        sent = packed({packing.CORE: core}, Bits(curvature=bits))
        with pytest.raises(wire.Malformed, match="core"):
            unpacked(sent, Bits(curvature=bits), {packing.CORE: core[:2, :2]})
    basis = columns_of(50, 3, 8)
    for name, bits in ((packing.BASIS, Bits(curvature=8)), (packing.ASKED, Bits(asked=8))):
        with pytest.raises(wire.Malformed, match=name):
            unpacked(packed({name: basis}, bits), bits, {name: basis[:, :2]})


@pytest.mark.parametrize("bits", [0, 8])
def test_a_core_that_is_none_is_refused(bits):
    core = np.eye(3, dtype=np.float32)
    sent = packed({packing.CORE: core}, Bits(curvature=bits))
    name = packing.DIAGONAL if bits else packing.CORE
    for wrong in (np.ones((), np.float32), np.ones([2, 2], np.float32), np.ones(5, np.float32), np.ones(3)):
        with pytest.raises(wire.Malformed, match="core"):
            unpacked(sent | {name: wrong}, Bits(curvature=bits), {packing.CORE: core})


def test_a_client_that_sends_another_cores_arrays_is_left_out():
    for bits, more in ((0, {packing.DIAGONAL: np.ones(2)}), (8, {packing.DIAGONAL: np.ones(())})):
        deployed = Deployed(config_of(), f"{SPAN}:sketch.bits={bits}:sketch.share=1")
        server = deployed.server()
        server.round(deployed.answers(server))
        sent = deployed.answers(server)
        message = wire.unpack(sent[0])
        arrays = {name: array for name, array in message.arrays.items() if not name.startswith("core")} | more
        server.round(sent | {0: wire.pack(message._replace(arrays=arrays))})
        assert set(server.wrong) == {0}


def test_large_numbers_and_half_precision_arrive():
    huge = np.full(300, 3e37, np.float32)
    for bits in (8, 16):
        got = unpacked(packed({"delta/a": huge}, Bits(update=bits)), Bits(update=bits), {"delta/a": huge})
        np.testing.assert_allclose(got["delta/a"], huge, rtol=RTOL)
    half, full = np.asarray(jnp.full(200, 0.3, jnp.bfloat16)), update_of(0, 100, 12)
    update = {"delta/a": half, "delta/b": full}
    got = unpacked(packed(update, Bits(update=12)), Bits(update=12), update)
    assert got["delta/a"].dtype == half.dtype and got["delta/b"].dtype == full.dtype
    np.testing.assert_allclose(got["delta/a"].astype(float), 0.3, rtol=1e-2)


@pytest.mark.parametrize(
    "spec",
    [
        SPAN,
        pytest.param(
            "fipa_few_bytes:sketch.rank=2:sketch.share=0.4:local.compress.name=few_bits",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fipa_few_bytes:sketch.rank=2:sketch.share=0.4:sketch.budget=35",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"{SPAN}:sketch.bits=0", marks=pytest.mark.slow),
    ],
)
def test_as_many_bytes_travel_as_a_simulation_counts(spec):
    """What comes on top are the headers, the numbers of each client and flags of its report."""
    deployed = Deployed(config_of(clients=5, fipa={"rounds": 4}), spec)
    server, travelled, turns = deployed.server(), [], set()
    shown = ("params",) if "few_bytes" in spec else ("params", "asked/0")  # a budget's level is a lone number
    while not server.done:
        blobs = server.broadcasts(server.draw())
        answers = {client: deployed.sites[client].work(blob) for client, blob in blobs.items()}
        turns |= {bool(wire.unpack(blob).arrays["due"]) for blob in blobs.values()}
        travelled.append((counted(blobs, shown), counted(answers, ("delta", "core", "sketch/basis"))))
        server.round(answers)
        assert not server.wrong and server.last["bytes_down"] == sum(map(len, blobs.values()))
    params, rows = deployed.simulate()
    assert gap(server.params, params) <= 1e-6 and turns == {True, False}
    if "few_bytes" not in spec:
        assert travelled == [(row["bytes_down"], row["bytes_up"]) for row in rows]
    else:  # its pairs' eigenvalues and reports too
        pairs = [row["sketch_pairs"] * (8 + 8) + row["sketches_sent"] * report_bytes(deployed) for row in rows]
        assert travelled == [(row["bytes_down"], row["bytes_up"] - more) for row, more in zip(rows, pairs, strict=True)]


def counted(blobs, prefixes):
    """The bytes of a round's arrays of some names."""
    arrays = [item for blob in blobs.values() for item in wire.unpack(blob).arrays.items()]
    return sum(array.nbytes for name, array in arrays if name.startswith(prefixes))


def report_bytes(deployed):
    """Those of a client's report without its residuals, as a simulation counts them."""
    leaves = jax.tree.leaves(deployed.agreement.like[0].sketch.report._replace(residuals=()))
    return sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in leaves)


def test_where_clients_take_turns_no_broadcast_is_for_all():
    server = Deployed(config_of(clients=5), SPAN).server()
    with pytest.raises(ValueError, match=r"call broadcasts\(clients\)"):
        server.broadcast()


def test_who_is_asked_is_drawn_among_all_clients_of_the_round():
    server = Deployed(config_of(clients=5), SPAN).server()
    blobs = server.broadcasts([3, 1, 2, 0, 4])
    assert server.broadcasts(range(5)) == blobs
    with pytest.raises(ValueError, match="all are drawn from at once"):
        server.broadcasts([1])


def test_a_warm_site_has_compiled_both_kinds_of_work():
    deployed = Deployed(config_of(clients=5), SPAN)
    deployed.sites[0].warm_up()
    programs = work_of._cache_size()
    server = deployed.server()
    for _ in range(4):
        server.round(deployed.answers(server))
    assert work_of._cache_size() == programs
