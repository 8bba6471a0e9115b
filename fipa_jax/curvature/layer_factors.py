"""What does a client say of its curvature layer by layer? Two small matrices for each, whose Kronecker product it is.

A layer maps inputs phi_nt [a], 1 in place of a bias's input, to values W^T phi_nt [g], at T positions t of example n:
of a convolution those of its kernel, of a sequence its symbols. With s_nt [g, K] the derivative of the outputs in these
values and L_n the loss's Hessian in the outputs, the layer's block of H is

    1/N sum_n (sum_t phi_nt x s_nt) L_n (sum_t phi_nt x s_nt)^T  ~=  A x G    (K-FAC, Martens & Grosse 2015)

    expand   A = 1/(N T) sum_nt phi_nt phi_nt^T           G = 1/N sum_nt s_nt L_n s_nt^T   (KFC, Grosse & Martens 2016)
    reduce   A = 1/N sum_n phi_n phi_n^T, phi_n mean_t    G = 1/N sum_n s_n L_n s_n^T, s_n = sum_t s_nt

(names of Eschenhagen et al. 2023). A x G is that block exactly for one example of one position, and of a layer alone
under the half-squared error. A alone, with G the identity, is FOOF's preconditioner (Benzing 2022). Nothing is said of
parameters that are no layer's, such as embeddings, positions and normalisations, and nothing of one layer with another.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.curvature import contracts, products
from fipa_jax.curvature.contracts import Loss, Outputs
from fipa_jax.curvature.micro_batches import first, fold, micro_batches, zero_if_empty
from fipa_jax.curvature.sketch import Sketcher, TaskOutputs
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup

Key = tuple[str, int]  # (path of a layer's kernel, which call of the layer it is)
# outputs -> run(params, batch, taps {key: [B, T, g]}) -> (out, {key: (inputs [B, T, a], values [B, T, g])}), where taps
# are added to the values: of flax modules `models.layers.tapped`
Tap = Callable[[Outputs], Callable[[Any, Any, dict], tuple[Any, dict[Key, tuple[jax.Array, jax.Array]]]]]
Sharing = Literal["expand", "reduce"]  # a name in `SHARINGS`


class LayerFactors(NamedTuple):
    """A client's curvature layer by layer, of each symmetric matrix the half that `packed` keeps."""

    inputs: dict[str, jax.Array]  # {path of the kernel: [a (a + 1) / 2]}, A
    outputs: dict[str, jax.Array]  # {path of the kernel: [g (g + 1) / 2]}, G; {} where A is sent alone


class Layer(NamedTuple):
    """Where a layer's matrix [a, g] is in the parameters: its kernel's rows, and its bias below them."""

    kernel: str  # path
    bias: str  # path; "" where there is none, or it is not trained
    shape: tuple[int, int]  # a, with the bias's row, and g


def layers_of(params: Any) -> dict[str, Layer]:
    """{path of the kernel: Layer} of what may be a layer: a `kernel` [..., g] of two axes or more, and its `bias` [g].

    Args:
      params: tree of arrays, or of their shapes, with flax's names.
    """
    leaves, found = trees.paths(params), {}
    for path, leaf in leaves.items():
        parent, _, name = path.rpartition("/")
        if name == "kernel" and leaf.ndim > 1:
            bias = f"{parent}/bias" if parent else "bias"
            has_bias = bias in leaves and leaves[bias].shape == leaf.shape[-1:]
            shape = leaf.size // leaf.shape[-1] + has_bias, leaf.shape[-1]
            found[path] = Layer(path, bias if has_bias else "", shape)
    return found


def matrix_of(layer: Layer, leaves: dict[str, jax.Array]) -> jax.Array:
    """[a, g], the layer's matrix in {path: leaf}."""
    kernel = leaves[layer.kernel].reshape(-1, layer.shape[1])
    return jnp.concatenate([kernel, leaves[layer.bias][None]]) if layer.bias else kernel


def leaves_of(layer: Layer, matrix: jax.Array, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{path: leaf} of a layer's matrix [a, g], in the shapes of `like`."""
    rows = layer.shape[0] - bool(layer.bias)
    found = {layer.kernel: matrix[:rows].reshape(like[layer.kernel].shape)}
    return found | ({layer.bias: matrix[rows]} if layer.bias else {})


def packed(matrix: jax.Array) -> jax.Array:
    """[n (n + 1) / 2], the lower half of a symmetric matrix [n, n], row by row."""
    size = matrix.shape[0]
    place = jnp.arange(size * (size + 1) // 2, dtype=jnp.int32)
    row = jnp.floor((jnp.sqrt(8.0 * place + 1) - 1) / 2).astype(jnp.int32)
    row += ((row + 1) * (row + 2) // 2 <= place).astype(jnp.int32)  # the square root was rounded
    row -= (row * (row + 1) // 2 > place).astype(jnp.int32)
    return matrix[row, place - row * (row + 1) // 2]


def unpacked(half: jax.Array) -> jax.Array:
    """[n, n], the symmetric matrix whose lower half is given."""
    size = side_of(half)
    i, j = jnp.arange(size, dtype=jnp.int32)[:, None], jnp.arange(size, dtype=jnp.int32)[None]
    larger = jnp.maximum(i, j)
    return half[larger * (larger + 1) // 2 + jnp.minimum(i, j)]


def diagonal_of(half: jax.Array) -> jax.Array:
    """[..., n], the diagonal of the symmetric matrices whose lower halves [..., n (n + 1) / 2] are given."""
    i = np.arange(side_of(half))
    return half[..., i * (i + 3) // 2]


def side_of(half: jax.Array) -> int:
    """n, of n (n + 1) / 2 entries."""
    return int((8 * half.shape[-1] + 1) ** 0.5 - 1) // 2


def make_layer_factors(
    tap: Tap,
    outputs: Outputs,
    loss: Loss,
    *,
    inputs_alone: bool = False,
    sharing: Sharing = "expand",
    samples: int = 0,
    micro_batch: int = 0,
):
    """Builds `factors(key, params, batch, mask=None) -> LayerFactors` of the loss's Gauss-Newton matrix.

    Example:
      factors = make_layer_factors(tapped, outputs, loss)      # tapped: of `models.layers`, for flax modules
      unpacked(factors(key, params, batch).inputs["Dense_0/kernel"]) is A, [a, a].

    Args:
      tap: how the model's layers are seen.
      outputs, loss, micro_batch: see `products.make_ggn`. Outputs with an axis of positions, [B, T, K], need a loss
        that does not couple them; otherwise G is NaN, and the screening says so.
      inputs_alone: leave out G; then nothing is differentiated.
      sharing: see the head of this module.
      samples: of the outputs' directions, L_n^{1/2} times random signs, that G is the mean over: its mean is exact. 0
        takes all: K backward passes, T K of a sequence.

    Raises:
      ValueError: the name of `sharing` is not known, or no layer is found.
    """
    lookup(SHARINGS, sharing, "sketch.sharing")
    contracts.at_least(0, samples=samples, micro_batch=micro_batch)
    run, loss = tap(contracts.of_each_example(outputs)), contracts.one_number_each(loss)

    def factors(key, params, batch, mask=None) -> LayerFactors:
        params = trees.widened(contracts.floating(params, "params"))
        key = vary_with(contracts.key(key), params, batch, mask)
        micro = micro_batches(params, batch, mask, micro_batch)
        params, micro = vary_with(params, micro), vary_with(micro, params)
        layers = _found(run, params, first(micro.batch))

        def add(total, batch, weight, number):
            both = _inputs(run, layers, params, batch, weight, sharing), {}
            if not inputs_alone:
                drawn = jax.random.fold_in(key, number)
                ways = _directions(run, loss, params, batch, weight, drawn, samples)
                both = both[0], _outputs(run, layers, params, batch, ways, sharing)
            return jax.tree.map(jnp.add, total, both)

        dtype = trees.ravel(params).dtype
        blank = {path: jnp.zeros([layer.shape[0]] * 2, dtype) for path, layer in layers.items()}
        blank_out = {path: jnp.zeros([layer.shape[1]] * 2, dtype) for path, layer in layers.items()}
        blank = vary_with((blank, {} if inputs_alone else blank_out), params, micro)
        with jax.default_matmul_precision("highest"):
            total = zero_if_empty(micro, fold(add, blank, micro, jnp.arange(micro.weight.shape[0])))
        return LayerFactors(*({path: packed(matrix) for path, matrix in part.items()} for part in total))

    return factors


def _found(run, params, batch) -> dict[str, Layer]:
    """The layers that the model runs; others, and parameters of no layer, are left out of the message."""
    seen = jax.eval_shape(run, params, batch, {})[1]
    ran = {path: inputs.shape[-1] for (path, _), (inputs, _) in seen.items()}
    layers = {path: layer for path, layer in layers_of(params).items() if path in ran}
    layers = {path: layer for path, layer in layers.items() if ran[path] == layer.shape[0] - bool(layer.bias)}
    if not layers:
        raise ValueError(
            "sketch: no dense layer or convolution of flax was found that holds a trained kernel, of the paths "
            f"{', '.join(trees.paths(params))!s:.300}; take another rule, or let trainable name a layer"
        )
    return layers


def _together(rows: jax.Array, mean: bool) -> jax.Array:
    return (jnp.mean if mean else jnp.sum)(rows, axis=1, keepdims=True)


def _apart(rows: jax.Array, mean: bool) -> jax.Array:
    return rows


# How the positions at which a layer's weights are used count: (rows [B, T, n], mean or sum) -> [B, T or 1, n].
SHARINGS: dict[str, Callable[[jax.Array, bool], jax.Array]] = {"expand": _apart, "reduce": _together}


def _gram(rows: jax.Array) -> jax.Array:
    """[n, n], the sum over examples and positions of the rows' squares [B, T, n]."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.T @ flat


def _inputs(run, layers: dict[str, Layer], params, batch, weight, sharing: Sharing) -> dict[str, jax.Array]:
    """{path: sum_n weight_n A_n}."""
    seen, found = run(params, batch, {})[1], {}
    for path, layer in layers.items():
        calls = jnp.concatenate([inputs for (of, _), (inputs, _) in seen.items() if of == path], axis=1)
        rows = SHARINGS[sharing](calls.astype(weight.dtype), True)
        if layer.bias:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
        found[path] = _gram(rows * jnp.sqrt(weight / rows.shape[1])[:, None, None])
    return found


class Directions(NamedTuple):
    """Cotangents of the outputs whose squares have weight_n L_n for their sum."""

    number: int
    of: Callable[[jax.Array], Any]  # which one -> a tree like the outputs [B, ...]


def _directions(run, loss: Loss, params, batch, weight, key, samples: int) -> Directions:
    """All directions, one position after another, or so many random sums of them.

    Outputs [B, ..., K] of one array have T positions, for whose blocks [K, K] of L_n a product with all at once is
    enough, if the loss does not couple them; any other outputs have one.
    """
    out = run(params, batch, {})[0]
    leaves = jax.tree.leaves(out)
    along = len(leaves) == 1 and leaves[0].ndim > 2
    flat = leaves[0].reshape(len(weight), -1, leaves[0].shape[-1]) if along else _ravelled(out)[:, None]
    _, positions, size = flat.shape
    unravel = ravel_pytree(first(out))[1]
    hessian = products.loss_derivatives(loss, out, batch, weight)[1]

    def curved(tangent):  # [B, T, K] -> [B, T, K]
        return _ravelled(hessian(jax.vmap(unravel)(tangent.reshape(len(weight), -1)))).reshape(flat.shape)

    blocks = jax.vmap(lambda unit: curved(jnp.broadcast_to(unit, flat.shape)), out_axes=-1)(
        jnp.eye(size, dtype=flat.dtype)
    )
    values, vectors = jnp.linalg.eigh(blocks)
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]  # [B, T, K, K]
    roots = jnp.where(_coupled(curved, blocks, key) if positions > 1 else False, jnp.nan, roots)

    def one(i):
        rows = jnp.where(jnp.arange(positions)[None, :, None] == i // size, roots[..., i % size], 0)
        return jax.vmap(unravel)(rows.reshape(len(weight), -1))

    def random_sum(i):
        signs = jax.random.rademacher(jax.random.fold_in(key, i), (*flat.shape[:2], 1, size), flat.dtype)
        rows = jnp.sum(signs * roots, axis=-1) / samples**0.5
        return jax.vmap(unravel)(rows.reshape(len(weight), -1))

    return Directions(samples, random_sum) if samples else Directions(positions * size, one)


def _coupled(curved, blocks: jax.Array, key) -> jax.Array:
    """[] bool: the loss's Hessian is more than its positions' own blocks [B, T, K, K], by a product with one vector."""
    probe = jax.random.rademacher(key, blocks.shape[:-1], blocks.dtype)
    whole, apart = curved(probe), jnp.einsum("btij,btj->bti", blocks, probe)
    slack = jnp.sqrt(jnp.finfo(blocks.dtype).eps) * jnp.max(jnp.abs(blocks), initial=0)
    return jnp.any(jnp.abs(whole - apart) > slack * blocks.shape[-1])


def _outputs(run, layers: dict[str, Layer], params, batch, ways: Directions, sharing: Sharing) -> dict[str, jax.Array]:
    """{path: sum_n weight_n G_n}, one backward pass for each direction."""
    shapes = jax.eval_shape(run, params, batch, {})[1]
    taps = {key: jnp.zeros(values.shape, values.dtype) for key, (_, values) in shapes.items() if key[0] in layers}
    taps = vary_with(taps, params, batch)
    _, pull = jax.vjp(lambda taps: run(params, batch, taps)[0], taps)

    def add(i, total):
        (slopes,) = pull(ways.of(i))
        found = {}
        for path, before in total.items():
            calls = jnp.concatenate([slope for (of, _), slope in slopes.items() if of == path], axis=1)
            found[path] = before + _gram(SHARINGS[sharing](calls.astype(before.dtype), False))
        return found

    dtype = trees.ravel(params).dtype
    blank = {path: jnp.zeros([layer.shape[1]] * 2, dtype) for path, layer in layers.items()}
    return jax.lax.fori_loop(0, ways.number, add, vary_with(blank, params, batch, taps))


def _ravelled(out) -> jax.Array:
    """[B, K], each example's outputs one after another."""
    return jax.vmap(trees.ravel)(out)


def sketcher_of_layers(tap: Tap, loss: Loss, **options) -> Sketcher:
    """How the clients of a cohort see their layers; `options` are those of `make_layer_factors`."""

    def of_client(outputs: TaskOutputs, params, key, batch, mask) -> LayerFactors:
        def alone(theta, batch):
            return outputs(theta, batch)[0]

        return make_layer_factors(tap, alone, loss, **options)(key, params, batch, mask)

    return Sketcher(of_client)
