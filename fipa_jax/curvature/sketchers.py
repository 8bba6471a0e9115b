"""How else may a cohort be sketched? Wrappers of a `Sketcher`: on random views, and from one start for all clients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fipa_jax.curvature.sketch import Sketcher

Augment = Callable[[jax.Array, Any], Any]  # (key, batch) -> a random view of the batch


def on_views(sketcher: Sketcher, augment: Augment) -> Sketcher:
    """The sketcher on a random view of each example, as the clients train on, instead of the example itself.

    The authors of FIPA sketch what their training loader gives, augmented images.

    Example:
      on_views(sketcher, task.augment).

    Args:
      sketcher: of examples as they are.
      augment: (key, batch) -> a view.
    """

    def of_client(outputs, params, key, batch, mask, *asked):
        view_key, key = jax.random.split(key)
        return sketcher.of_client(outputs, params, key, augment(view_key, batch), mask, *asked)

    return sketcher._replace(of_client=of_client)


def from_one_start(sketcher: Sketcher) -> Sketcher:
    """The sketcher with the same random numbers for all clients of a round: iterative solvers begin alike.

    The authors of FIPA draw one start for all clients, by the number of the round. What else is random, such as views
    or the examples that are sketched, is drawn alike too, of each client's own examples.
    """
    return sketcher._replace(drawn_by=jnp.zeros_like)
