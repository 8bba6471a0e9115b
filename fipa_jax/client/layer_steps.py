"""A client's steps on mini-batches, preconditioned by what it says of its layers: see `curvature.layer_factors`."""

import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.client.first_order import Augment, first_order
from fipa_jax.client.local_solver import Hyper, LocalSolver
from fipa_jax.client.terms import Term
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Loss
from fipa_jax.curvature.layer_factors import LayerFactors, layers_of, leaves_of, matrix_of, unpacked


def layerwise(
    loss: Loss,
    augment: Augment,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    batch_size: int = 50,
    micro_batch: int = 0,
    epochs: int = 1,
    steps: int = 0,
    term: Term | None = None,
) -> LocalSolver:
    """SGD on mini-batches, each layer's direction D [a, g] divided by its factors at the broadcast parameters:

        D <- (A x G + damping I)^-1 D,   or (A + damping I)^-1 D where the rule has A alone (FOOF, Benzing 2022)

    FedPM's local step (arXiv 2511.09100), but that the factors stay what they were as the round began. Parameters of no
    layer take plain steps.

    Args, Raises: see `first_order.first_order`.
    """
    options = {"weight_decay": weight_decay, "clip_norm": clip_norm, "batch_size": batch_size, "epochs": epochs}
    options |= {"micro_batch": micro_batch, "steps": steps, "term": term}
    return first_order(loss, augment, optimizer="sgd", precondition=_by_layers, **options)


def _by_layers(hyper: Hyper):
    """What divides a direction by a client's layer factors, each decomposed once."""
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


LOCAL_SOLVERS = {"kronecker": layerwise}
