"""What does every client of a cohort say about its curvature? A function of one client, and one of all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.curvature.products import Features, Loss, Outputs, make_gradient
from fipa_jax.curvature.sketch import Diagonal, Sketch, SketchFunction, above_gradient, truncate

TaskOutputs = Callable[[Any, Any], tuple[Any, Any]]  # (params, batch) -> (out [B, ...], features), the whole model
SketchMaker = Callable[[Outputs, Features], SketchFunction]  # of the model's outputs and of its last layer's inputs


# (outputs, params, key, batch [N, ...], mask [N]) -> what one client finds
OfClient = Callable[[TaskOutputs, Any, jax.Array, Any, jax.Array], Any]
# (what the clients find, stacked [C, ...]; the round's number [], from 0) -> Sketch or Diagonal [C, ...]
OfCohort = Callable[[Any, jax.Array], Sketch | Diagonal]


def _as_they_are(messages, round):
    return messages


class Sketcher(NamedTuple):
    """How clients are sketched: each by itself, and then what only the cohort together can decide."""

    of_client: OfClient
    of_cohort: OfCohort = _as_they_are
    sends_gradient: bool = False  # whether the clients send their gradients [P] too


def plain(make: SketchMaker) -> Sketcher:
    """Every client's sketch as it is.

    Example:
      plain(lambda outputs, features: make_sketch(outputs, loss, features=features, rank=20)).of_client(
          task.outputs, params, key, batch, mask
      ) is the client's Sketch.

    Args:
      make: (outputs, features) -> a sketch function, of the model's outputs alone and of its last layer's inputs; both
        are functions of (params, batch).
    """

    def of_client(outputs: TaskOutputs, params, key, batch, mask):
        def last_inputs(theta, batch):
            return getattr(outputs(theta, batch)[1], "last", None)

        return make(_outputs_alone(outputs), last_inputs)(key, params, batch, mask)

    return Sketcher(of_client)


def with_rank_by_gradient(sketcher: Sketcher, loss: Loss, scale: float) -> Sketcher:
    """Sketches cut to the pairs that `above_gradient` keeps, by the gradients that the clients send along.

    Args:
      sketcher: gives sketches, not diagonals.
      loss: (out, batch) -> [B].
      scale: c of `above_gradient`.
    """

    def of_client(outputs: TaskOutputs, params, key, batch, mask):
        sketch = sketcher.of_client(outputs, params, key, batch, mask)
        return sketch, make_gradient(_outputs_alone(outputs), loss)(params, batch, mask)

    def of_cohort(messages, round) -> Sketch:
        sketches, gradients = sketcher.of_cohort(messages[0], round), messages[1]
        # A client of NaN, which the aggregator sets aside, must not undo the others' sketches.
        gradients = trees.zero_unless(trees.is_finite(gradients), gradients)
        lengths, total = jnp.linalg.norm(gradients, axis=1), jnp.linalg.norm(jnp.sum(gradients, axis=0))

        def kept_by(sketch, length):
            return above_gradient(sketch, length, total, round + 1, scale)

        return jax.vmap(truncate)(sketches, jax.vmap(kept_by)(sketches, lengths))

    return Sketcher(of_client, of_cohort, sends_gradient=True)


def _outputs_alone(outputs: TaskOutputs) -> Outputs:
    """The model's outputs without its features."""

    def alone(params, batch):
        return outputs(params, batch)[0]

    return alone
