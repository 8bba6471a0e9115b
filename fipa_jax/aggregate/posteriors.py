"""How do clients' beliefs become the server's? By the sum of their natural parameters, N(m, 1 / (N s)) each.

    sum    s = sum_m w_m s_m,   s mean = sum_m w_m s_m mean_m        (FedIvon, Pal et al. 2024)
    admm   s = (prior + U + rho sum_m w_m s_m) / (1 + rho),   s mean = (V + rho sum_m w_m s_m mean_m) / (1 + rho)

with U and V the weighted sums of the clients' duals, which the server follows by itself: U moves by
rho sum_m w_m (s_m - s), V by rho sum_m w_m (s_m mean_m - s mean), s and mean those before the round (arXiv 2506.13150).
On quadratic losses, at rho = 1 and from duals of zero and the prior, a round of exact clients is the posterior of all.
The factor 1 / (1 + rho) and the least precision, that of the prior, are ours: the paper's pseudocode was not at hand.
A late client's mean_m is where it came to from the parameters that it started from, and it counts for less (`late`).
Where no client has any precision they count by their weights alone.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import WEIGHTINGS, Aggregator, Needs, Weighting, compare, weights_of
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature import contracts
from fipa_jax.curvature.sketch import Diagonal
from fipa_jax.lookup import lookup

PosteriorForm = Literal["sum", "admm"]  # a name in `FORMS`
FORMS = {"sum": "natural parameters alone", "admm": "with duals, which need all clients in every round"}


class PosteriorOptions(NamedTuple):
    """How beliefs are merged; the group `aggregator.posterior` of a config."""

    form: PosteriorForm = "sum"  # see the head of this module
    prior: float = 1e-3  # precision of the prior about 0, per example: a weight decay
    start: float = 0.1  # the server's curvature, per example, before the first round
    rho: float = 1.0  # admm: the step of the duals


class Belief(NamedTuple):
    """What the server keeps beside the mean, which the parameters are."""

    precision: jax.Array  # [P], s, per example
    dual_mean: jax.Array  # [P], V
    dual_precision: jax.Array  # [P], U
    size: jax.Array  # [], examples of those who took part last, of late ones fewer


class Told(NamedTuple):
    """What clients are told, the fields of `client.ivon.Posterior`."""

    precision: jax.Array
    prior: jax.Array
    size: jax.Array
    rho: jax.Array


def posterior(
    *,
    posterior: PosteriorOptions = PosteriorOptions(),
    weighting: Weighting = "examples",
    late: LateUpdates = LateUpdates(),
) -> Aggregator:
    """The rule for clients that send their mean's update and their precision, as the local solver `ivon` does.

    Example:
      rule = posterior(posterior=PosteriorOptions("sum"))

    Args:
      posterior: how, see `PosteriorOptions`.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      late: only its staleness counts.

    Raises:
      ValueError: a name is not known, or a number out of its range; in `apply`, uploads without precisions, or in the
        form `admm` of late clients, whose duals are not those that the server has followed.
    """
    options = posterior
    lookup(FORMS, options.form, "aggregator.posterior.form")
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    contracts.at_least(0, prior=options.prior, start=options.start, rho=options.rho)
    contracts.at_least(0, **{"late.staleness": late.staleness})
    admm = options.form == "admm"

    def init(params):
        theta = trees.ravel(trees.widened(contracts.floating(params, "params")))
        start, none = options.prior + options.start, jnp.zeros([], theta.dtype)
        return Belief(jnp.full_like(theta, start), jnp.zeros_like(theta), jnp.zeros_like(theta), none)

    def apply(received: Received, state: Belief, params):
        if not isinstance(received.sketch, Diagonal):
            raise ValueError("posterior needs uploads.sketch, a Diagonal of the clients' precisions [C, P]")
        if admm and received.age is not None:
            raise ValueError("posterior in the form 'admm' needs clients that are not late: their duals are old")
        weights, size = weights_of(received, params, weighting, late.staleness)
        theta, unravel = ravel_pytree(params)
        own = trees.zero_unless(received.took_part, received.sketch.values).astype(theta.dtype)
        began = theta[None] - (0 if received.moved is None else trees.ravel_stacked(received.moved))
        means = began + received.deltas
        middle = jnp.matmul(weights, means, precision="highest")

        def mean_of(natural, precision):
            return jnp.where(precision > 0, trees.ratio(natural, precision), middle)

        precision = jnp.matmul(weights, own, precision="highest")
        weighted = jnp.einsum("c,cp,cp->p", weights, own, means, precision="highest")
        after = state._replace(precision=precision, size=size)
        if admm:
            dual_mean = state.dual_mean + options.rho * (weighted - state.precision * theta)
            dual_precision = state.dual_precision + options.rho * (precision - state.precision)
            of_sum = mean_of(weighted, precision)
            precision = (options.prior + dual_precision + options.rho * precision) / (1 + options.rho)
            weighted = (dual_mean + options.rho * weighted) / (1 + options.rho)
            # Noise, or a loss that is not convex, may leave less than the prior; a published guard is not known to us.
            sure, precision = precision > options.prior, jnp.maximum(precision, options.prior)
            weighted = jnp.where(sure, weighted, precision * of_sum)
            after = Belief(precision, dual_mean, dual_precision, size)
        step = jnp.where(size > 0, mean_of(weighted, precision) - theta, 0)
        after = jax.tree.map(lambda new, old: jnp.where(size > 0, new, old), after, state)
        average = jnp.matmul(weights, received.deltas, precision="highest")
        step, average = unravel(step), unravel(average)
        return step, after, {"precision": jnp.mean(after.precision)} | compare(step, average, received)

    def announce(state: Belief):
        prior, rho = (jnp.asarray(value, state.size.dtype) for value in (options.prior, options.rho))
        return {"posterior": Told(state.precision, prior, state.size, rho)}

    def spread(state: Belief):
        return state.precision * jnp.maximum(state.size, 1)

    return Aggregator(init, apply, Needs("posterior"), announce=announce, spread=spread)
