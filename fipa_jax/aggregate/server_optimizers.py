"""What does the server make of the step? Optimisers on it, optax transforms; any of them composes with any aggregator.

The gradient that they see is the negative step; the learning rate, `server.lr`, is applied outside, as it is traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.lookup import lookup


def fedexp(epsilon: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    """FedExP's extrapolation (Jhunjhunwala et al. 2023, eq. 6): the step times

        max(1, sum_m |delta_m|^2 / (2 C (|step|^2 + epsilon)))

    over the C clients that take part, `present`: the more they disagree, the longer the step.
    """

    def update(updates, state, params=None, *, deltas, present, **_):
        squares = jax.vmap(lambda delta: optax.tree.norm(delta, squared=True))(trees.zero_unless(present, deltas))
        mean_square = jnp.sum(squares) / jnp.maximum(jnp.sum(present), 1)
        scale = jnp.maximum(1, mean_square / (2 * (optax.tree.norm(updates, squared=True) + epsilon)))
        return optax.tree.scale(scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# name -> (momentum -> transform). FedAvgM (Hsu et al. 2019) is `momentum`. `acg` is FedACG (Kim et al. 2024), whose
# lookahead theta + lambda m, held as the parameters, moves by Nesterov's momentum; its clients add the term `prox`.
# FedAdam and FedYogi (Reddi et al. 2021) with their beta_2 = 0.99 and tau = 1e-3.
OPTIMIZERS: dict[str, Callable] = {
    "acg": lambda momentum: optax.trace(momentum, nesterov=True),
    "adam": lambda momentum: optax.scale_by_adam(b1=momentum, b2=0.99, eps=1e-3),
    "exp": lambda momentum: fedexp(),
    "momentum": lambda momentum: optax.trace(momentum),
    "sgd": lambda momentum: optax.identity(),
    "yogi": lambda momentum: optax.scale_by_yogi(b1=momentum, b2=0.99, eps=1e-3),
}


def make(name: str, momentum: float) -> optax.GradientTransformation:
    """The optimiser `name`.

    `federation.server.move` gives it the clients' stacked updates as `deltas` and who of them takes part as `present`,
    if it takes them.

    Raises:
      ValueError: the name is not known.
    """
    return lookup(OPTIMIZERS, name, "config.server.optimizer")(momentum)
