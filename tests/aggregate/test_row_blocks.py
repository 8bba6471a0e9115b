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


def _rule(mesh, **options):
    return aggregate.fipa(damping=1e-2, spread=Spread(mesh), **options)


def _program(rule, mesh):
    """Two rounds of a rule, jitted, and what it is given, with the bases spread over the mesh."""
    delta, counts, values, basis = _sent()
    basis = np.pad(basis, [(0, 0), (0, padded(SIZE) - SIZE), (0, 0)])
    placed = basis if mesh is None else jax.device_put(basis, NamedSharding(mesh, PartitionSpec(None, "clients")))

    @jax.jit
    def rounds(basis):
        params = jnp.zeros(SIZE)
        state, uploads = rule.init(params), aggregate.Uploads(delta, counts, Sketch(jnp.asarray(values), basis))
        for _ in range(2):
            received, info = aggregate.receive(uploads, params, mesh)
            step, state, info, _ = aggregate.step_of(rule, received, state, params, info)
            params = params + step
        return params, state, info["spectrum"], info["divergence"]

    return rounds, placed


@pytest.mark.parametrize(
    "options",
    [{"past": aggregate.PastRounds("prior", rank=5)}, pytest.param({"merge": "tsqr"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_steps_spectra_and_past_rounds_have_the_same_bits_on_all_devices(options):
    found = []
    for devices in (1, 2, 4):
        mesh = make_mesh(devices)
        rounds, basis = _program(_rule(mesh, **options), mesh)
        found.append(jax.device_get(rounds(basis)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)
    plain = aggregate.fipa(damping=1e-2, **options)
    delta, counts, values, basis = _sent()
    params, state = jnp.zeros(SIZE), plain.init(jnp.zeros(SIZE))
    for _ in range(2):
        received, info = aggregate.receive(aggregate.Uploads(delta, counts, Sketch(values, basis)), params)
        step, state, *_ = jax.jit(functools.partial(aggregate.step_of, plain))(received, state, params, info)
        params = params + step
    np.testing.assert_allclose(found[0][0], params, rtol=1e-4, atol=1e-6)  # and near what is read in one run


def test_no_device_holds_all_rows_of_the_bases():
    mesh = make_mesh(4)
    rounds, basis = _program(_rule(mesh), mesh)
    text = rounds.lower(basis).compile().as_text()
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
