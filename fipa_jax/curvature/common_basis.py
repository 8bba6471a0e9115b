"""What does a client's curvature make of a basis that all clients share? H Q [P, s], a message that is linear in H.

Eigenpairs of single clients cannot be added, products with one common basis can: sum_m w_m H_m Q is what the clients'
mean curvature makes of it. So a server that sees sums alone can use it, see `aggregate.sums`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fipa_jax.curvature import contracts, products
from fipa_jax.curvature.contracts import Features, Loss, Outputs
from fipa_jax.curvature.products import JacobianName
from fipa_jax.curvature.sketch import Sketcher, TaskOutputs
from fipa_jax.curvature.solver_choice import Search, SolverName, View, resolve
from fipa_jax.derivatives import vary_with

BLOCK = 10  # columns that are multiplied together: those behind the last one in use cost nothing


class Image(NamedTuple):
    """What a client's curvature makes of a common basis."""

    values: jax.Array  # [P, s], H Q


def make_image(
    outputs: Outputs,
    loss: Loss,
    *,
    solver: SolverName = "subspace",
    micro_batch: int = 0,
    jacobian: JacobianName = "matrix_free",
    features: Features | None = None,
    loss_rank: int = 0,
):
    """Builds `image(params, batch, mask, basis, active=s) -> Image` of the loss's Gauss-Newton matrix: s products.

    Example:
      image = make_image(outputs, loss)
      image(params, batch, None, basis).values is H @ basis, [P, s].

    Args:
      outputs, loss, micro_batch, jacobian, features, loss_rank: see `products.make_ggn`.
      solver: only says how the curvature is seen: `rows`, `head`, or `auto` for the cheapest; else as `jacobian` says.

    Raises:
      ValueError: a name is not known, or what is given is not as `contracts` asks.
    """

    def image(params, batch, mask, basis: jax.Array, active: jax.Array | int | None = None) -> Image:
        contracts.floating(params, "params")
        batch, mask = contracts.present_rows(batch, mask)
        size, columns = basis.shape
        search, view = Search(solver, columns, 0, 0, 1.0), View(micro_batch, jacobian, features, loss_rank)
        seen_by = resolve(outputs, params, batch, search, view)[1]
        with jax.default_matmul_precision("highest"):
            matrix = products.make_ggn(outputs, loss, **seen_by._asdict())(params, batch, mask)
            if matrix.size != size:
                raise ValueError(f"basis: needed {matrix.size} rows, one of each parameter, got {size}")
            return Image(_in_blocks(matrix.product, basis.astype(matrix.dtype), active, (params, batch, mask)))

    return image


def _in_blocks(product, basis: jax.Array, active, given) -> jax.Array:
    """product(basis) [P, s] by blocks of columns, as many as there are in use."""
    columns = basis.shape[1]
    if active is None or columns <= BLOCK:
        return product(basis)

    def step(i, done):
        start = jnp.minimum(i * BLOCK, columns - BLOCK)
        block = jax.lax.dynamic_slice_in_dim(basis, start, BLOCK, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(done, product(block), start, axis=1)

    blank = vary_with(jnp.zeros_like(basis), basis, given)
    return jax.lax.fori_loop(0, -(-active // BLOCK), step, blank)


def sketcher_of_images(loss: Loss, **options) -> Sketcher:
    """How the clients of a cohort multiply the basis that they are shown; `options` are those of `make_image`."""

    def of_client(outputs: TaskOutputs, params, key, batch, mask, basis, active) -> Image:
        def alone(theta, batch):
            return outputs(theta, batch)[0]

        def last_inputs(theta, batch) -> Any:
            return getattr(outputs(theta, batch)[1], "last", None)

        return make_image(alone, loss, features=last_inputs, **options)(params, batch, mask, basis, active)

    return Sketcher(of_client)
