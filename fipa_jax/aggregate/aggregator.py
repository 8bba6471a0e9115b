"""What is an aggregation rule? A sibling of an optax transform, (init, apply); and what all rules share.

A rule returns a *step*, which is added to the parameters, so that a server optimiser composes with any rule.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.aggregate.late_updates import freshness
from fipa_jax.aggregate.screening import Received, with_refused
from fipa_jax.lookup import lookup

State = Any  # what a rule's next round needs; a pytree of arrays
Params = Any  # parameter pytree
Info = dict  # {name: array}, what a person needs; nothing reads it back
Init = Callable[[Params], State]
Apply = Callable[[Received, State, Params], tuple[Params, State, Info]]
Admit = Callable[[Received, State], tuple[Received, Info]]  # leaves clients out, see `screening.with_refused`
Asks = Callable[[State], tuple]  # what the clients' sketches are asked along, further arguments of `Sketcher.of_client`
Announce = Callable[[State], dict]  # {field of `Hyper`: value} that the clients are told
Withdraws = Callable[[State], jax.Array | bool]  # of the new state: is the step the last one, taken back?
Spread = Callable[[State], Any]  # the precision [P] of the server's belief in each parameter; () where it has none
Weighting = Literal["examples", "uniform"]  # a name in `WEIGHTINGS`
Place = Literal["broadcast", "local"]  # the parameters that clients receive, or those that they have trained


class Needs(NamedTuple):
    """What the clients have to send beside their update and their number of examples."""

    curvature: Literal["none", "sketch", "diagonal", "image", "core", "layers", "layer_inputs", "posterior"] = "none"
    at: Place = "broadcast"  # the parameters at which they see it
    loss: bool = False  # their loss at the broadcast parameters
    damping: bool = False  # the damping of their own steps
    ids: bool = False  # the server tells the rule who they are
    num_clients: int = 0  # below which their ids are; 0 where any may come
    spread: bool = False  # their long bases padded, so that devices can share the rows: see `row_blocks`
    gradient: bool = False  # their update is minus their gradient: the local solver `gradient`


def _admit_all(received: Received, state: State) -> tuple[Received, Info]:
    return received, {}


def announce_nothing(state: State) -> dict:
    """{}: the clients are told nothing."""
    return {}


def ask_nothing(state: State) -> tuple:
    """(): the clients are shown nothing."""
    return ()


def never(state: State) -> bool:
    """False: the step is a new one."""
    return False


class Aggregator(NamedTuple):
    """A rule as pure functions; only the first two are needed.

    Example:
      A rule of one's own, the median of each parameter's updates. It is safe from a client that sends NaN, which the
      screening has left out:

        def apply(received, state, params):
            def of_leaf(leaf):  # [C, ...]
                present = received.took_part.reshape(-1, *[1] * (leaf.ndim - 1))
                return jnp.nanmedian(jnp.where(present, leaf, jnp.nan), axis=0)

            return jax.tree.map(of_leaf, received.delta), state, {}

        rule = Aggregator(lambda params: (), apply)
    """

    init: Init
    apply: Apply  # (received, state, params) -> (step, state, info), of whom `admit` has let through: see `step_of`
    needs: Needs = Needs()
    hyper: tuple[str, ...] = ()  # the fields of `config.fipa.aggregator` that the state holds, so that they are traced
    admit: Admit = _admit_all  # who must not take part in this rule
    announce: Announce = announce_nothing
    withdraws: Withdraws = never
    asks: Asks = ask_nothing
    spread: Spread = ask_nothing


def step_of(
    rule: Aggregator,
    received: Received,
    state: State,
    params: Params,
    info: Info,
    complete: Callable[[Received], Received] = lambda received: received,
):
    """(step, state, info, received) of a rule, after it has left out whom it must; `info` is that of the screening.

    The rule works in float32 at least; the step has the parameters' own dtypes, and the state keeps those that it had.

    Args:
      received: as `screening.receive` gives it.
      complete: what is done to the updates of those that are left before the rule makes a step of them, as a
        `client.Term` may want it. In the `received` that is returned updates are as they came.
    """
    received, refused = rule.admit(received, state)
    step, after, told = rule.apply(complete(received), state, trees.widened(params))
    step = jax.tree.map(lambda change, p: change.astype(jnp.result_type(p)), step, params)
    if jax.tree.structure(after) == jax.tree.structure(state):  # as of a rule that a scan can carry on
        after = jax.tree.map(_as_wide_as, after, state)
    return step, after, with_refused(info, refused) | told, received


def _as_wide_as(new: Any, old: Any) -> Any:
    """The new array in the dtype of the old one."""
    other = hasattr(new, "dtype") and hasattr(old, "dtype") and new.dtype != old.dtype
    return new.astype(old.dtype) if other else new


# How the clients are weighted: name -> of each client [C], in proportion to which it counts.
WEIGHTINGS: dict[str, Callable[[Received], jax.Array]] = {
    "examples": lambda received: received.num_examples,
    "uniform": lambda received: received.took_part,
}


def weights_of(
    received: Received, params: Params, weighting: Weighting, staleness: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(weights [C], what they are shares of []): the examples or clients that take part, late ones for less.

    Args:
      params: whose precision the weights have, whatever that of the updates; float32 at least.
      weighting: `examples` (w_m = N_m / sum N) or `uniform`.
      staleness: see `late_updates.freshness`.

    Returns:
      Weights that sum to one; if no client takes part all are 0.
    """
    dtype = jnp.result_type(*jax.tree.leaves(trees.widened(params)))
    counts = lookup(WEIGHTINGS, weighting, "aggregator.weighting")(received)
    counts = jnp.where(received.took_part, counts, 0).astype(dtype) * freshness(received, staleness, dtype)
    total = jnp.sum(counts)
    return trees.ratio(counts, total), total


def sound(step: jax.Array, limit: jax.Array | float = jnp.inf) -> jax.Array:
    """[] bool: the step [P] is finite, and no longer than the limit."""
    length = trees.length(step)
    return jnp.isfinite(length) & (length <= limit)


def compare(step: Params, average: Params, received: Received) -> Info:
    """The step beside the clients' updates and beside FedAvg's."""
    norm, other = (trees.root(optax.tree.norm(tree, squared=True)) for tree in (step, average))
    longest = jnp.max(trees.length(received.deltas, axis=1))
    return {
        "step_ratio": trees.ratio(norm, longest),
        "fedavg_cosine": trees.ratio(optax.tree.vdot(step, average), norm * other),
        "fedavg_norm_ratio": trees.ratio(norm, other),
    }
