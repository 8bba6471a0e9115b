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


def test_traces_are_capped_at_the_lower_median_of_those_who_take_part(x64):
    eigenvalues = np.array([[3.0, 1], [2, 0], [1e9, 1], [np.nan, 1], [600, 400]])
    weights = np.array([0.2, 0.2, 0.4, 0, 0.2])  # traces 4, 2, 1e9, out, 1000: the lower median is 4
    given = Sketch(jnp.asarray(eigenvalues), jnp.zeros([5, 3, 2]))
    found, capped = limits.cap_traces(given, limits.relative_traces(given, jnp.asarray(weights)), 100.0)
    assert capped.tolist() == [False, False, True, False, True]
    np.testing.assert_array_equal(found.eigenvalues[:2], eigenvalues[:2])
    np.testing.assert_allclose(found.eigenvalues[2], 400 * eigenvalues[2] / (1e9 + 1))
    np.testing.assert_allclose(found.eigenvalues[4], [240, 160])
    assert limits.cap_traces(given, jnp.ones(5), 0.0)[0] is given
    some = Sketch(jnp.asarray(eigenvalues * [[0], [0], [1], [1], [1]]), given.basis)  # half have no curvature
    found, capped = limits.cap_traces(some, limits.relative_traces(some, jnp.asarray(weights)), 100.0)
    assert not capped.any() and found.eigenvalues[2, 0] == 1e9


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
