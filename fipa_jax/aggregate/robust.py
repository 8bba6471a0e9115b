"""Rules that a few clients cannot steer, whatever they send: coordinate medians, trimmed means, Krum, geometric median.

They use no curvature. Each is of those who take part; all count alike, but for the geometric median, which weighs them
as `weighting` says. What they give up is that the step of clients with different data is no mean any more: without
faults, `mean` is better.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax.aggregate.aggregator import WEIGHTINGS, Aggregator, Weighting, compare, weights_of
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.lookup import lookup
from fipa_jax.trees import length, ratio

WEISZFELD_STEPS = 30
SAME = 1e-5  # updates that are nearer than this, in units of the median distance, are at one point
OfUpdates = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (deltas [C, P], took_part [C], weights [C]) -> [P]


def median() -> Aggregator:
    """The median of each parameter's updates (Yin et al. 2018, definition 1); of an even number the middle two's mean.

    Example:
      rule = median()
      step, state, info, received = step_of(rule, received, rule.init(params), params, screening)
    """

    return _rule(lambda deltas, took_part, weights: _middle(deltas, took_part))


def trimmed_mean(faulty: Number = 0.2) -> Aggregator:
    """The mean of each parameter's updates without its largest and its smallest (Yin et al. 2018, definition 2).

    Args:
      faulty: the share of the clients, below 1/2, that is left out at either end; rounded down.

    Raises:
      ValueError: the share is not in [0, 1/2).
    """
    _check_share(faulty)

    def of(deltas, took_part, weights):
        number = jnp.sum(took_part)
        cut, place = _number_at_fault(faulty, number), jnp.arange(len(deltas))[:, None]
        kept = (place >= cut) & (place < number - cut)
        return jnp.sum(jnp.where(kept, _sorted(deltas, took_part), 0), axis=0) / jnp.maximum(number - 2 * cut, 1)

    return _rule(of)


def krum(faulty: Number = 0.2, *, several: bool = False) -> Aggregator:
    """The update that lies nearest to its neighbours' (Blanchard et al. 2017).

    Of n clients that take part, of which f may be at fault, a client's score is the sum of the squared distances to
    its n - f - 2 nearest ones. Krum is the update of the lowest score, multi-Krum the mean of the n - f lowest.

    Args:
      faulty: the share of the clients that may be at fault, below 1/2; f is rounded down.
      several: whether it is multi-Krum.

    Raises:
      ValueError: the share is not in [0, 1/2).
    """
    _check_share(faulty)

    def of(deltas, took_part, weights):
        number = jnp.sum(took_part)
        wrong = _number_at_fault(faulty, number)

        def score(delta, client):
            distances = jnp.sum((deltas - delta[None]) ** 2, axis=1)
            others = took_part & (jnp.arange(len(deltas)) != client)
            nearest = jnp.sort(jnp.where(others, distances, jnp.inf))
            counted = jnp.arange(len(deltas)) < jnp.maximum(number - wrong - 2, 1)
            return jnp.sum(jnp.where(counted & jnp.isfinite(nearest), nearest, 0))

        scores = jax.lax.map(lambda one: score(*one), (deltas, jnp.arange(len(deltas))))
        rank = jnp.argsort(jnp.argsort(jnp.where(took_part, scores, jnp.inf)))
        chosen = took_part & (rank < (number - wrong if several else 1))
        shares = chosen / jnp.maximum(jnp.sum(chosen), 1)
        return jnp.matmul(shares.astype(deltas.dtype), deltas, precision="highest")

    return _rule(of)


def multi_krum(faulty: Number = 0.2) -> Aggregator:
    """Multi-Krum, see `krum`."""
    return krum(faulty, several=True)


def geometric_median(*, weighting: Weighting = "examples") -> Aggregator:
    """The point with the least sum of distances, argmin_v sum_m w_m |delta_m - v| (RFA, Pillutla et al. 2022).

    By `WEISZFELD_STEPS` of Weiszfeld's algorithm, v <- v + s sum_m a_m (delta_m - v) / sum_m a_m with
    a_m = w_m / |delta_m - v|, over those that are not at v. At an update it would stay for ever. There, of the weight
    w and with r = |sum_m a_m (delta_m - v)|, s is max(0, 1 - w / r), which is 0 only if v is the median (Vardi and
    Zhang 2000); elsewhere s is 1. It begins at the coordinate median, or at an update with a lower sum, so that it
    comes to no other update again, and that those that are far out do not cost it steps.

    Args:
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.

    Raises:
      ValueError: the weighting is not known.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")

    def of(deltas, took_part, weights):
        def total(point):
            return jnp.dot(weights, length(deltas - point[None], axis=1))

        middle, sums = _middle(deltas, took_part), jnp.where(weights > 0, jax.lax.map(total, deltas), jnp.inf)
        start = jnp.where(total(middle) <= jnp.min(sums), middle, deltas[jnp.argmin(sums)])
        around = jnp.nanmedian(jnp.where(took_part, length(deltas - start[None], axis=1), jnp.nan))
        same = jnp.maximum(SAME * around, jnp.finfo(deltas.dtype).eps * length(start))

        def nearer(_, point):
            ways = deltas - point[None]
            distances = length(ways, axis=1)
            here = distances <= same
            pull = jnp.where(here, 0, ratio(weights, distances))
            toward = jnp.matmul(pull, ways, precision="highest")
            held = ratio(jnp.sum(jnp.where(here, weights, 0)), length(toward))
            return point + jnp.maximum(1 - held, 0) * ratio(toward, jnp.sum(pull))

        return jax.lax.fori_loop(0, WEISZFELD_STEPS, nearer, start)

    return _rule(of, weighting)


def _rule(of: OfUpdates, weighting: Weighting = "examples") -> Aggregator:
    """The rule whose step is `of` the updates; nobody's is zero."""

    def apply(received: Received, state, params):
        weights, _ = weights_of(received, params, weighting)
        deltas, (theta, unravel) = received.deltas, ravel_pytree(params)
        step = jnp.where(jnp.any(received.took_part), of(deltas, received.took_part, weights.astype(deltas.dtype)), 0)
        mean = jnp.matmul(weights, deltas, precision="highest")
        step, mean = (unravel(vector.astype(theta.dtype)) for vector in (step, mean))
        return step, state, compare(step, mean, received)

    return Aggregator(lambda params: (), apply)


def _sorted(deltas: jax.Array, took_part: jax.Array) -> jax.Array:
    """[C, P], each parameter's updates in ascending order, those of absent clients last."""
    return jnp.sort(jnp.where(took_part[:, None], deltas, jnp.inf), axis=0)


def _middle(deltas: jax.Array, took_part: jax.Array) -> jax.Array:
    """[P], the coordinate median of those who take part."""
    number, in_order = jnp.sum(took_part), _sorted(deltas, took_part)
    return (in_order[(number - 1) // 2] + in_order[number // 2]) / 2


def _number_at_fault(share: Number, number: jax.Array) -> jax.Array:
    """[] int32, the share of so many clients, rounded down; 0.2 of 5 is 1, whatever the rounding of 0.2."""
    return jnp.floor(share * number + 1e-4).astype(jnp.int32)


def _check_share(faulty: Number) -> None:
    contracts.at_least(0, faulty=faulty)
    if contracts.is_known(faulty) and not faulty < 0.5:
        raise ValueError(f"aggregator.faulty: needs a share below 0.5, as no rule survives more, got {faulty}")
