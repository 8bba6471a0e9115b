"""How much curvature may clients send? The server says from which eigenvalue on a pair is worth its bytes.

A pair with eigenvalue lam brings log(1 + lam / beta) of precision, and all pairs have one price. So a budget of bytes
buys most where all clients, in all rounds, send the pairs above one level and no other: water-filling. Which level
spends the budget the server learns from what comes. With n pairs in a round, b bought by its bytes, and s left over
from the rounds before,

    level <- level min(max(n / (b + s / 4), 1/2), 2),    s <- s + b - n.

In the first round there is no level, and each client sends its largest pairs, as many as its own bytes buy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import Aggregator, State
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.curvature.sketchers import VectorBytes, are_sent, prices

PATIENCE = 4  # rounds over which what is left over is spent
FASTEST = 2.0  # by which the level may change in a round
LEAST = 1 / 4  # of a round's pairs that are aimed for at least, however much was overspent


class BudgetState(NamedTuple):
    """What the server keeps."""

    rule: State
    level: jax.Array  # [], the least eigenvalue that is sent; 0 before there is one
    left: jax.Array  # [], pairs that were bought and have not been sent


def within_budget(rule: Aggregator, budget: float, vector_bytes: VectorBytes | None = None) -> Aggregator:
    """The rule, asking its clients for the pairs above a level, such that so many bytes are sent.

    The clients' sketcher is a `curvature.sketchers.above_level` of the same budget. The bytes are kept to in the mean
    over the rounds, not in each: one whose clients have much curvature takes more.

    Example:
      rule = within_budget(fipa(), 20_000.0)
      (level,) = rule.asks(state)   # what the clients are shown

    Args:
      rule: of sketches; asks nothing along with them.
      budget: bytes of curvature, a client that takes part and round; above 0.
      vector_bytes: entries -> bytes of a vector as it is sent; None for its array's.

    Returns:
      The rule; its state is a `BudgetState`, and its `info` has `sketch_level` [] too, that of the round.

    Raises:
      ValueError: in `apply`, no sketches came.
    """

    def init(params):
        theta = trees.ravel(trees.widened(params))
        zero = jnp.zeros([], theta.dtype)
        return BudgetState(rule.init(params), zero, zero)

    def apply(received: Received, before: BudgetState, params):
        step, inner, info = rule.apply(received, before.rule, params)
        sketch = received.sketch
        if not isinstance(sketch, Sketch):
            raise ValueError(f"sketch.budget: needs sketches, got {type(sketch).__name__}")
        report, pair = prices(sketch, vector_bytes)
        asked = received.took_part & (are_sent(sketch) if sketch.report else True)  # else nobody can tell
        values = jnp.where(asked[:, None], sketch.eigenvalues, 0).astype(before.level.dtype)
        bought = (jnp.sum(received.took_part) * budget - jnp.sum(asked) * report) / pair
        level, left = _next(before, values, bought.astype(before.level.dtype))
        level = jnp.where(jnp.any(asked), level, before.level)
        return step, BudgetState(inner, level, left), info | {"sketch_level": before.level}

    def asks(state: BudgetState):
        return (state.level,)

    return rule._replace(
        init=init,
        apply=apply,
        admit=lambda received, state: rule.admit(received, state.rule),
        announce=lambda state: rule.announce(state.rule),
        withdraws=lambda state: rule.withdraws(state.rule),
        spread=lambda state: rule.spread(state.rule),
        asks=asks,
    )


def _next(before: BudgetState, values: jax.Array, bought: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the level, what is left over) after a round in which eigenvalues [C, R] have come, zero where none was sent."""
    number = jnp.sum(values > 0)
    left = before.left + bought - number
    aim = jnp.maximum(bought + before.left / PATIENCE, LEAST * bought)
    moved = before.level * jnp.clip(trees.ratio(number, aim), 1 / FASTEST, FASTEST)
    first = jnp.min(values, where=values > 0, initial=jnp.inf)
    level = jnp.where(before.level > 0, jnp.maximum(moved, jnp.finfo(moved.dtype).tiny), first)
    return jnp.where(jnp.isfinite(level), level, before.level), left
