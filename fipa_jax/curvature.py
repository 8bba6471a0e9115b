"""How is a client's Fisher matrix seen? Through products H V, never as a [P, P] matrix.

    H = 1/N sum_n J_n^T L_n J_n

with J_n = d outputs_n / d params [K, P] and L_n the Hessian of example n's loss in its outputs [K, K]: the identity for
the half-squared error, diag(p) - p p^T for softmax cross-entropy, p (1 - p) for the Bernoulli one. L_n is taken from
the loss itself by automatic differentiation, so a new loss needs no formula here. For these losses H is both the
generalised Gauss-Newton matrix (GGN) and the Fisher matrix (arXiv 2601.13608, section 3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

JACOBIANS = ("matrix_free", "rows")


def make_ggn(outputs: Callable, loss: Callable, *, micro_batch: int = 0, jacobian: str = "matrix_free") -> Callable:
    """Builds `ggn(params, batch, mask) -> product`, with product: V [P, R] -> H V [P, R].

    Args:
      outputs: (params, batch) -> pytree [B, ...], each example's outputs depending on that example alone.
      loss: (outputs, batch) -> [B], loss of each example.
      micro_batch: examples whose activations (or Jacobian rows) are computed at a time; 0 takes all at once.
      jacobian: `matrix_free` linearises the network anew in each product: memory of one micro-batch. `rows` computes
        the rows of all J_n once, [N, K, P] in memory, and each product is two large matrix products: for networks
        whose weights are used many times per example (convolutions) and few outputs this is much the faster.

    Raises:
      ValueError: the name of `jacobian` is not known.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"sketch.jacobian: unknown {jacobian!r}; known: {', '.join(JACOBIANS)}")

    def ggn(params, batch, mask=None):
        num_examples = jax.tree.leaves(batch)[0].shape[0]
        if mask is None:
            mask = jnp.ones([num_examples], bool)
        dtype = ravel_pytree(params)[0].dtype
        # 1/N over the examples that are there; an empty client has H = 0.
        weight = mask.astype(dtype) / jnp.maximum(jnp.sum(mask), 1).astype(dtype)
        size = micro_batch or num_examples
        # Padding repeats the last example (never an input the network has not seen) and weighs nothing.
        micro = _split(batch, size, mode="edge"), _split(weight, size, mode="constant")
        return (_matrix_free if jacobian == "matrix_free" else _rows)(outputs, loss, params, micro)

    return ggn


def _matrix_free(outputs, loss, params, micro):
    """H V by one linearisation per micro-batch: J by jvp, J^T by its transpose, columns by vmap."""
    _, unravel = ravel_pytree(params)

    def product(vectors):  # [P, R] -> [P, R]
        def add(total, micro_batch):
            batch, weight = micro_batch
            out, push = jax.linearize(lambda p: outputs(p, batch), params)
            pull = jax.linear_transpose(push, params)
            hessian = loss_derivatives(loss, out, batch, weight)[1]
            column = lambda v: ravel_pytree(pull(hessian(push(unravel(v))))[0])[0]
            return total + jax.vmap(column, in_axes=1, out_axes=1)(vectors), None

        return jax.lax.scan(add, jnp.zeros_like(vectors), micro)[0]

    return product


def _rows(outputs, loss, params, micro):
    """H V by explicit rows J [N, K, P], computed once, micro-batch by micro-batch."""
    evaluate = lambda batch: (outputs(params, batch), jacobian_rows(outputs, params, batch))
    out, jacobian = _merge(jax.lax.map(evaluate, micro[0]))  # [N, ...], [N, K, P]
    hessian = loss_derivatives(loss, out, *_merge(micro))[1]
    _, unravel_example = ravel_pytree(jax.tree.map(lambda x: x[0], out))
    ravel_examples = jax.vmap(lambda tree: ravel_pytree(tree)[0])
    curve = lambda tangent: ravel_examples(hessian(jax.vmap(unravel_example)(tangent)))  # [N, K] -> [N, K]
    # Two axes only: with three, XLA's matrix product on CPU is four times slower.
    num_examples, num_outputs, size = jacobian.shape
    jacobian = jacobian.reshape(-1, size)

    def product(vectors):  # [P, R] -> [P, R]
        pushed = (jacobian @ vectors).reshape(num_examples, num_outputs, -1)
        curved = jax.vmap(curve, in_axes=2, out_axes=2)(pushed)
        return jacobian.T @ curved.reshape(num_examples * num_outputs, -1)

    return product


def jacobian_rows(outputs, params, batch) -> jax.Array:
    """[N, K, P]: d outputs_n / d params for each example, its outputs ravelled to [K]; one forward, K pullbacks each.

    The outputs are pulled back one after another, for all examples at once: side by side, the activations' cotangents
    of all K leave a CPU's cache, which makes a convolution's rows 2.4 times slower.
    """

    def linearise(example):
        return jax.vjp(lambda p: ravel_pytree(outputs(p, jax.tree.map(lambda x: x[None], example)))[0], params)

    out, pulls = jax.vmap(linearise)(batch)
    pull_back = lambda unit: jax.vmap(lambda pull: ravel_pytree(pull(unit)[0])[0])(pulls)
    return jnp.moveaxis(jax.lax.map(pull_back, jnp.eye(out.shape[1], dtype=out.dtype)), 0, 1)


def loss_derivatives(loss, out, batch, weight):
    """The weighted loss's derivatives in the outputs: its gradient [N, ...] and tangent -> weight_n L_n tangent_n."""
    gradient = jax.grad(lambda o: jnp.sum(weight * loss(o, batch)))
    return gradient(out), lambda tangent: jax.jvp(gradient, (out,), (tangent,))[1]


def _split(tree, size, mode):
    """Leaves [N, ...] to [N / size, size, ...], padded at the end."""
    pad = lambda x: jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1), mode=mode)
    return jax.tree.map(lambda x: pad(x).reshape(-1, size, *x.shape[1:]), tree)


def _merge(micro):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), micro)
