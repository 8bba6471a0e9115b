"""FIPA from sums over the clients as an aggregation rule, and what such a rule must refuse: to look at one client."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import WEIGHTINGS, Aggregator, Needs, Weighting
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.limits import Limits, other_bounds
from fipa_jax.aggregate.past_rounds import PastRounds
from fipa_jax.aggregate.screening import Received
from fipa_jax.aggregate.secure_sum import total_of
from fipa_jax.aggregate.sums import SumOptions, SumState, row_of, solver_numbers, sum_solver
from fipa_jax.curvature import contracts
from fipa_jax.curvature.common_basis import Image
from fipa_jax.curvature.contracts import Number
from fipa_jax.lookup import lookup


def from_sums(
    *,
    sums: SumOptions = SumOptions(),
    damping: Number = 1e-3,
    relative: bool = True,
    own_damping: bool = False,
    trust: bool = False,
    limits: Limits = Limits(0.0, 0.0, 0.0, 0.0),
    past: PastRounds = PastRounds(),
    late: LateUpdates = LateUpdates(),
    weighting: Weighting = "examples",
) -> Aggregator:
    """FIPA from sums over the clients, as an aggregation rule.

    Example:
      rule = from_sums(sums=SumOptions("gradient", columns=20), damping=0.1, relative=False, trust=True)
      basis, active = rule.asks(state)   # what the clients multiply: `curvature.make_image`

    Args:
      sums: how, see `SumOptions`.
      damping, relative: beta, see `fisher_informed.fipa`; relative to the largest eigenvalue of Hn.
      trust: whether beta follows the sum of the clients' losses, see `trust.judge`; gradient form, all clients.
      limits: of them only `max_divergence`, by Hn.
      past: `none`, or `prior`: a decayed sum, multiplied anew by each round's basis. Its rank is that of the basis.
      own_damping, late: refused where they ask for what a sum does not show.
      weighting: `examples` or `uniform`.

    Returns:
      The rule; its state is a `SumState`, and `INFO_OF_SUMS` says what its `info` holds.

    Raises:
      ValueError: what is asked for needs single clients, which a sum does not show; names the field.
    """
    lookup(WEIGHTINGS, weighting, "aggregator.weighting")
    _refuse_single_clients(limits, past, own_damping, late)
    solver = sum_solver(sums, damping=damping, relative=relative, trust=trust, limits=limits, past=past)
    numbers = solver_numbers(damping, limits, past)

    def init(params):
        return solver.init(trees.ravel(trees.widened(contracts.floating(params, "params"))))

    def apply(received: Received, state: SumState, params):
        if not isinstance(received.sketch, Image):
            raise ValueError("from_sums needs uploads.sketch, an Image of values [C, P, s], products with its basis")
        if (got := received.sketch.values.shape)[2] != (columns := state.basis.shape[1]):
            raise ValueError(
                f"uploads.sketch: needed images [C, P, s] with s = {columns}, all columns of `asks`, got {list(got)}"
            )
        if received.age is not None:
            raise ValueError("from_sums needs clients that are not late: their products are with another basis")
        if trust and received.loss is None:
            raise ValueError("from_sums with trust needs uploads.loss [C], the clients' losses before their work")
        dtype, (_, unravel) = state.basis.dtype, ravel_pytree(params)
        weights = jnp.where(received.took_part, WEIGHTINGS[weighting](received), 0).astype(dtype)
        losses = jnp.zeros_like(weights) if received.loss is None else received.loss.astype(dtype)
        images = trees.zero_unless(received.took_part, received.sketch.values).astype(dtype)
        total = total_of(jax.vmap(row_of)(weights, images, received.deltas.astype(dtype), losses), sums.bits)
        step, state, info = solver.solve(total, state)
        return unravel(step), state, info

    def announce(state: SumState):
        return {"damping": state.hyper["damping"]}

    def withdraws(state: SumState):
        return state.trust.undone if trust else False

    def asks(state: SumState):
        return state.basis, state.active

    needs = Needs("image", loss=trust, gradient=sums.form == "gradient")
    return Aggregator(init, apply, needs, tuple(numbers), announce=announce, withdraws=withdraws, asks=asks)


def _refuse_single_clients(limits: Limits, past: PastRounds, own_damping: bool, late: LateUpdates) -> None:
    """Refuses, with a ValueError, what would have to look at one client's message."""
    if unseen := other_bounds(limits):
        raise ValueError(
            f"aggregator.limits.{unseen[0]}: a sum shows no single client's update or trace; set "
            f"{', '.join(f'limits.{name} = 0' for name in unseen)}, or compare the method 'fipa_sums', which does"
        )
    if past.kind not in ("none", "prior"):
        raise ValueError(
            f"aggregator.past.kind: {past.kind!r} keeps messages of single clients or rounds apart, which a sum does "
            "not show; set it to 'prior' or 'none'"
        )
    if own_damping:
        raise ValueError(
            "aggregator.own_damping: a sum does not show each client's damping; clients that send gradients "
            "(sums.form = 'gradient') have none"
        )
    if late.max_drift:
        raise ValueError("aggregator.late.max_drift: a sum does not show how far one client has drifted; set it to 0")
