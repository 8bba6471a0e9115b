"""Which aggregation rules are there? The two that average, and the table of all, FIPA and the robust ones among them.

A rule of one's own is a factory like these, entered in `AGGREGATORS`; see `aggregator.Aggregator` for an example.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate import robust
from fipa_jax.aggregate.aggregator import WEIGHTINGS, Aggregator, Needs, Place, Weighting, compare, sound, weights_of
from fipa_jax.aggregate.fisher_informed import fipa
from fipa_jax.aggregate.gradient_span import from_span
from fipa_jax.aggregate.late_updates import LateUpdates, check_moved, freshness
from fipa_jax.aggregate.layerwise import kronecker
from fipa_jax.aggregate.posteriors import posterior
from fipa_jax.aggregate.screening import Received
from fipa_jax.aggregate.sum_rule import from_sums
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Number
from fipa_jax.curvature.sketch import Diagonal
from fipa_jax.lookup import lookup


def mean(weighting: Weighting = "examples", *, late: LateUpdates = LateUpdates()) -> Aggregator:
    """FedAvg: step = sum_m w_m delta_m, w_m = N_m / sum N (McMahan et al. 2017).

    Where clients are late, with s(age) = (1 + age)^-staleness:

        FedBuff   step = sum_m w_m s(age_m) delta_m (Nguyen et al. 2022)
        FedAsync  step = sum_m w_m s(age_m) (theta_m - theta) with `late.mix` (Xie et al. 2019, one client at a time,
                  C = 1), where theta_m is what the client came to, from parameters that are old

    Raises:
      ValueError: the weighting is not known, or the staleness is negative.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    contracts.at_least(0, **{"late.staleness": late.staleness})

    def apply(received: Received, state, params):
        weights, _ = weights_of(received, params, weighting)
        fresh = weights * freshness(received, late.staleness, weights.dtype)
        if late.mix:
            check_moved(received, "mix")
        mixed = late.mix and received.moved is not None
        step = trees.weighted_sum(fresh, optax.tree.sub(received.delta, received.moved) if mixed else received.delta)
        return step, state, compare(step, step, received)

    return Aggregator(lambda params: (), apply)


PLACES = {"broadcast": "the parameters that clients receive", "local": "those that they have trained"}


def diagonal(
    *,
    damping: Number = 1e-3,
    relative: bool = True,
    at: Place = "local",
    weighting: Weighting = "examples",
    late: LateUpdates = LateUpdates(),
) -> Aggregator:
    """FIPA with the curvatures' diagonals alone, entry by entry: f_m = diag H_m [P], beta as in the damped form.

        step = (sum_m w_m f_m delta_m + beta dbar) / (sum_m w_m f_m + beta)

    Seen at the clients' own trained parameters this is Fisher merging (Matena & Raffel 2022, arXiv 2111.09832, eq. 4)
    and the minimum of FedFisher's diagonal form (Jhunjhunwala et al. 2024), with the mean where no client has any
    curvature: beta -> 0 is theirs, beta -> inf is FedAvg.

    Args:
      damping: beta.
      relative: whether beta counts in units of the largest entry of sum_m w_m f_m.
      at: `local`, or `broadcast` as FIPA's own sketches.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      late: only its staleness counts; a late client's update is added as it is.

    Raises:
      ValueError: an unknown weighting or `at`; in `apply`, uploads without diagonals.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    lookup(PLACES, at, "aggregator.at")
    contracts.at_least(0, **{"damping": damping, "late.staleness": late.staleness})

    def init(params):
        return {"damping": jnp.array(damping, trees.ravel(trees.widened(params)).dtype)}

    def apply(received: Received, state, params):
        if not isinstance(received.sketch, Diagonal):
            raise ValueError("diagonal needs uploads.sketch, a Diagonal of values [C, P]")
        weights, _ = weights_of(received, params, weighting, late.staleness)
        deltas = received.deltas
        dbar = jnp.matmul(weights, deltas, precision="highest")
        values = jnp.where((weights > 0)[:, None], jnp.maximum(received.sketch.values, 0), 0).astype(dbar.dtype)
        total = jnp.matmul(weights, values, precision="highest")
        beta = state["damping"] * jnp.max(total) if relative else state["damping"]
        # In the form dbar + ..., which passes identical updates through unchanged.
        pull = jnp.einsum("c,cp,cp->p", weights, values, deltas - dbar[None], precision="highest")
        step = dbar + trees.ratio(pull, total + beta)
        failed = ~sound(step)
        unravel = ravel_pytree(params)[1]
        step, dbar = (unravel(vector) for vector in (jnp.where(failed, dbar, step), dbar))
        return step, state, {"fallback": 2 * failed.astype(jnp.int32)} | compare(step, dbar, received)

    return Aggregator(init, apply, Needs("diagonal", at), hyper=("damping",))


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "diagonal": diagonal,
    "fipa": fipa,
    "geometric_median": robust.geometric_median,
    "kronecker": kronecker,
    "krum": robust.krum,
    "mean": mean,
    "median": robust.median,
    "multi_krum": robust.multi_krum,
    "posterior": posterior,
    "trimmed_mean": robust.trimmed_mean,
    "span": from_span,
    "sums": from_sums,
}
