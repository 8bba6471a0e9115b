"""How much privacy do rounds spend? (epsilon, delta) of sums under Gaussian noise, for all rounds together.

Where all clients take part in every round the answer is a closed form: T rounds of multiplier z are one Gaussian
mechanism of mu = sqrt(T) / z (Dong, Roth and Su 2022), and Balle and Wang (2018, theorem 8) give its delta exactly.
Where clients are sampled the privacy loss is composed numerically by the package dp-accounting (extra `dp`), whose
answer is an upper bound. At so little noise that it takes too long, the bound is what full participation spends, which
is several times as much: drawing clients at random never costs privacy.
"""

import functools
import math
from statistics import NormalDist
from typing import NamedTuple

from fipa_jax import installed
from fipa_jax.curvature import contracts

FAR = 37.0  # standard deviations beyond which a normal distribution's tail is taken from its expansion
SEARCH = 60  # halvings of an interval
COARSE = 12  # the same, of one whose function takes seconds: to a part in 4000 of the interval
LEAST_NOISE = 0.15  # z of sampled rounds: with less, an epsilon of hundreds after fifty, an answer takes too long
RESERVE = 0.01  # share of delta that is kept for rounds in which more clients would be drawn than find room


class Plan(NamedTuple):
    """What is released of the clients, and how often."""

    noise: float  # z, of every round's sum
    delta: float
    rate: float = 1.0  # q, the probability with which a client takes part in a round; 1: all do
    released: float = 0.0  # mu = 1 / z of one further sum over all clients, such as a covariance; 0 for none
    room: float = 0.0  # clients that a sampled round has room for, see `room_for`; 0 where all take part


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The delta of a Gaussian mechanism of mu = sensitivity / deviation: exact, or more by less than 1e-6.

    Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu), of which the second Phi may be too small for a
    number: then it is phi(x) (1 / x - 1 / x^3), x = mu / 2 + epsilon / mu, and e^epsilon phi(x) = phi(mu / 2 - epsilon
    / mu). It is 0 for mu = 0.

    Raises:
      ValueError: mu is negative or NaN.
    """
    contracts.at_least(0, mu=mu)
    if mu == 0:
        return 0.0
    near, far = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    if far > FAR:
        return _below(near) - NormalDist().pdf(near) / far * (1 - far**-2)
    return _below(near) - math.exp(epsilon) * _below(-far)


def _below(x: float) -> float:
    """Phi(x), in the tail too, where `NormalDist.cdf` is the rounding of one."""
    return math.erfc(-x / math.sqrt(2)) / 2


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of a Gaussian mechanism at this delta; infinite for mu that is.

    Raises:
      ValueError: mu is negative or NaN, or delta is not above 0.
    """
    if not delta > 0:
        raise ValueError(f"delta: needed a number above 0, got {delta}")
    if mu == math.inf:
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    most = mu * (mu / 2 - NormalDist().inv_cdf(delta))  # where the first term alone is delta
    return _least(lambda epsilon: gaussian_delta(mu, epsilon) <= delta, 0.0, most, SEARCH)


def epsilon_of(plan: Plan, rounds: int) -> float:
    """The epsilon that so many rounds have spent at the plan's delta; infinite for rounds without noise.

    With `plan.noise` below `LEAST_NOISE` it is that of full participation, a bound, and a loose one.

    Example:
      epsilon_of(Plan(noise=3.0, delta=1e-3), 10)  # 3.350

    Raises:
      ValueError: the noise, what is released besides or the rounds are negative or NaN; the rate is not in (0, 1], or
        delta not in (0, 1).
      ImportError: clients are sampled, and dp-accounting is not installed.
    """
    _check(plan, rounds)
    contracts.at_least(0, **{"plan.noise": plan.noise})
    if rounds and not plan.noise:
        return math.inf
    if plan.rate == 1 or plan.noise < LEAST_NOISE:
        of_rounds = math.sqrt(rounds) / plan.noise if rounds else 0.0
        return gaussian_epsilon(math.hypot(of_rounds, plan.released), plan.delta)
    return _composed(plan, rounds).get_epsilon(plan.delta)


def noise_for(epsilon: float, rounds: int, plan: Plan) -> float:
    """The least noise multiplier z with which so many rounds stay within epsilon, or `LEAST_NOISE` where less would do.

    Args:
      plan: with all but its noise.

    Raises:
      ValueError: what is released besides is too much alone; epsilon is no finite number above 0, or see `epsilon_of`.
      ImportError: see `epsilon_of`.
    """
    _check(plan, rounds)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon: needed a finite number above 0, got {epsilon}")
    mu = mu_for(epsilon, plan.delta)
    if plan.released >= mu:
        raise ValueError(f"privacy.epsilon: what is released besides the rounds spends all of {epsilon} by itself")
    everybody = math.sqrt(rounds) / math.sqrt(mu**2 - plan.released**2)  # sampling needs no more
    if plan.rate == 1:
        return everybody * (1 + 1e-9)

    def enough(log_noise: float) -> bool:
        return epsilon_of(plan._replace(noise=math.exp(log_noise)), rounds) <= epsilon

    least = max(everybody * plan.rate, LEAST_NOISE)
    return math.exp(_least(enough, math.log(min(least, everybody)), math.log(everybody), COARSE))


def _check(plan: Plan, rounds: int) -> None:
    """Refuses, with a ValueError, what is no plan, whatever its noise, or no number of rounds."""
    contracts.at_least(0, **{"plan.released": plan.released, "rounds": rounds})
    if not 0 < plan.delta < 1:
        raise ValueError(f"plan.delta: needed a number above 0 and below 1, got {plan.delta}")
    if not 0 < plan.rate <= 1:
        raise ValueError(f"plan.rate: needed a number above 0 and at most 1, got {plan.rate}")


def mu_for(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism that has this epsilon at this delta."""
    high = 1.0
    while gaussian_epsilon(high, delta) < epsilon:
        high *= 2
    return -_least(lambda mu: gaussian_epsilon(-mu, delta) <= epsilon, -high, 0.0, SEARCH)


def affordable(epsilon: float, most: int, plan: Plan) -> int:
    """So many rounds, up to `most`, stay within epsilon."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_of(plan, middle) <= epsilon * (1 + 1e-9) else (low, middle)
    return low


def most_drawn(clients: int, rate: float, chance: float) -> int:
    """The least number of clients that Poisson sampling exceeds with no more than this probability in a round."""
    tail = 0.0
    for number in range(clients, 0, -1):
        log_ways = math.lgamma(clients + 1) - math.lgamma(number + 1) - math.lgamma(clients - number + 1)
        left_out = (clients - number) * math.log1p(-rate) if number < clients else 0.0
        tail += math.exp(log_ways + number * math.log(rate) + left_out)
        if tail > chance:
            return number
    return 1


def room_for(clients: int, rate: float, rounds: int, epsilon: float, delta: float) -> int:
    """How many clients a round has room for, so that leaving out further ones costs `RESERVE` of delta at most.

    A run that leaves clients out differs from one that does not with a probability of at most p T in T rounds, on both
    of two neighbouring data sets: it is (epsilon, delta + (1 + e^epsilon) p T)-private where the other is (epsilon,
    delta)-private.
    """
    return most_drawn(clients, rate, RESERVE * delta / rounds * math.exp(-epsilon) / (1 + math.exp(-epsilon)))


def _composed(plan: Plan, rounds: int):
    """The accountant after so many rounds, and what is released besides."""
    pld, events = _dp_accounting()
    accountant = pld.PLDAccountant()
    if plan.released:
        accountant.compose(events.GaussianDpEvent(1 / plan.released))
    if rounds:
        one = events.PoissonSampledDpEvent(plan.rate, events.GaussianDpEvent(plan.noise))
        accountant.compose(one, rounds)
    return accountant


@functools.cache
def _dp_accounting():
    try:
        from dp_accounting import dp_event, pld
    except ImportError as error:
        raise ImportError(installed.missing("dp", "privacy.sampling = 'poisson'", "dp-accounting")) from error
    return pld, dp_event


def _least(holds, low: float, high: float, halvings: int) -> float:
    """The least number between low and high from which on something holds; it does at `high`."""
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
