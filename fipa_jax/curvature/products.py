"""How is a client's Fisher matrix seen? Through products H V, never as a [P, P] matrix.

    H = 1/N sum_n J_n^T L_n J_n

with J_n = d outputs_n / d params [K, P] and L_n the Hessian of example n's loss in its outputs [K, K]: the identity for
the half-squared error, diag(p) - p p^T for softmax cross-entropy, p (1 - p) for the Bernoulli one. L_n is taken from
the loss itself by automatic differentiation, so a new loss needs no formula here. For these losses H is both the
generalised Gauss-Newton matrix (GGN) and the Fisher matrix (arXiv 2601.13608, section 3).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fipa_jax import backend, trees
from fipa_jax.curvature import contracts, last_layer
from fipa_jax.curvature.contracts import Features, Loss, MakeVector, Outputs
from fipa_jax.curvature.micro_batches import first, fold, micro_batches, stack, zero_if_empty
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup

JacobianName = Literal["matrix_free", "rows", "head"]  # a name in `JACOBIANS`


class Curvature(NamedTuple):
    """A client's H [P, P], seen without being formed; it lives inside one traced function."""

    product: Callable[[jax.Array], jax.Array]  # V [P, B] -> H V [P, B]
    size: int  # P
    dtype: Any
    rows: jax.Array | None = None  # A [M, P] with H = A^T A, where it is held
    trace: jax.Array | None = None  # [], tr H, where it comes for free
    indefinite: jax.Array | bool = False  # [] bool: some L_n has a negative eigenvalue, which `rows` sets to zero
    not_last_layer: jax.Array | bool = False  # [] bool: the closed form does not hold, and all products are NaN
    truncated: jax.Array | bool = False  # [] bool: `loss_rank` leaves out some of H; `product` and `trace` lack it
    # (key, number) -> [number], independent estimates of the trace of what `loss_rank` leaves out
    left_out: Callable[[jax.Array, int], jax.Array] | None = None


class MakeCurvature(Protocol):
    """A function of parameters and of the examples of a batch that a mask names, all of them without one."""

    def __call__(self, params: Any, batch: Any, mask: jax.Array | None = None) -> Curvature: ...


def make_ggn(
    outputs: Outputs,
    loss: Loss,
    *,
    micro_batch: int = 0,
    jacobian: JacobianName = "matrix_free",
    features: Features | None = None,
    loss_rank: int = 0,
) -> MakeCurvature:
    """Builds `ggn(params, batch, mask=None) -> Curvature` of the mask's examples (all of the batch without one).

    Args:
      outputs: (params, batch) -> pytree [B, ...], each example's outputs depending on that example alone.
      loss: (outputs, batch) -> [B], loss of each example.
      micro_batch: examples whose activations (or Jacobian rows) are computed at a time; 0 takes all at once. Only the
        micro-batches up to the mask's last example are computed, so that a small client costs little though it is
        padded; all at once it costs as much as the largest one.
      jacobian: `matrix_free` linearises the network anew in each product: memory of one micro-batch. `rows` computes
        the scaled rows A = [L_n^{1/2} J_n / sqrt(N)] once, [N K, P] in memory, and each product is two large matrix
        products: for networks whose weights are used many times per example (convolutions) and few outputs this is
        much the faster. `head`, where the parameters are those of the last dense layer: the closed form
        1/N sum_n (phi_n phi_n^T) kron L_n over cached features phi_n, no network in the loop.
      features: (params, batch) -> [B, F], or [B, T, F], the inputs phi of the last layer; for `head`.
      loss_rank: for `rows`, how many eigendirections of each L_n are pulled back, the largest first: work and memory
        grow with it. 0 takes all K. Products and trace are of what is kept, `Curvature.truncated` says if that is less.

    Raises:
      ValueError: an unknown `jacobian`; `loss_rank` without `rows`; `head` without features, or with other parameters
        than a last layer's.
    """
    lookup(JACOBIANS, jacobian, "sketch.jacobian")
    contracts.at_least(0, micro_batch=micro_batch, loss_rank=loss_rank)
    contracts.check_loss_rank(loss_rank, jacobian)
    outputs, loss = contracts.of_each_example(outputs), contracts.one_number_each(loss)
    if jacobian == "head" and features is None:
        raise ValueError("sketch.solver, or jacobian: head needs the model's features, the inputs of its last layer")
    options = {"head": {"features": features}, "rows": {"loss_rank": loss_rank}}

    def ggn(params, batch, mask=None) -> Curvature:
        params, micro = _given(params, batch, mask, micro_batch)
        return JACOBIANS[jacobian](outputs, loss, params, micro, **options.get(jacobian, {}))

    return ggn


def _given(params, batch, mask, micro_batch) -> tuple:
    """(parameters, micro-batches) in float32 at least, both of a type that differs between devices if either does."""
    params = trees.widened(contracts.floating(params, "params"))
    micro = micro_batches(params, batch, mask, micro_batch)
    return vary_with(params, micro), vary_with(micro, params)


def _matrix_free(outputs, loss, params, micro):
    """H V by one linearisation per micro-batch: J by jvp, J^T by its transpose."""
    flat, unravel = ravel_pytree(params)

    def product(vectors):  # [P, B] -> [P, B]
        vectors, theta = vary_with(vectors, params), vary_with(params, vectors)

        def add(total, batch, weight):
            out, push = jax.linearize(lambda p: outputs(p, batch), theta)
            pull = jax.linear_transpose(push, theta)
            hessian = loss_derivatives(loss, out, batch, weight)[1]

            def column(v):  # [P] -> [P]
                return ravel_pytree(pull(hessian(push(unravel(v))))[0])[0]

            # On a CPU one after another: side by side they leave its cache, which takes two to three times as long.
            if backend.kind() == "cpu":
                return total + jax.lax.map(column, vectors.T).T
            return total + jax.vmap(column, in_axes=1, out_axes=1)(vectors)

        return zero_if_empty(micro, fold(add, vary_with(jnp.zeros_like(vectors), vectors), micro))

    return Curvature(product, flat.size, flat.dtype)


def _rows(outputs, loss, params, micro, *, loss_rank):
    """H = A^T A by explicit scaled rows A, computed once, micro-batch by micro-batch."""

    def rows_of(batch, weight):
        return _rows_of(outputs, loss, params, batch, weight, loss_rank)

    rows, negative, truncated = stack(rows_of, micro)
    out = jax.eval_shape(outputs, params, first(micro.batch))
    num_outputs = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(out))
    rows = rows.reshape(-1, rows.shape[-1])

    def product(vectors):  # [P, B] -> [P, B]
        # A^T (A V) as ((A V)^T A)^T: left to itself XLA transposes within the products, at half the speed on CPU.
        apart = jax.lax.optimization_barrier
        return zero_if_empty(micro, apart(apart(rows @ vectors).T @ rows).T)

    return Curvature(
        product,
        rows.shape[1],
        rows.dtype,
        rows,
        zero_if_empty(micro, jnp.vdot(rows, rows)),
        indefinite=jnp.any(negative),
        truncated=jnp.any(truncated),
        left_out=functools.partial(_left_out, outputs, loss, params, micro, loss_rank)
        if 0 < loss_rank < num_outputs
        else None,
    )


def scaled_rows(outputs, loss, params, batch, weight, loss_rank: int = 0):
    """The rows A with sum_n weight_n J_n^T L_n J_n = A^T A: for each example n, sqrt(weight_n) L_n^{1/2} J_n.

    Returns:
      (A [B K', P], whether an L_n has a negative eigenvalue), K' = loss_rank or K.
    """
    return _rows_of(outputs, loss, params, batch, weight, loss_rank)[:2]


def _rows_of(outputs, loss, params, batch, weight, loss_rank: int):
    """(A, whether an L_n has a negative eigenvalue, whether `loss_rank` leaves out more than rounding)."""
    out, pull_back = _linearise_each(outputs, params, batch)
    roots, negative = _roots(loss, out, batch, weight)
    rows = pull_back(roots[: loss_rank or None])
    sizes = jnp.sum(roots**2, axis=2)  # the eigenvalues of weight_n L_n, [K, B]
    rounding = 10 * len(sizes) * jnp.finfo(sizes.dtype).eps * sizes[0]
    left_out = jnp.any(sizes[loss_rank or len(sizes) :] > rounding[None])
    return rows.reshape(-1, rows.shape[-1]), negative, left_out


def _left_out(outputs, loss, params, micro, loss_rank, key, number: int):
    """[number]: estimates of the trace of what `loss_rank` leaves out, sum_n weight_n tr(J_n^T E_n J_n).

    Each is of an example, drawn by the weights: one pullback of the left-out columns r_k of L_n^{1/2} with random signs
    s_k, E |J_n^T sum_k s_k r_k|^2 = tr(J_n^T E_n J_n).
    """
    weight = micro.weight.ravel()
    draw_key, sign_key = jax.random.split(key)
    chosen = jax.random.categorical(draw_key, jnp.log(weight), shape=[number])
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[chosen], micro.batch)
    out, pull_back = _linearise_each(outputs, params, batch)
    roots = _roots(loss, out, batch, jnp.ones([number], weight.dtype))[0][loss_rank:]
    signs = jax.random.rademacher(sign_key, [*roots.shape[:2], 1], roots.dtype)
    pulled = pull_back(jnp.sum(signs * roots, axis=0)[None])[:, 0]
    return jnp.sum(pulled**2, axis=1) * jnp.sum(weight)  # the weights' sum is 1, or 0 without examples


def jacobian_rows(outputs, params, batch) -> jax.Array:
    """[N, K, P]: d outputs_n / d params for each example, its outputs ravelled to [K]; one forward and K pullbacks."""
    out, pull_back = _linearise_each(outputs, params, batch)
    flat = _ravel_each(out)
    return pull_back(jnp.broadcast_to(jnp.eye(flat.shape[1], dtype=flat.dtype)[:, None], flat.shape[1:] + flat.shape))


def _linearise_each(outputs, params, batch):
    """(out [B, ...], cotangents [K', B, K] -> rows [B, K', P]), by one forward pass.

    The cotangents are pulled back one after another, for all examples at once: side by side, those of the activations
    leave a CPU's cache, which makes a convolution's rows 2.4 times slower.
    """

    def linearise(example):
        single = jax.tree.map(lambda x: x[None], example)
        return jax.vjp(lambda p: first(outputs(p, single)), params)

    out, pulls = jax.vmap(linearise)(batch)
    _, unravel = ravel_pytree(first(out))

    def row(pull, cotangent):  # [K] -> [P]
        return ravel_pytree(pull(unravel(cotangent))[0])[0]

    def pull_back(cotangents):
        pulled = jax.lax.map(functools.partial(jax.vmap(row), pulls), vary_with(cotangents, out))
        return jnp.moveaxis(pulled, 0, 1)

    return out, pull_back


def _roots(loss, out, batch, weight):
    """The columns [K, B, K] of (weight_n L_n)^{1/2} = V diag(mu)^{1/2}, the largest mu first; is an L_n indefinite?"""
    hessian = loss_derivatives(loss, out, batch, weight)[1]
    _, unravel = ravel_pytree(first(out))
    examples, size = _ravel_each(out).shape
    units = jnp.broadcast_to(jnp.eye(size, dtype=weight.dtype)[:, None], [size, examples, size])
    columns = jax.vmap(lambda unit: _ravel_each(hessian(jax.vmap(unravel)(unit))))(units)
    eigenvalues, directions = jnp.linalg.eigh(jnp.moveaxis(columns, 0, 2))
    roots = directions * jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None, :]
    # Where a softmax is confident p (1 - p) is but the rounding of p, of either sign.
    noise = 10 * jnp.finfo(weight.dtype).eps * weight
    return jnp.moveaxis(roots, 2, 0)[::-1], jnp.any(indefinite(eigenvalues) & (eigenvalues[:, 0] < -noise))


def _head(outputs, loss, params, micro, *, features):
    """H V for the last dense layer, out_n = W^T phi_n + b: J_n = phi_n^T kron I, so that no network is in the loop.

    With positions t: out_nt = W^T phi_nt + b, and H = 1/N sum_n sum_st J_ns^T L_nst J_nt for whatever L_n.
    """
    flat, unravel = ravel_pytree(params)

    def seen_by_head(batch, weight):
        out, phi = outputs(params, batch), contracts.of_each_example(features)(params, batch)
        if not last_layer.fits(params, out, phi):
            return out, phi, False
        return out, phi, jnp.any(weight > 0) & last_layer.differs(outputs, params, batch, phi)

    out, phi, differs = stack(seen_by_head, micro)  # [n, B, K], [n, B, F], [n]
    if not last_layer.fits(params, *first((out, phi))):
        raise ValueError(
            "sketch.solver, or jacobian: head needs trainable parameters that are the last layer's kernel [F, K] and "
            f"at most its bias [K], got {contracts.shapes(params)} for features and outputs "
            f"{contracts.shapes((phi, out))}; set trainable to that layer"
        )
    differs = jnp.any(differs)
    phi = jnp.where(differs, jnp.nan, phi)
    has_bias = len(jax.tree.leaves(params)) == 2

    def product(vectors):  # [P, B] -> [P, B]
        columns = jax.vmap(unravel, in_axes=1, out_axes=-1)(vary_with(vectors, params))

        def add(total, batch, weight, out, phi):
            return jax.tree.map(jnp.add, total, _head_columns(loss, columns, batch, weight, out, phi))

        blank = vary_with(jax.tree.map(jnp.zeros_like, columns), columns)
        total = zero_if_empty(micro, fold(add, blank, micro, out, phi))
        return jax.vmap(_ravelled, in_axes=-1, out_axes=1)(total)

    def trace(total, batch, weight, out, phi):
        """Adds sum_n weight_n tr(L_n) (|phi_n|^2 + 1 with a bias)."""
        hessian = loss_derivatives(loss, out, batch, weight)[1]
        diagonal = jax.lax.map(lambda unit: hessian(jnp.broadcast_to(unit, out.shape)) @ unit, jnp.eye(out.shape[1]))
        return total + jnp.vdot(jnp.sum(diagonal, 0), jnp.sum(phi**2, axis=1) + has_bias)

    # With positions, which L_n may couple, the trace is no sum over them.
    whole = zero_if_empty(micro, fold(trace, jnp.zeros([], flat.dtype), micro, out, phi)) if out.ndim == 3 else None
    return Curvature(product, flat.size, flat.dtype, trace=whole, not_last_layer=differs)


def _head_columns(loss, columns, batch, weight, out, phi):
    """H V of one micro-batch: of the kernel's columns [F, K, B] and the bias's [K, B], one product for all of them."""
    leading = tuple(range(out.ndim - 1))  # the examples' axis, and those of positions

    def push(leaf):
        return jnp.tensordot(phi, leaf, 1) if leaf.ndim == 3 else jnp.expand_dims(leaf, leading)

    tangent = trees.total(push(leaf) for leaf in jax.tree.leaves(columns))
    hessian = loss_derivatives(loss, out, batch, weight)[1]
    curved = jax.vmap(hessian, in_axes=-1, out_axes=-1)(jnp.broadcast_to(tangent, (*out.shape, tangent.shape[-1])))

    def pull(leaf):
        return jnp.tensordot(phi, curved, [leading, leading]) if leaf.ndim == 3 else jnp.sum(curved, leading)

    return jax.tree.map(pull, columns)


# How the curvature is seen: (outputs, loss, params, micro, and an option of its own) -> Curvature.
JACOBIANS = {"head": _head, "matrix_free": _matrix_free, "rows": _rows}


def make_ggn_diagonal(outputs: Outputs, loss: Loss, *, micro_batch: int = 0) -> MakeVector:
    """Builds `diagonal(params, batch, mask=None) -> [P]`, the diagonal of H, from the squares of its scaled rows.

    Args and Raises: see `make_ggn`.
    """

    outputs, loss = contracts.of_each_example(outputs), contracts.one_number_each(loss)

    def diagonal(params, batch, mask=None):
        params, micro = _given(params, batch, mask, micro_batch)

        def add(total, batch, weight):
            return total + jnp.sum(scaled_rows(outputs, loss, params, batch, weight)[0] ** 2, axis=0)

        return zero_if_empty(micro, fold(add, jnp.zeros_like(ravel_pytree(params)[0]), micro))

    return diagonal


def make_gradient(outputs: Outputs, loss: Loss) -> MakeVector:
    """Builds `gradient(params, batch, mask=None) -> [P]`, of the mean loss over the mask's examples.

    Args and Raises: see `make_ggn`.
    """
    outputs, loss = contracts.of_each_example(outputs), contracts.one_number_each(loss)

    def gradient(params, batch, mask=None):
        params, micro = _given(params, batch, mask, 0)

        def mean_loss(params, batch, weight):
            return jnp.sum(weight * loss(outputs(params, batch), batch))

        slope = jax.grad(mean_loss)(params, *first((micro.batch, micro.weight)))
        return zero_if_empty(micro, ravel_pytree(slope)[0])

    return gradient


def loss_derivatives(loss, out, batch, weight):
    """The weighted loss's derivatives in the outputs: its gradient [N, ...] and tangent -> weight_n L_n tangent_n."""

    def weighted(out):
        return jnp.sum(weight * loss(out, batch))

    def hessian(tangent):
        return jax.jvp(jax.grad(weighted), (vary_with(out, tangent),), (vary_with(tangent, out),))[1]

    return jax.grad(weighted)(out), hessian


def indefinite(eigenvalues: jax.Array) -> jax.Array:
    """Whether the eigenvalues [..., B] of a matrix reach further below zero than rounding explains."""
    size = jnp.max(jnp.abs(eigenvalues), axis=-1)
    return jnp.min(eigenvalues, axis=-1) < -jnp.sqrt(jnp.finfo(eigenvalues.dtype).eps) * size


def forward_flops(function: Callable[..., Any], *args) -> float:
    """The floating-point operations of a function's matrix products and convolutions.

    A loop whose length its program does not know counts once.
    """
    return _flops(jax.make_jaxpr(function)(*args))


def _flops(jaxpr) -> float:
    """The operations of a program and of those that it calls."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            contracted = _contracted(eqn)
            total += 2 * eqn.outvars[0].aval.size * contracted
        # Calls hold their programs among their parameters; a loop's body runs `length` times.
        inner = sum(_flops(sub) for sub in jax.tree.leaves(list(eqn.params.values())) if hasattr(sub, "eqns"))
        total += inner * eqn.params.get("length", 1)
    return total


def _contracted(eqn) -> int:
    """Multiplications that each entry of a product's result takes."""
    if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return int(np.prod([eqn.invars[0].aval.shape[axis] for axis in axes]))
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval
    return kernel.size // kernel.shape[numbers.rhs_spec[0]]


def _ravelled(tree) -> jax.Array:
    """[P], the tree's leaves one after another."""
    return ravel_pytree(tree)[0]


def _ravel_each(stacked) -> jax.Array:
    """[B, K], each example's leaves [B, ...] one after another."""
    return jax.vmap(_ravelled)(stacked)
