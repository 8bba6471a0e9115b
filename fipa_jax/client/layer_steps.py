"""A client's steps on mini-batches, preconditioned by what it says of its layers: see `curvature.layer_factors`.

`first_order.first_order` takes them under the name of `PRECONDITIONS`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.client.local_solver import ByCurvature, Hyper
from fipa_jax.curvature import contracts
from fipa_jax.curvature.layer_factors import LayerFactors, layers_of, leaves_of, matrix_of, unpacked

Preconditioner = Literal["kronecker"]  # a name in `PRECONDITIONS`
Precondition = Callable[[Hyper], Callable[[Any], Any]]  # of the round -> (direction, a parameter pytree -> direction)


def by_layers(hyper: Hyper) -> Callable[[Any], Any]:
    """What divides each layer's direction D [a, g] by the client's factors at the broadcast parameters:

        D <- (A x G + damping I)^-1 D,   or (A + damping I)^-1 D where the rule has A alone (FOOF, Benzing 2022)

    FedPM's local step (arXiv 2511.09100), but that the factors, each decomposed once, stay what they were as the round
    began. Parameters of no layer take plain steps.

    Raises:
      ValueError: `hyper.sketch` holds no layer factors.
    """
    factors = contracts.given(hyper.sketch, "hyper.sketch of steps preconditioned by layers")
    if not isinstance(factors, LayerFactors):
        raise ValueError("hyper.sketch: needed LayerFactors, of a rule that asks for them")
    spectra = {path: jnp.linalg.eigh(unpacked(half)) for path, half in factors.inputs.items()}
    of_outputs = {path: jnp.linalg.eigh(unpacked(half)) for path, half in factors.outputs.items()}

    def shaped(update):
        leaves, layers, found = trees.paths(update), layers_of(update), {}
        for path, (values, vectors) in spectra.items():
            inside = vectors.T @ matrix_of(layers[path], leaves)
            right, turn = of_outputs.get(path, (jnp.ones(inside.shape[1], values.dtype), None))
            inside = inside if turn is None else inside @ turn
            inside = inside / (jnp.maximum(values[:, None] * right[None], 0) + hyper.damping)
            outside = vectors @ (inside if turn is None else inside @ turn.T)
            found |= leaves_of(layers[path], outside.astype(leaves[path].dtype), leaves)
        return trees.replace(update, found)

    return shaped


PRECONDITIONS: dict[str, Precondition] = {"kronecker": by_layers}
BY_CURVATURE = {"kronecker": ByCurvature(("layers", "layer_inputs"), "kronecker", "layer factors")}
