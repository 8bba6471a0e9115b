"""What goes wrong between clients and server? Faults injected for studies, drawn for every client in every round.

`config.PHASE.faults` holds the rates, each the probability that an upload has the fault; `uploads` says what the server
makes of it. The draws have keys of their own: the others are what they are without faults.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.curvature.sketch import Diagonal, Sketch

STREAM = 0xFA17  # apart from the keys of cohort, training and sketches, which are split from the round's


class Rates(NamedTuple):
    """How often, as traced probabilities [] of an upload; and how much."""

    drop: jax.Array  # it never arrives
    straggle: jax.Array  # the client has done only a part of its local steps, drawn uniformly
    nan: jax.Array  # its update is NaN
    flip: jax.Array  # its update comes with the opposite sign
    scale: jax.Array  # its eigenvalues, or its diagonal, come multiplied by `scale_by`
    scale_by: jax.Array  # []


KINDS = Rates._fields[:-1]


class Faults(NamedTuple):
    """What is wrong with each client's upload in a round."""

    kinds: dict[str, jax.Array]  # of `KINDS`, [C] bool each
    part: jax.Array  # [C] in (0, 1], the share of the local steps that a client does


def draw(key: jax.Array, rates: Rates, ids: jax.Array) -> Faults:
    """The faults of the clients `ids` [C], independent of each other; `key` is the round's."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, STREAM), ids)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, [len(KINDS) + 1]))(keys)  # [C, kinds + 1]
    kinds = {name: uniform[:, i] < getattr(rates, name) for i, name in enumerate(KINDS)}
    return Faults(kinds, jnp.where(kinds["straggle"], 1 - uniform[:, -1], 1))


def inject(faults: Faults, scale_by: jax.Array, delta, sketches, num_examples: jax.Array):
    """(delta, sketches, num_examples) [C, ...] as they arrive; what a straggler does is in its update already."""
    wrong = faults.kinds

    def spoil(leaf):
        of = lambda name: wrong[name].reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(of("nan"), jnp.nan, jnp.where(of("flip"), -leaf, leaf)).astype(leaf.dtype)

    scaled = lambda x: (x * jnp.where(wrong["scale"], scale_by, 1)[:, None]).astype(x.dtype)
    if isinstance(sketches, Sketch):
        sketches = sketches._replace(eigenvalues=scaled(sketches.eigenvalues))
    elif isinstance(sketches, Diagonal):
        sketches = Diagonal(scaled(sketches.values))
    return jax.tree.map(spoil, delta), sketches, jnp.where(wrong["drop"], 0, num_examples)
