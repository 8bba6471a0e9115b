"""What rounds spend, against quadrature of the definition and against figures that were computed elsewhere."""

import importlib.util
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from fipa_jax.privacy import accounting
from fipa_jax.privacy.accounting import Plan

needs_dp = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting, the extra `dp`, is not installed"
)


def normal(x, mean, deviation):
    return np.exp(-(((x - mean) / deviation) ** 2) / 2) / deviation / math.sqrt(2 * math.pi)


def delta_by_quadrature(epsilon, noise, rate=1.0):
    """max over the two directions of int max(0, p - e^epsilon q), the definition, for one round."""
    x = np.linspace(-30 * noise, 30 * noise + 1, 400_001)
    without = normal(x, 0, noise)
    with_one = (1 - rate) * without + rate * normal(x, 1, noise)
    gaps = [np.maximum(p - np.exp(epsilon) * q, 0) for p, q in ((with_one, without), (without, with_one))]
    return max(np.trapezoid(gap, x) for gap in gaps)


@pytest.mark.parametrize(("noise", "rounds"), [(3.0, 1), (3.0, 10), (0.7, 1), (20.0, 50)])
def test_full_participation_is_the_definition(noise, rounds):
    epsilon = accounting.epsilon_of(Plan(noise, 1e-3), rounds)
    assert delta_by_quadrature(epsilon, noise / math.sqrt(rounds)) == pytest.approx(1e-3, rel=1e-4)


def test_figures_that_were_computed_elsewhere():
    """By dp-accounting's accountant of privacy loss distributions."""
    assert accounting.epsilon_of(Plan(3.0, 1e-3), 10) == pytest.approx(3.350, abs=1e-3)
    assert accounting.epsilon_of(Plan(8.0, 1e-3), 40) == pytest.approx(2.352, abs=1e-3)


def test_the_noise_spends_what_it_was_asked_to():
    for released in (0.0, 0.5):
        plan = Plan(0.0, 1e-3, released=released)
        plan = plan._replace(noise=accounting.noise_for(8.0, 20, plan))
        assert accounting.epsilon_of(plan, 20) == pytest.approx(8.0, rel=1e-6)
        assert accounting.affordable(8.0, 100, plan) == 20
        assert accounting.epsilon_of(plan, 19) < 8 < accounting.epsilon_of(plan, 21)
    with pytest.raises(ValueError, match="spends all of"):
        accounting.noise_for(1.0, 20, Plan(0.0, 1e-3, released=10.0))


def test_nothing_released_costs_nothing_and_no_noise_everything():
    assert accounting.epsilon_of(Plan(1.0, 1e-3), 0) == 0
    assert accounting.gaussian_epsilon(math.inf, 1e-3) == math.inf
    assert accounting.gaussian_epsilon(1e-6, 1e-3) == 0


@pytest.mark.parametrize("rate", [1.0, pytest.param(0.5, marks=needs_dp)])
def test_noise_below_zero_is_refused_and_none_spends_everything(rate):
    assert accounting.epsilon_of(Plan(0.0, 1e-3, rate), 3) == math.inf
    assert accounting.epsilon_of(Plan(0.0, 1e-3, rate, released=0.5), 0) == pytest.approx(
        accounting.gaussian_epsilon(0.5, 1e-3), rel=1e-3
    )
    assert accounting.affordable(8.0, 10, Plan(0.0, 1e-3, rate)) == 0
    for noise in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"plan\.noise: needed 0 or more, got"):
            accounting.epsilon_of(Plan(noise, 1e-3, rate), 3)
    with pytest.raises(ValueError, match=r"plan\.released: needed 0 or more, got -1"):
        accounting.epsilon_of(Plan(1.0, 1e-3, rate, released=-1.0), 3)
    with pytest.raises(ValueError, match=r"rounds: needed 0 or more, got -1"):
        accounting.epsilon_of(Plan(1.0, 1e-3, rate), -1)


def test_one_gaussian_mechanism_refuses_what_is_none():
    assert accounting.gaussian_delta(0.0, 1.0) == 0
    for mu in (-1.0, math.nan):
        with pytest.raises(ValueError, match="mu: needed 0 or more"):
            accounting.gaussian_epsilon(mu, 1e-3)
    for delta in (0.0, math.nan):
        with pytest.raises(ValueError, match="delta: needed a number above 0, got"):
            accounting.gaussian_epsilon(1.0, delta)


@pytest.mark.parametrize("mu", [5.0, 15.0, 30.0, 37.0, 100.0, 1e4])
def test_little_noise_has_a_finite_epsilon(mu):
    """Beside SciPy's logarithm of Phi, which holds where Phi is below the least number."""
    epsilon = accounting.gaussian_epsilon(mu, 1e-3)
    first, second = norm.cdf(mu / 2 - epsilon / mu), np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    assert first - second == pytest.approx(1e-3, rel=1e-5)
    assert accounting.epsilon_of(Plan(1 / mu, 1e-3), 1) == pytest.approx(epsilon)
    assert accounting.mu_for(epsilon, 1e-3) == pytest.approx(mu, rel=1e-6)


def test_room_for_the_clients_that_sampling_draws():
    """Against the binomial distribution summed in full."""
    clients, rate, chance = 40, 0.2, 1e-6
    ways = np.array([math.comb(clients, k) * rate**k * (1 - rate) ** (clients - k) for k in range(clients + 1)])
    most = accounting.most_drawn(clients, rate, chance)
    assert ways[most + 1 :].sum() <= chance < ways[most:].sum()
    assert accounting.most_drawn(5, 0.5, 0.0) == 5
    few, more = (accounting.room_for(100, 0.2, rounds, 8.0, 1e-3) for rounds in (1, 1000))
    assert 20 < few < more < 100


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(0.1, 1e-3, rate=-0.1), "plan.rate"),
        (Plan(0.1, 1e-3, rate=2.0), "plan.rate"),
        (Plan(3.0, 1e-3, rate=math.nan), "plan.rate"),
        (Plan(3.0, 1.5), "plan.delta"),
        (Plan(3.0, 0.0), "plan.delta"),
    ],
)
def test_what_is_no_plan_is_refused_whatever_its_noise(plan, words):
    for call in (lambda: accounting.epsilon_of(plan, 10), lambda: accounting.noise_for(8.0, 10, plan)):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, math.nan, math.inf])
def test_noise_is_found_for_a_finite_epsilon_alone(epsilon):
    with pytest.raises(ValueError, match="epsilon: needed a finite number above 0"):
        accounting.noise_for(epsilon, 20, Plan(0.0, 1e-3))


@pytest.mark.parametrize("epsilon", [1.0, 60.0, 200.0])
def test_rounds_that_are_too_small_cost_a_share_of_delta(epsilon):
    """(1 + e^epsilon) p T, p of the binomial distribution: or there is room for all."""
    clients, rate, rounds, delta = 300, 0.02, 100, 1e-4
    room = accounting.room_for(clients, rate, rounds, epsilon, delta)
    log_cost = binom.logsf(room, clients, rate) + np.logaddexp(0, epsilon) + np.log(rounds)
    assert room == clients or log_cost <= np.log(accounting.RESERVE * delta) + 1e-6


@needs_dp
def test_sampled_rounds_are_the_definition_and_compose():
    one = Plan(1.5, 1e-3, rate=0.3)
    epsilon = accounting.epsilon_of(one, 1)
    assert delta_by_quadrature(epsilon, 1.5, 0.3) == pytest.approx(1e-3, rel=2e-2)
    assert accounting.epsilon_of(Plan(1.7889, 1e-3, rate=0.2), 20) == pytest.approx(1.666, abs=1e-3)


@needs_dp
@pytest.mark.slow
def test_the_accountant_of_sampled_rounds_is_above_the_closed_form_by_little():
    """A rate just below one, and what is released besides."""
    sampled = Plan(3.0, 1e-3, rate=1 - 1e-9, released=0.5)
    assert accounting.epsilon_of(sampled, 4) == pytest.approx(
        accounting.epsilon_of(sampled._replace(rate=1.0), 4), rel=1e-3
    )


@pytest.mark.parametrize("noise", [0.12, 0.01, 1e-4])
def test_sampled_rounds_with_next_to_no_noise_have_a_bound_at_once(noise):
    """That of full participation; composing them took minutes at 0.1, and did not end at 0.01."""
    plan = Plan(noise, 1e-3, rate=0.05)
    assert accounting.epsilon_of(plan, 1) >= accounting.epsilon_of(plan, 0) == 0
    assert accounting.epsilon_of(plan, 100) == accounting.epsilon_of(plan._replace(rate=1.0), 100)
    if noise > 0.1:
        assert delta_by_quadrature(accounting.epsilon_of(plan, 1), noise, 0.05) < 1e-3


@needs_dp
@pytest.mark.slow
def test_drawing_clients_helps_at_little_noise_too():
    plan = Plan(0.2, 1e-3, rate=0.05)
    assert accounting.epsilon_of(plan, 10) < accounting.epsilon_of(plan._replace(rate=1.0), 10) / 2


@needs_dp
@pytest.mark.slow
def test_the_noise_of_sampled_rounds_is_less_and_within_budget():
    plan = Plan(0.0, 1e-3, rate=0.2)
    noise = accounting.noise_for(3.0, 10, plan)
    assert noise < accounting.noise_for(3.0, 10, Plan(0.0, 1e-3))
    spent = accounting.epsilon_of(plan._replace(noise=noise), 10)
    assert 0.97 * 3 < spent <= 3
