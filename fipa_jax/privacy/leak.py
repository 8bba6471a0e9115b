"""What can be rebuilt of a client from what it sends? Inputs, membership and labels, by linear algebra.

Of one dense layer with inputs x_n [d] (and a 1 behind them for the bias) the update holds a single matrix,
sum_n x_n g_n^T. The curvature holds many, H[i, j] = sum_n s_n^{ij} x_n x_n^T, one for each pair of the layer's outputs.
All of them are diagonal in the same vectors, the inputs: two random mixtures of them give these away,

    M_i = sum_r lam_r B_r A_i B_r^T = X D_i X^T,   B_r [d + 1, h] the layer's block of eigenvector r, A_i > 0 random

and the generalised eigenvectors of (M_1, M_2) are the columns of X. It is exact for up to d + 1 examples whose
curvature the rank holds. So it says how much a message holds at least: there may be better attacks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Loss, Outputs
from fipa_jax.trees import HostArray

CLOSE = 0.05  # relative error below which an input counts as rebuilt
CUTS = (1e-13, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)  # of a mixture's eigenvalues, see `rebuilt_by_curvature`
RANK_ONE = 1e-3  # of an example's Jacobian in a layer, the second singular value over the first


class Layer(NamedTuple):
    """A dense layer by the paths of its parameters."""

    kernel: str
    bias: str | None


def dense_layers(params: Any) -> list[Layer]:
    """The dense layers of a model, in the order of its parameters: kernels that are matrices, and their biases."""
    leaves = trees.paths(params)
    kernels = [path for path, leaf in leaves.items() if jnp.ndim(leaf) == 2 and path.rpartition("/")[2] == "kernel"]
    biases = [f"{path.rpartition('/')[0]}/bias" for path in kernels]
    return [Layer(path, bias if bias in leaves else None) for path, bias in zip(kernels, biases, strict=True)]


def blocks(layer: Layer, params: Any, vectors: HostArray) -> np.ndarray:
    """[R, d + 1, h], a layer's part of each of the vectors [R, P]; the bias is the last row, if there is one.

    Args:
      params: the parameter tree whose ravelled form the vectors have.
    """
    unravel = ravel_pytree(params)[1]
    leaves = trees.paths(jax.vmap(unravel)(jnp.asarray(vectors)))
    kernel = np.asarray(leaves[layer.kernel], np.float64)
    if layer.bias is None:
        return kernel
    return np.concatenate([kernel, np.asarray(leaves[layer.bias], np.float64)[:, None]], axis=1)


def rebuilt_by_curvature(
    parts: np.ndarray, eigenvalues: np.ndarray, bias: bool, seed: int = 0, cuts: tuple[float, ...] = CUTS
) -> np.ndarray:
    """[n, d] inputs of a dense layer, by simultaneous diagonalisation of what the eigenpairs hold of it.

    Args:
      parts: [R, d + 1, h] of the eigenvectors, see `blocks`; [R, d, h] of a layer without a bias.
      eigenvalues: [R].
      bias: whether there is one, which gives the inputs' scale; without, they come with length one and either sign.
      seed: of the two random mixtures.
      cuts: below these shares of the largest eigenvalue a mixture is taken for rounding, one after another: a message
        in bfloat16 needs a higher one. The candidates of all are returned; which are inputs, `captured_share` tells.
    """
    draw, width = np.random.default_rng(seed), parts.shape[2]
    mixtures = []
    for _ in range(2):
        root = draw.normal(size=(width, width))
        scaled = np.sqrt(np.maximum(eigenvalues, 0))[:, None, None] * parts @ root
        mixtures.append(np.einsum("rah,rbh->ab", scaled, scaled, optimize=True))
    first, second = mixtures
    values, vectors = np.linalg.eigh(second)
    ranks = dict.fromkeys(int(np.sum(values > cut * values[-1])) for cut in cuts)
    return np.concatenate([_diagonalised(first, values, vectors, rank, bias) for rank in ranks])


def _diagonalised(first, values, vectors, rank: int, bias: bool) -> np.ndarray:
    """[rank, d], the generalised eigenvectors of a mixture and of the top pairs of the other, as inputs."""
    kept = slice(values.size - rank, None)
    root, inverse = vectors[:, kept] * np.sqrt(values[kept]), vectors[:, kept] / np.sqrt(values[kept])
    turn = np.linalg.eigh(inverse.T @ first @ inverse)[1]
    return _scaled((root @ turn).T, bias)


def rebuilt_by_update(part: np.ndarray, bias: bool) -> np.ndarray:
    """[h, d], what an update alone says of the inputs of a dense layer: one weighted sum of them for each output.

    With one example these are the example; with several they are mixtures.

    Args:
      part: [d + 1, h], the layer's block of the update.
      bias: whether its last row is a bias's.
    """
    return _scaled(part.T, bias)


def _scaled(rows: np.ndarray, bias: bool) -> np.ndarray:
    """Rows as inputs: divided by their last entry, which is to be 1, or to length one where there is no bias."""
    if not bias:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    last = rows[:, -1:]
    return rows[:, :-1] / np.where(np.abs(last) > np.finfo(float).tiny, last, np.inf)


def layer_inputs(outputs: Outputs, params: Any, batch: Any, layer: Layer) -> np.ndarray:
    """[N, d], what a dense layer is given of each example, by the examples' Jacobians: the truth to compare with.

    Raises:
      ValueError: the layer is used more than once for an example, as in a sequence: then this attack does not apply.
    """
    rows = np.asarray(jacobians(outputs, params, batch, (layer.kernel, layer.bias)), np.float64)  # [N, K, d + 1, h]
    examples, number, inputs, width = rows.shape
    flat = np.moveaxis(rows, 2, 1).reshape(examples, inputs, number * width)
    left, values, _ = np.linalg.svd(flat, full_matrices=False)
    alive = values[:, 0] > 0
    if np.any(values[alive, 1] > RANK_ONE * values[alive, 0]):
        raise ValueError(f"leak: the layer {layer.kernel!r} sees an example more than once; this attack does not apply")
    return _scaled(left[:, :, 0], layer.bias is not None)


def jacobians(outputs: Outputs, params: Any, batch: Any, chosen: tuple) -> jax.Array:
    """[N, K, d + 1, h], the Jacobian of each example's outputs in a dense layer's kernel and bias."""
    leaves = trees.paths(params)
    picked = {path: leaves[path] for path in chosen if path is not None}

    def of_one(example):
        one = jax.tree.map(lambda field: field[None], example)
        return jax.jacrev(lambda own: outputs(trees.replace(params, own), one)[0])(picked)

    found = jax.lax.map(of_one, batch)
    kernel = found[chosen[0]]
    return kernel if chosen[1] is None else jnp.concatenate([kernel, found[chosen[1]][:, :, None]], axis=2)


class Rebuilt(NamedTuple):
    """How well inputs were rebuilt."""

    share: float  # of them, within `CLOSE`
    error: float  # the median relative error of the nearest candidate
    nearest: np.ndarray  # [N], the candidate nearest to each


def compared(truth: np.ndarray, candidates: np.ndarray, bias: bool) -> Rebuilt:
    """The candidates [n, d] beside the true inputs [N, d]; without a bias a sign does not count."""
    if not len(candidates):
        return Rebuilt(0.0, 1.0, np.zeros(len(truth), int))
    sides = [candidates] if bias else [candidates, -candidates]
    squares = [np.sum(truth**2, 1)[:, None] - 2 * truth @ side.T + np.sum(side**2, 1)[None] for side in sides]
    distance = np.sqrt(np.maximum(np.min(squares, axis=0), 0))
    error = distance / np.maximum(np.linalg.norm(truth, axis=1, keepdims=True), np.finfo(float).tiny)
    error = np.nan_to_num(error, nan=np.inf)
    best = error.min(axis=1)
    return Rebuilt(float(np.mean(best <= CLOSE)), float(np.median(best)), error.argmin(axis=1))


def captured_share(outputs: Outputs, params: Any, batch: Any, basis: HostArray) -> np.ndarray:
    """[N], how much of each example's Jacobian lies in the span that a client has sent: |U^T J^T|^2 / |J|^2.

    Near 1 for examples of the client, as its curvature is made of their Jacobians.

    Args:
      basis: [P, R], orthonormal columns.
    """
    sent = jnp.asarray(basis)

    def of_one(example):
        one = jax.tree.map(lambda field: field[None], example)
        jacobian = jax.jacrev(lambda theta: outputs(theta, one)[0])(params)
        rows = trees.ravel_stacked(jacobian)  # [K, P]
        inside = jnp.matmul(rows, sent, precision="highest")
        return jnp.sum(inside**2) / jnp.sum(rows**2)

    return np.asarray(jax.lax.map(of_one, batch))


def alignment(outputs: Outputs, loss: Loss, params: Any, batch: Any, delta: HostArray) -> np.ndarray:
    """[N], the cosine of each example's descent direction with the update [P]: membership by the update alone."""
    loss, sent = contracts.one_number_each(loss), jnp.asarray(delta)

    def of_one(example):
        one = jax.tree.map(lambda field: field[None], example)
        slope = -trees.ravel(jax.grad(lambda theta: loss(outputs(theta, one), one)[0])(params))
        return trees.ratio(jnp.vdot(slope, sent), trees.length(slope) * trees.length(sent))

    return np.asarray(jax.lax.map(of_one, batch))


def area_under_curve(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's; 0.5 is a guess."""
    above = members[:, None] > others[None]
    return float(np.mean(above + 0.5 * (members[:, None] == others[None])))


def labels_by_both(features: np.ndarray, part: np.ndarray) -> np.ndarray:
    """[N] labels, by the update's block of the last layer and the features of rebuilt inputs.

    One step of descent leaves -lr sum_n phi_n (p_n - y_n)^T in the block: least squares on the phi_n give each
    p_n - y_n, whose negative entry is the label's. For one output, a probability, the sign says it.

    Args:
      features: [N, F], of the last layer for rebuilt inputs; with a 1 behind them where it has a bias.
      part: [F, K], the layer's block of the update.
    """
    found = np.linalg.lstsq(features.T, part, rcond=None)[0]  # [N, K], lr (y_n - p_n) / N
    return (found[:, 0] > 0).astype(int) if found.shape[1] == 1 else found.argmax(axis=1)


def label_by_update(part: np.ndarray) -> int:
    """The class that an update raises most, by its block [F, K] of the last layer: one answer for all examples."""
    raised = part.sum(axis=0)
    return int(raised[0] > 0) if raised.size == 1 else int(raised.argmax())


def exposure(examples: int, columns: int, inputs: int) -> float:
    """Examples of a cohort over min(s, d + 1): below 1 a sum of s products gives a layer's d inputs back in full."""
    return examples / min(columns, inputs + 1)
