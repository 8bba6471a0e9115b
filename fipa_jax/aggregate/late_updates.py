"""What is an update worth that comes late? It counts for less, or is left out where its answers have moved too far.

Who is late, and from which parameters a client started, is the channel's: `federation.channel.late`. How a late target
is seen from the present parameters is where targets are: `solvers.Messages.moved`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate.row_blocks import fill_up
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature.sketch import Sketch


class LateUpdates(NamedTuple):
    """How a rule takes late clients; the group `aggregator.late` of a config."""

    staleness: float = 0.5  # s: a weight falls with the client's age by (1 + age)^-s (Xie et al. 2019, section 5.2)
    transport: bool = True  # FIPA: a late client's target stays where it was, seen from the present parameters
    max_drift: float = 0.0  # FIPA: bound on how far a late client's own answers have moved since it began; 0 for none
    mix: bool = False  # mean: a late client's model is mixed in (FedAsync), not its update added (FedBuff)


def check_moved(received: Received, option: str) -> None:
    """Refuses, with a ValueError, late clients without the way of the parameters since they began, for an option."""
    if received.age is not None and received.moved is None:
        raise ValueError(
            f"uploads.moved: needed beside uploads.age by aggregator.late.{option}, the way of the parameters since a "
            f"late client began; or set late.{option} to False"
        )


def freshness(received: Received, staleness: float, dtype) -> jax.Array | int:
    """[C], (1 + age)^-s, or 1 where nobody is late."""
    return 1 if received.age is None else (1 + received.age.astype(dtype)) ** -staleness


def drift(sketch: Sketch, moved: jax.Array) -> jax.Array:
    """[C], moved_m^T H_m moved_m / 2 of `moved` [C, P]: how far a client's own answers have moved since it began."""
    # In the basis' own dtype, or one of bfloat16 would be converted as a whole; for a bound that is exact enough.
    given = sketch.basis, fill_up(moved, sketch.basis.shape[1]).astype(sketch.basis.dtype)
    along = jnp.einsum("cpr,cp->cr", *given, precision="highest", preferred_element_type=moved.dtype)
    return jnp.sum(sketch.eigenvalues.astype(moved.dtype) * along**2, axis=1) / 2


def without_drifted(received: Received, max_drift: jax.Array) -> tuple[Received, dict]:
    """Leaves out late clients whose own answers have moved by more than `max_drift` [] since they began; 0 for none.

    Returns:
      (received, info with `stale` [C] bool, those left out, and `drift` [], the largest of the others); where nobody
      is late, or no sketches came, all as it was and no info.
    """
    if received.moved is None or not isinstance(received.sketch, Sketch):
        return received, {}
    drifted = jnp.where(received.took_part, drift(received.sketch, trees.ravel_stacked(received.moved)), 0)
    stale = (max_drift > 0) & ~(drifted <= max_drift)
    return received.only(~stale), {"stale": stale, "drift": jnp.max(jnp.where(stale, 0, drifted))}
