"""Which clients are late, and what had they started from? Delays drawn for studies, and the parameters of past rounds.

A server that does not wait takes the updates of a round's C clients as a buffer that has filled up: a late one has
started `age` rounds ago, from what the parameters were then. `config.PHASE.late` says how many are late, and how much.
"""

from typing import Any

import jax
import jax.numpy as jnp

STREAM = 0x1A7E  # apart from the keys of cohort, training and sketches, which are split from the round's


def draw(key: jax.Array, share: jax.Array, most: int, ids: jax.Array) -> jax.Array:
    """The ages [C] int32 of the clients `ids` [C], independent of each other; `key` is the round's.

    With probability `share` a client is late, by 1 to `most` rounds, each as likely.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, STREAM), ids)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, [2]))(keys)  # [C, 2]
    age = 1 + jnp.floor(uniform[:, 1] * most).astype(jnp.int32)
    return jnp.where(uniform[:, 0] < share, age, 0)


def start(params: Any, rounds: int) -> Any:
    """The history [rounds, ...] before the first round, when the parameters have always been what they are."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], rounds, axis=0), params)


def then(history: Any, age: jax.Array) -> Any:
    """The parameters `age` rounds ago; 0 is now."""
    return jax.tree.map(lambda leaf: leaf[age], history)


def push(history: Any, params: Any) -> Any:
    """The history with the parameters of the next round; the oldest go."""
    return jax.tree.map(lambda all_, new: jnp.concatenate([new[None], all_[:-1]]), history, params)
