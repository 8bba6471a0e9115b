"""How do a client's eigenvalues change with its parameters and data? By Hellmann and Feynman: d lam_i = u_i^T dH u_i.

    lam_i = u_i^T H u_i = sum_n weight_n (J_n u_i)^T L_n (J_n u_i)

with u_i held fixed: exact for converged pairs, whose own change adds nothing to first order, and in sums over equal
eigenvalues too. Eigenvectors change by 1 / (lam_i - lam_j), which the pairs alone do not tell and equal eigenvalues
do not have: they, and the report, are refused.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.curvature import contracts
from fipa_jax.curvature.micro_batches import fold_all, micro_batches
from fipa_jax.curvature.products import loss_derivatives
from fipa_jax.derivatives import refusing, vary_with, with_derivative_of

NO_VECTORS = (
    "make_sketch: of a sketch only the eigenvalues have a derivative, in params and batch; apply jax.lax.stop_gradient "
    "to its basis and report, or to params; take a jax.jvp within jax.jit, which leaves out what is not used"
)
NO_RANK = "make_sketch: with loss_rank nothing has a derivative; apply jax.lax.stop_gradient to params and batch"


def differentiable(outputs, loss, found: Any, params: Any, batch: Any, mask, micro_batch: int, loss_rank: int) -> Any:
    """A sketch [R] that was found at these parameters and examples, whose eigenvalues have their derivative in both."""

    def values(params, batch, found):
        return found.eigenvalues

    def smooth(params, batch, found):
        return quotients(outputs, loss, params, micro_batches(params, batch, mask, micro_batch), found.basis)

    def same(found, params, batch):
        return found

    if loss_rank:
        return refusing(same, NO_RANK)(found, params, batch)
    eigenvalues = with_derivative_of(smooth, values, contextlib.nullcontext)(params, batch, found)
    return refusing(same, NO_VECTORS)(found, params, batch)._replace(eigenvalues=eigenvalues)


def quotients(outputs, loss, params, micro, vectors) -> jax.Array:
    """[R]: u^T H u of the vectors [P, R]."""
    outputs, loss = contracts.of_each_example(outputs), contracts.one_number_each(loss)
    params = trees.widened(params)
    micro, params, vectors = vary_with(micro, params), vary_with(params, micro), vary_with(vectors, params, micro)
    _, unravel = ravel_pytree(params)

    def add(total, batch, weight):
        out, push = jax.linearize(lambda p: outputs(p, batch), params)
        hessian = loss_derivatives(loss, out, batch, weight)[1]

        def quotient(vector):
            tangent = push(unravel(vector))
            return sum(map(jnp.vdot, jax.tree.leaves(tangent), jax.tree.leaves(hessian(tangent))))

        return total + jax.lax.map(quotient, vectors.T)

    with jax.default_matmul_precision("highest"):
        return fold_all(add, jnp.zeros_like(vectors[0]), micro)
