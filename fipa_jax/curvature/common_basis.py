"""What does a client's curvature make of a basis that all clients share? H Q [P, s], or Q^T H Q [s, s]: linear in H.

Eigenpairs of single clients cannot be added, products with one common basis can: sum_m w_m H_m Q is what the clients'
mean curvature makes of it. So a server that sees sums alone can use them, see `aggregate.sums`. Where the basis already
spans what matters, its core Q^T H Q says as much in s (s + 1) / 2 numbers, see `aggregate.gradient_span`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature import contracts, few_bits, products
from fipa_jax.curvature.contracts import Features, Loss, Outputs
from fipa_jax.curvature.products import JacobianName
from fipa_jax.curvature.sketch import Sketcher, TaskOutputs, apart
from fipa_jax.curvature.solver_choice import Search, SolverName, View, check_view, resolve
from fipa_jax.derivatives import vary_with
from fipa_jax.trees import ratio

BLOCK = 10  # columns that are multiplied together: those behind the last one in use cost nothing


class Image(NamedTuple):
    """What a client's curvature makes of a common basis."""

    values: jax.Array  # [P, s], H Q


class Core(NamedTuple):
    """A client's curvature within the span of a common basis."""

    values: jax.Array  # [s, s], Q^T H Q, symmetric


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

    check_view(solver, view := View(micro_batch, jacobian, features, loss_rank))

    def image(params, batch, mask, basis: jax.Array, active: jax.Array | int | None = None) -> Image:
        with jax.default_matmul_precision("highest"):
            matrix, basis = _matrix_of(outputs, loss, solver, view, params, batch, mask, basis)
            return Image(_in_blocks(matrix.product, basis, active, (params, batch, mask)))

    return image


def make_core(
    outputs: Outputs,
    loss: Loss,
    *,
    solver: SolverName = "subspace",
    micro_batch: int = 0,
    jacobian: JacobianName = "matrix_free",
    features: Features | None = None,
    loss_rank: int = 0,
):
    """Builds `core(params, batch, mask, basis, active=s) -> Core`: the Gauss-Newton matrix within the span of a basis.

    Of explicit rows A, with H = A^T A, it is (A Q)^T (A Q): half the work of an image.

    Example:
      core = make_core(outputs, loss, jacobian="rows")
      core(params, batch, None, basis).values is basis.T @ H @ basis, [s, s].

    Args, Raises: see `make_image`.
    """
    check_view(solver, view := View(micro_batch, jacobian, features, loss_rank))

    def core(params, batch, mask, basis: jax.Array, active: jax.Array | int | None = None) -> Core:
        with jax.default_matmul_precision("highest"):
            matrix, basis = _matrix_of(outputs, loss, solver, view, params, batch, mask, basis)
            if matrix.rows is not None:
                seen = matrix.rows @ basis
                values = seen.T @ seen
            else:
                values = basis.T @ _in_blocks(matrix.product, basis, active, (params, batch, mask))
            return Core((values + values.T) / 2)

    return core


def _matrix_of(outputs, loss, solver: SolverName, view: View, params, batch, mask, basis):
    """(the client's curvature, the basis [P, s] in its precision)."""
    contracts.floating(params, "params")
    batch, mask = contracts.present_rows(batch, mask)
    if jnp.ndim(basis) != 2:
        raise ValueError(f"basis: needed an array [P, s], got {contracts.kind(basis)}")
    size, columns = basis.shape
    seen_by = resolve(outputs, params, batch, Search(solver, columns, 0, 0, 1.0), view)[1]
    matrix = products.make_ggn(outputs, loss, **seen_by._asdict())(params, batch, mask)
    if matrix.size != size:
        raise ValueError(f"basis: needed {matrix.size} rows, one of each parameter, got {size}")
    return matrix, basis.astype(matrix.dtype)


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
        alone, last_inputs = apart(outputs)
        return make_image(alone, loss, features=last_inputs, **options)(params, batch, mask, basis, active)

    return Sketcher(of_client)


def sketcher_of_cores(loss: Loss, bits: int = 0, **options) -> Sketcher:
    """How the clients of a cohort see their curvature within the basis that they are shown.

    Args:
      bits: of an entry off the diagonal as it is sent, see `in_few_bits`; 0 for floating point.
      **options: those of `make_core`.
    """
    if bits:
        few_bits.check(bits, "sketch.bits")

    def of_client(outputs: TaskOutputs, params, key, batch, mask, basis, active) -> Core:
        alone, last_inputs = apart(outputs)
        core = make_core(alone, loss, features=last_inputs, **options)(params, batch, mask, basis, active)
        return in_few_bits(key, core, bits) if bits else core

    return Sketcher(of_client, bits=bits)


def in_few_bits(key: jax.Array, core: Core, bits: int) -> Core:
    """A core M as it arrives: its diagonal in full, of the rest r_ij = M_ij / sqrt(M_ii M_jj) rounded at random.

    M has no negative eigenvalue, so that |r_ij| is at most 1: an entry of M is off by less than
    sqrt(M_ii M_jj) / (2^(bits - 1) - 1), without bias, and weak directions are not lost beside strong ones. Its blocks
    are of entries as `above_diagonal` numbers them, so that columns behind the last one in use change nothing.
    """
    rows, columns = above_diagonal(core.values.shape[0])
    diagonal = jnp.diagonal(core.values)
    length = jnp.sqrt(jnp.maximum(diagonal, 0))
    lengths = length[:, None] * length[None]
    cosines = ratio(core.values, lengths)[rows, columns]
    sent = jnp.zeros_like(core.values).at[rows, columns].set(few_bits.rounded(key, cosines, bits))
    return Core(jnp.diag(diagonal) + (sent + sent.T) * lengths)


def above_diagonal(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) of the entries above the diagonal of [s, s], column by column: those of the first k columns come first."""
    after, before = np.tril_indices(columns, -1)
    return before, after


def bytes_of_core(columns: int, bits: int, itemsize: int = 4) -> int:
    """The bytes of a core of so many columns, as `in_few_bits` has it; with `bits` 0, of its upper half in full."""
    return columns * itemsize + few_bits.bytes_of(columns * (columns - 1) // 2, bits, itemsize)
