"""Long bases are read in segments that devices share: the same bits on 1, 2 and 4 of them, and never whole on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fipa_jax import aggregate
from fipa_jax.aggregate import row_blocks
from fipa_jax.aggregate.row_blocks import Spread, map_rows, padded, reduce_rows, segments_of
from fipa_jax.curvature import Sketch
from fipa_jax.federation.parallel import make_mesh

CLIENTS, SIZE, RANK = 3, 1000, 4


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Spreads rows from 512 on."""
    monkeypatch.setattr(row_blocks, "SPREAD_FROM", 2**9)


@functools.cache
def _sent():
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(CLIENTS, SIZE, RANK)))[0]
    values = -np.sort(-draw.uniform(0.5, 4, size=(CLIENTS, RANK)), axis=1)
    fields = draw.normal(size=(CLIENTS, SIZE)), draw.integers(1, 9, CLIENTS), values, basis
    return tuple(np.float32(x) for x in fields)


PAST = {"past": aggregate.PastRounds("prior", rank=5)}


def _rounds(devices, sent, options=PAST, number=2):
    """(parameters, state, spectrum) after some rounds of a rule, and the compiled program of one."""
    delta, counts, values, basis = sent
    mesh = make_mesh(devices) if devices else None
    rule = aggregate.fipa(damping=1e-2, spread=Spread(mesh) if devices else None, **options)
    if mesh is not None:
        basis = jax.device_put(basis, NamedSharding(mesh, PartitionSpec(None, "clients")))

    def serve(params, state, basis):
        uploads = aggregate.Uploads(delta, counts, Sketch(jnp.asarray(values), basis))
        received, info = aggregate.receive(uploads, params, mesh)
        step, state, info, _ = aggregate.step_of(rule, received, state, params, info)
        return params + step, state, info["spectrum"]

    params, placed = jnp.zeros(SIZE), {}
    given = params, jax.jit(rule.init)(params), basis
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        given, placed = (*jax.device_put(given[:2], whole), basis), {"out_shardings": whole}
    program = jax.jit(serve, **placed).lower(*given).compile()
    for _ in range(number):
        params, state, spectrum = program(*given)
        given = params, state, basis
    return program, jax.device_get((params, state, spectrum))


@functools.cache
def _padded_rounds(devices, merge="auto"):
    delta, counts, values, basis = _sent()
    basis = np.pad(basis, [(0, 0), (0, padded(SIZE) - SIZE), (0, 0)])
    return _rounds(devices, (delta, counts, values, basis), PAST | {"merge": merge})


SLOW = [pytest.param(merge, 2, marks=pytest.mark.slow) for merge in ("auto", "tsqr")]


@pytest.mark.parametrize(("merge", "devices"), [("auto", 4), *SLOW])
def test_steps_spectra_and_past_rounds_have_the_same_bits_on_all_devices(merge, devices):
    alone, together = (_padded_rounds(number, merge)[1] for number in (1, devices))
    jax.tree.map(np.testing.assert_array_equal, alone, together)


@pytest.mark.slow
def test_segments_are_near_what_is_read_in_one_run():
    alone, plain = _padded_rounds(1)[1], _rounds(0, _sent())[1]
    np.testing.assert_allclose(alone[0], plain[0], rtol=1e-4, atol=1e-6)


def test_no_device_holds_all_rows_of_the_bases():
    text = _padded_rounds(4)[0].as_text()
    whole, own = f"[{CLIENTS},{padded(SIZE)},{RANK}]", f"[{CLIENTS},{padded(SIZE) // 4},{RANK}]"
    assert own in text and whole not in text


def test_segments_join_in_one_order_and_maps_stay_in_theirs():
    rows = jnp.arange(1024.0).reshape(1, 1024, 1)

    def joined(devices):
        read, mesh = lambda factor, rows: factor * jnp.sum(rows[0]), make_mesh(devices)
        return float(jax.jit(lambda rows: reduce_rows(2.0, [rows], read, lambda a, b: a - 3 * b, mesh))(rows))

    assert joined(1) == joined(2) == joined(4) == joined(3)  # of three each reads all
    segments = np.arange(1024.0).reshape(64, 16).sum(axis=1) * 2
    while len(segments) > 1:
        segments = segments[0::2] - 3 * segments[1::2]
    np.testing.assert_allclose(joined(1), segments[0], rtol=1e-6)
    for mesh in (None, make_mesh(4)):
        np.testing.assert_array_equal(
            map_rows((), [rows], lambda _, rows: rows[0][0, :, 0] + 1, mesh), rows.ravel() + 1
        )


def test_only_long_rows_are_spread():
    assert (padded(511), segments_of(511)) == (511, 1)
    assert (padded(1000), segments_of(1024)) == (1024, 64)
    assert segments_of(1000) == 1  # as they came, in one run


def test_single_uploads_may_come_with_rows_to_be_spread():
    """All of them, or none: what is stacked has one shape."""
    delta, counts, values, basis = _sent()
    wide = np.pad(basis, [(0, 0), (0, padded(SIZE) - SIZE), (0, 0)])
    one = lambda place, bases: aggregate.Uploads(delta[place], counts[place], Sketch(values[place], bases[place]))
    stacked, wrong = aggregate.collect([one(0, wide), one(1, wide), one(2, basis)], np.zeros(SIZE, np.float32))
    assert stacked.sketch.basis.shape == (CLIENTS, padded(SIZE), RANK)
    assert list(wrong) == [2] and "with rows to be spread" in wrong[2]
