"""How much curvature may clients send? The server says from which eigenvalue on a pair is worth its bytes.

A pair with eigenvalue lam brings log(1 + lam / beta) of precision, and all pairs have one price. So a budget of bytes
buys most where all clients, in all rounds, send the pairs above one level and no other: water-filling. Which level
spends the budget the server learns from what comes. With eigenvalues v_1 >= v_2 >= ... in a round, n of them above the
level, b bought by its bytes, and s left over from the rounds before,

    aim = max(b + s / 4, b / 4)
    level <- v_aim                                  if n >= aim
    level <- level max((n / aim)^(m / 2), 1 / 4)    else, m the mean of log(v_i / level) over these n, 1 / 8 at least
    level <- level / 2                              if n = 0

The second would be where `aim` are found, but for the half, if as many eigenvalues were above any level as its power
-1 / m. So what was sent too much is saved by about four later rounds, and where much more came than was bought, or a
budget that nothing had used up begins to bind, one round finds the level. In the first round there is none: each client
sends its largest pairs, as many as its own bytes buy and one at least, and the median of the clients' smallest ones is
the first level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.aggregate.aggregator import Aggregator, State
from fipa_jax.aggregate.screening import Received
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.curvature.sketchers import are_sent, check_budget, prices

PATIENCE = 4  # rounds over which what is left over is spent
FASTEST = 1 / 4  # to which part of itself the level may fall in a round
UNHEARD = 1 / 2  # to which it falls where nothing came
CLOSEST = 1 / 8  # mean of log(v / level), of values that may all lie at the level by chance
LEAST = 1 / 4  # of a round's pairs that are aimed for at least, however much was overspent


class BudgetState(NamedTuple):
    """What the server keeps."""

    rule: State
    level: jax.Array  # [], the least eigenvalue that is sent; 0 before there is one
    left: jax.Array  # [], pairs that were bought and have not been sent


def within_budget(rule: Aggregator, budget: float, bits: int = 0) -> Aggregator:
    """The rule, asking its clients for the pairs above a level, such that so many bytes are sent.

    The clients' sketcher is a `curvature.sketchers.above_level` of the same budget. The bytes are kept to in the mean
    over the rounds, not in each: one whose clients have much curvature takes more. What was sent in a round that is
    skipped is not counted.

    Example:
      rule = within_budget(fipa(), 20_000.0)
      (level,) = rule.asks(state)   # what the clients are shown

    Args:
      rule: of sketches; asks nothing along with them.
      budget: bytes of curvature, a client that takes part and round; above 0.
      bits: of an entry of an eigenvector as it is sent; 0 for floating point.

    Returns:
      The rule; its state is a `BudgetState`, and its `info` has `sketch_level` [] too, that of the round.

    Raises:
      ValueError: the budget is not above 0, or not finite; in `apply`, no sketches came.
    """
    check_budget(budget)

    def init(params):
        theta = trees.ravel(trees.widened(params))
        return BudgetState(rule.init(params), jnp.zeros([], theta.dtype), jnp.zeros([], theta.dtype))

    def apply(received: Received, before: BudgetState, params):
        step, inner, info = rule.apply(received, before.rule, params)
        sketch = received.sketch
        if not isinstance(sketch, Sketch):
            raise ValueError(f"sketch.budget: needs sketches, got {type(sketch).__name__}")
        report, pair = prices(sketch, bits)
        asked = received.took_part & (are_sent(sketch) if sketch.report else True)  # else nobody can tell
        values = jnp.where(asked[:, None], sketch.eigenvalues, 0).astype(before.level.dtype)
        bought = (jnp.sum(received.took_part) * budget - jnp.sum(asked) * report) / pair
        bought = jnp.asarray(bought, values.dtype)
        aim = jnp.maximum(bought + before.left / PATIENCE, LEAST * bought)
        level = jnp.where(before.level > 0, _moved(before.level, values, aim), _first(values))
        level = jnp.where(jnp.any(asked) & (level > 0), level, before.level)
        left = before.left + bought - jnp.sum(values > 0)
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


def _moved(level: jax.Array, values: jax.Array, aim: jax.Array) -> jax.Array:
    """The level after a round in which eigenvalues [C, R] have come, zero where none was sent, and `aim` was wanted."""
    there = (values >= level) & (values > 0)
    number = jnp.sum(there)
    descending = jnp.sort(values.reshape(-1))[::-1]
    enough = descending[jnp.clip(aim.astype(int) - 1, 0, values.size - 1)]
    apart = trees.ratio(jnp.sum(jnp.where(there, jnp.log(jnp.where(there, values, level) / level), 0)), number)
    lower = jnp.maximum(trees.ratio(number, aim) ** (jnp.maximum(apart, CLOSEST) / 2), FASTEST)
    lower = level * jnp.where(number > 0, lower, UNHEARD)
    return jnp.where(number >= aim, enough, jnp.maximum(lower, jnp.finfo(level.dtype).tiny))


def _first(values: jax.Array) -> jax.Array:
    """The first level: the median of the clients' smallest eigenvalues, of [C, R]; 0 where none has come."""
    sent = jnp.where(values > 0, values, jnp.nan)
    return jnp.nan_to_num(jnp.nanmedian(jnp.nanmin(sent, axis=1)))
