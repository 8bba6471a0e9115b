"""What is an aggregation rule? A sibling of an optax transform, (init, apply); and the two that average.

A rule returns a *step*, which is added to the parameters, so that a server optimiser composes with any rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate.late_updates import LateUpdates, freshness
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature.sketch import Diagonal
from fipa_jax.lookup import lookup

State = Any  # what a rule's next round needs; a pytree of arrays
Params = Any  # parameter pytree
Info = dict  # {name: array}, what a person needs; nothing reads it back
Apply = Callable[[Received, State, Params], tuple[Params, State, Info]]


class Needs(NamedTuple):
    """What the clients have to send beside their update and their number of examples."""

    curvature: str = "none"  # none, sketch or diagonal
    at: str = "broadcast"  # the parameters at which they see it: broadcast, or local, those after their training
    loss: bool = False  # their loss at the broadcast parameters
    damping: bool = False  # the damping of their own steps
    ids: bool = False  # the server tells the rule who they are


def _admit_all(received: Received, state: State) -> tuple[Received, Info]:
    return received, {}


def _announce_nothing(state: State) -> dict:
    return {}


def _never(state: State) -> bool:
    return False


class Aggregator(NamedTuple):
    """A rule as pure functions; only the first two are needed.

    Example:
      A rule of one's own, safe from a client that sends NaN, whose update arrives as 0:

        def apply(received, state, params):
            return jax.tree.map(lambda leaf: jnp.median(leaf, axis=0), received.delta), state, {}

        rule = Aggregator(lambda params: (), apply)
    """

    init: Callable[[Params], State]
    apply: Apply  # (received, state, params) -> (step, state, info)
    needs: Needs = Needs()
    hyper: tuple[str, ...] = ()  # the fields of `config.PHASE.aggregator` that the state holds, so that they are traced
    admit: Callable[[Received, State], tuple[Received, Info]] = _admit_all  # who must not take part in this rule
    announce: Callable[[State], dict] = _announce_nothing  # {field of `Hyper`: value} that the clients are told
    withdraws: Callable[[State], jax.Array | bool] = _never  # of the new state: is the step the last one, taken back?


def step_of(rule: Aggregator, received: Received, state: State, params: Params, info: Info):
    """(step, state, info, received) of a rule, after it has left out whom it must; `info` is that of the screening.

    Args:
      received: as `screening.receive` gives it.
    """
    received, refused = rule.admit(received, state)
    step, state, told = rule.apply(received, state, params)
    return step, state, info | refused | told, received


# How the clients are weighted: name -> of each client [C], in proportion to which it counts.
WEIGHTINGS = {"examples": lambda received: received.num_examples, "uniform": lambda received: received.took_part}


def weights_of(received: Received, weighting: str, staleness: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """(weights [C], what they are shares of []): the examples or clients that take part, late ones for less.

    Args:
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      staleness: see `late_updates.freshness`.

    Returns:
      Weights that sum to one; if no client takes part all are 0.
    """
    dtype = jnp.result_type(*jax.tree.leaves(received.delta))
    counts = lookup(WEIGHTINGS, weighting, "aggregator.weighting")(received)
    counts = jnp.where(received.took_part, counts, 0).astype(dtype) * freshness(received, staleness, dtype)
    total = jnp.sum(counts)
    return trees.ratio(counts, total), total


def mean(weighting: str = "examples", *, late: LateUpdates = LateUpdates()) -> Aggregator:
    """FedAvg: step = sum_m w_m delta_m, w_m = N_m / sum N (McMahan et al. 2017).

    Where clients are late, with s(age) = (1 + age)^-staleness:

        FedBuff   step = sum_m w_m s(age_m) delta_m (Nguyen et al. 2022)
        FedAsync  step = sum_m w_m s(age_m) (theta_m - theta) with `late.mix` (Xie et al. 2019, one client at a time,
                  C = 1), where theta_m is what the client came to, from parameters that are old

    Raises:
      ValueError: the weighting is not known.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")

    def apply(received: Received, state, params):
        weights, _ = weights_of(received, weighting)
        fresh = weights * freshness(received, late.staleness, weights.dtype)
        mixed = late.mix and received.moved is not None
        step = trees.weighted_sum(fresh, optax.tree.sub(received.delta, received.moved) if mixed else received.delta)
        return step, state, compare(step, step, received)

    return Aggregator(lambda params: (), apply)


PLACES = {"broadcast": "the parameters that clients receive", "local": "those that they have trained"}


def diagonal(
    *,
    damping: float = 1e-3,
    relative: bool = True,
    at: str = "local",
    weighting: str = "examples",
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

    def init(params):
        return {"damping": jnp.asarray(damping, ravel_pytree(params)[0].dtype)}

    def apply(received: Received, state, params):
        if not isinstance(received.sketch, Diagonal):
            raise ValueError("diagonal needs uploads.sketch, a Diagonal of values [C, P]")
        weights, _ = weights_of(received, weighting, late.staleness)
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


def sound(step: jax.Array, limit: jax.Array | float = jnp.inf) -> jax.Array:
    """[] bool: the step [P] is finite, and no longer than the limit."""
    length = jnp.linalg.norm(step)
    return jnp.isfinite(length) & (length <= limit)


def compare(step: Params, average: Params, received: Received) -> Info:
    """The step beside the clients' updates and beside FedAvg's."""
    norm, other = optax.tree.norm(step), optax.tree.norm(average)
    longest = jnp.max(jnp.linalg.norm(received.deltas, axis=1))
    return {
        "step_ratio": trees.ratio(norm, longest),
        "fedavg_cosine": trees.ratio(optax.tree.vdot(step, average), norm * other),
        "fedavg_norm_ratio": trees.ratio(norm, other),
    }
