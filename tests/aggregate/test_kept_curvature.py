"""Gradients in every round and sketches seldom, beside a server that keeps the dense mean of all that was sent."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pasts import BETA, COHORTS, DECAY, NOTHING, rule_of, run
from helpers.rules import LIKE, SIZE, Dense, assert_close, shapes_of, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import Limits

KEPT = NOTHING._replace(kind="curvature", rank=SIZE, decay=DECAY)
SENDERS = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])  # in each round


def with_senders(cohort, senders):
    """The cohort, of which some send no pair: all of it is zero."""
    deltas, counts, values, bases = cohort
    return deltas, counts, values * senders[:, None], bases * senders[:, None, None]


def rounds():
    return [with_senders(*pair) for pair in zip(COHORTS, SENDERS, strict=True)]


def test_the_step_is_the_mean_gradient_by_the_mean_of_what_was_sent(x64):
    found, infos, _ = run(rounds(), KEPT)
    theta, curvature, weight = np.zeros(SIZE), np.zeros([SIZE, SIZE]), 0.0
    for k, (cohort, senders) in enumerate(zip(COHORTS, SENDERS, strict=True)):
        deltas, counts, _, _ = cohort
        curvature, weight = DECAY * curvature, DECAY * weight
        old = weight
        for sends, count, matrix in zip(senders, counts, Dense(*cohort).each, strict=True):
            curvature, weight = curvature + sends * count * matrix, weight + sends * count
        mean = np.asarray(counts) @ np.asarray(deltas) / np.sum(counts)
        theta = theta + np.linalg.solve(curvature / weight + BETA * np.eye(SIZE), mean)
        assert_close(found[k + 1], theta, 1e-8)
        np.testing.assert_allclose(infos[k]["past_share"], old / weight, atol=1e-12)


def test_before_the_first_sketch_there_is_no_step(x64):
    found, _, _ = run([with_senders(COHORTS[0], SENDERS[1]), COHORTS[1]], KEPT)
    assert not np.any(found[1]) and np.any(found[2])


def test_the_bound_counts_what_no_sketch_says(x64):
    """step^T (H + beta I) step / 2 of the dense H."""
    most = 1e-3
    cohort = with_senders(COHORTS[0], SENDERS[0])
    found, _, _ = run([cohort], KEPT, limits=Limits(0.0, most, 0.0, 0.0))
    matrix = Dense(*COHORTS[0]).each[0] + BETA * np.eye(SIZE)
    np.testing.assert_allclose(found[1] @ matrix @ found[1] / 2, most, rtol=1e-8)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("damped", {}),  # a relative damping is the default
        ("damped", {"relative": False, "damping": 0.0}),
        ("tikhonov", {"relative": False}),
        ("pinv", {"relative": False}),
    ],
)
def test_gradients_are_divided_by_an_absolute_damping_of_the_damped_form(form, options):
    with pytest.raises(ValueError, match=r"past\.kind = 'curvature' divides gradients by it"):
        aggregate.fipa(form, past=KEPT, **options)


def test_gradients_that_come_late_are_refused(x64):
    rule, _ = rule_of(KEPT)
    late = uploads_of(*COHORTS[0])._replace(age=jnp.arange(4))
    with pytest.raises(ValueError, match="needs clients that are not late"):
        shapes_of(rule, late, rule.init(LIKE), LIKE)
