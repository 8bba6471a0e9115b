"""How far a round, or one client, moves the step: the bounds on its length and its curvature norm, and the caps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import COHORTS, run
from helpers.rules import Dense, apply_rule, assert_close, clients_of, each_form, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import limits
from fipa_jax.curvature.sketch import Sketch


@each_form
def test_max_step_shortens_the_step_and_does_not_turn_it(x64, form):
    clients = clients_of(2)
    uploads, longest = uploads_of(*clients), np.linalg.norm(clients[0], axis=1).max()
    free, free_info = apply_rule(form, uploads)
    bound = np.linalg.norm(free) / longest / 2
    step, info = apply_rule(form, uploads, **{"limits.max_step": bound})
    assert_close(step, free / 2, 1e-12)
    np.testing.assert_allclose(info["step_ratio"], bound, rtol=1e-12)
    np.testing.assert_allclose(free_info["step_ratio"], 2 * bound, rtol=1e-12)
    np.testing.assert_array_equal(apply_rule(form, uploads, **{"limits.max_step": 3 * bound})[0], free)


def test_the_bound_in_curvature_norm_shortens_the_step_and_does_not_turn_it(x64):
    free, bounded = run(COHORTS[:1]), run(COHORTS[:1], hyper={"limits.max_divergence": 0.01})
    step = free[0][-1]
    np.testing.assert_allclose(free[1][0]["divergence"], step @ Dense(*COHORTS[0]).total @ step / 2, rtol=1e-9)
    assert free[1][0]["divergence"] > 0.01
    np.testing.assert_allclose(bounded[1][0]["divergence"], 0.01, rtol=1e-9)
    assert_close(bounded[0][-1] / np.linalg.norm(bounded[0][-1]), step / np.linalg.norm(step), 1e-9)


def _capped(eigenvalues, weights, cap):
    sketch, weights = Sketch(jnp.asarray(eigenvalues), jnp.zeros([len(weights), 3, 2])), jnp.asarray(weights)
    traces = limits.traces_of(sketch, weights)
    return limits.cap_traces(sketch, traces, cap * limits.median_trace(traces, weights))


def test_traces_are_capped_at_the_median_of_those_who_take_part(x64):
    eigenvalues = np.array([[3.0, 1], [2, 0], [1e9, 1], [np.nan, 1], [600, 400], [5, 0]])
    weights = np.array([0.2, 0.1, 0.3, 0, 0.2, 0.2])  # traces 4, 2, 1e9, out, 1000, 5: the median is 5
    found, capped = _capped(eigenvalues, weights, 100.0)
    assert capped.tolist() == [False, False, True, False, True, False]
    np.testing.assert_array_equal(found.eigenvalues[:2], eigenvalues[:2])
    np.testing.assert_allclose(found.eigenvalues[2], 500 * eigenvalues[2] / (1e9 + 1))
    np.testing.assert_allclose(found.eigenvalues[4], [300, 200])


def _median(traces, weights):
    return float(limits.median_trace(jnp.asarray(traces), jnp.asarray(weights)))


@pytest.mark.parametrize("clients", [2, 3, 4, 7])
def test_the_median_trace_is_continuous_and_no_minority_moves_it(x64, clients):
    draw = np.random.default_rng(clients)
    for _ in range(20):
        traces, weights = 10.0 ** draw.uniform(-6, 3, clients), 10.0 ** draw.uniform(-4, 0, clients)
        middle, order = _median(traces, weights), draw.permutation(clients)
        np.testing.assert_allclose(_median(traces[order], weights[order]), middle, rtol=1e-12)
        np.testing.assert_allclose(_median(np.r_[traces, 1e9], np.r_[weights, 0]), middle, rtol=1e-12)
        # It moves no further than the trace that moves most, also to zero, and little with the weights.
        moved = traces * draw.choice([0, 1e-3, 1, 1.1], clients)
        assert abs(_median(moved, weights) - middle) <= np.max(np.abs(moved - traces)) * (1 + 1e-9)
        nearby = weights * (1 + 1e-7 * draw.normal(size=clients))
        assert abs(_median(traces, nearby) - middle) <= 1e-4 * np.max(traces)
        leaving = weights * np.where(np.arange(clients) == order[0], 1e-9, 1)
        gone, others = weights * (np.arange(clients) != order[0]), order[1:]
        scaled = [np.minimum(1, 10 * _median(traces, left) / traces[others]) for left in (leaving, gone)]
        np.testing.assert_allclose(*scaled, atol=1e-4)
        # Full votes: while less than half are at fault, it is no more than a sound client's.
        sound, full = traces.copy(), draw.uniform(0.1, 1, clients)
        sound[order[: (clients - 1) // 2]] = 1e30
        assert _median(sound, full) <= np.max(traces)


def _two_and(weight, small):
    """The step of two clients, one of them with a curvature of `small` beside the other's, and a third's weight."""
    fields = [field[:3] for field in _five(1.0)]
    fields[2] = fields[2] * np.array([1, small, 1])[:, None]
    sent = jnp.asarray(fields[0]), Sketch(*map(jnp.asarray, fields[2:])), jnp.asarray([5.0, 3.0, weight])
    step, info = _step(10.0)(*sent, damping=0.05, max_step=0.0)
    return np.asarray(step), np.asarray(info["capped"])


def test_two_clients_cannot_outvote_each_other_and_no_step_jumps(x64):
    (none, _), (tiny, capped) = _two_and(0.0, 0.0), _two_and(0.0, 1e-5)
    assert not capped.any()
    assert_close(tiny, none, 1e-3)
    assert_close(_two_and(1e-7, 1e-5)[0], tiny, 1e-3)
    assert np.linalg.norm(_two_and(3.0, 1e-5)[0] - tiny) > 0.01 * np.linalg.norm(tiny)
    assert _two_and(3.0, 1e9)[1].tolist() == [False, True, False], "of three one is"


def _five(scale, seed=0, size=8, rank=4):
    """(deltas, counts, eigenvalues, basis) of five clients, the last one's eigenvalues times `scale`."""
    draw = np.random.default_rng(seed)
    eigenvalues = -np.sort(-draw.uniform(0.5, 4, (5, rank)), axis=1)
    eigenvalues[-1] *= scale
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, size, rank)))[0]
    return draw.normal(size=(5, size)), np.array([5, 1, 3, 7, 4]), eigenvalues, basis


@functools.cache
def _step(trace_cap):
    """FIPA's step, its bound on the length traced."""

    def call(*sent, damping, max_step):
        bounds = aggregate.Limits(max_step=max_step, trace_cap=trace_cap)
        return aggregate.fipa_step(*sent, relative=False, damping=damping, limits=bounds)

    return jax.jit(call)


@pytest.mark.parametrize("seed", range(5))
def test_one_client_with_huge_eigenvalues_moves_the_step_no_further_than_stated(x64, seed):
    """The bounds of `capped`'s docstring: in the others' curvature by the cap, in length by `max_step`."""
    fields, beta, cap = _five(1e6, seed), 0.05, 2.0

    def moved(trace_cap, counts=fields[1], max_step=0.0):
        sent = jnp.asarray(fields[0]), Sketch(*map(jnp.asarray, fields[2:])), jnp.asarray(counts)
        step, info = _step(trace_cap)(*sent, damping=beta, max_step=max_step)
        return np.asarray(step), np.asarray(info["capped"])

    without = fields[1] * [1, 1, 1, 1, 0]
    alone, none = moved(cap, without)
    dense = Dense(*fields)
    others = np.tensordot(dense.weights[:4], dense.each[:4] + beta * np.eye(8), 1)  # A
    norm = lambda x: np.sqrt(x @ others @ x)
    middle = np.sort(fields[2].sum(axis=1))[2]
    distance = np.linalg.norm(fields[0][4] - alone)
    kappa = dense.weights[4] * (cap * middle + beta)
    (capped, which), (free, _) = moved(cap), moved(0.0)
    assert which.tolist() == [False] * 4 + [True] and not none.any()
    assert norm(capped - alone) <= np.sqrt(kappa) / 2 * distance
    assert np.linalg.norm(capped - alone) <= np.sqrt(kappa / (1 - dense.weights[4]) / beta) / 2 * distance
    assert norm(capped - alone) < 0.9 * norm(free - alone), "the cap does nothing"
    assert norm(free - alone) <= norm(fields[0][4] - alone), "true of any eigenvalues"
    bound, longest = 0.1, np.linalg.norm(fields[0], axis=1).max()
    short = moved(0.0, max_step=bound)[0] - moved(0.0, without, bound)[0]
    assert 0 < np.linalg.norm(short) <= 2 * bound * longest
