"""Which eigensolver, on which view of the curvature? As the user says, or the cheapest by their costs."""

from typing import Literal, NamedTuple

import jax
from jax.flatten_util import ravel_pytree

from fipa_jax.curvature import contracts, eigenpairs
from fipa_jax.curvature.contracts import Features, Outputs
from fipa_jax.curvature.last_layer import is_last_layer
from fipa_jax.curvature.overlooked import USUAL
from fipa_jax.curvature.products import forward_flops
from fipa_jax.lookup import lookup

ROWS_GIB = 2.0  # memory that explicit rows may take, for `auto`

SolverName = Literal["auto", "head", "lanczos", "rows", "subspace"]  # a name in `SOLVERS`
# The solver's name for a user: (solver of `eigenpairs`, how the curvature is seen; None: as `jacobian` says).
SOLVERS = {
    "auto": (None, None),  # both by `choose`
    "head": ("lanczos", "head"),
    "lanczos": ("lanczos", None),
    "rows": ("exact", "rows"),
    "subspace": ("subspace", None),
}


class Search(NamedTuple):
    """How eigenpairs are sought; see `eigenpairs`."""

    solver: str  # a name in `SOLVERS`, or after `resolve` one in `eigenpairs.SOLVERS`
    rank: int
    oversample: int
    power_steps: int
    tolerance: float


class View(NamedTuple):
    """How the curvature is seen: the options of `products.make_ggn`."""

    micro_batch: int
    jacobian: str
    features: Features | None
    loss_rank: int


def check_view(solver: SolverName, view: View) -> None:
    """Refuses, with a ValueError, a solver that is not known, or that does not see the rows which `loss_rank` cuts."""
    _, jacobian = lookup(SOLVERS, solver, "sketch.solver")
    if solver != "auto":
        contracts.check_loss_rank(view.loss_rank, jacobian or view.jacobian)


def make_solver(search: Search) -> eigenpairs.Solver:
    """The solver of eigenpairs that a resolved search names."""
    options = {
        "exact": {},
        "lanczos": {"power_steps": search.power_steps},
        "subspace": {"power_steps": search.power_steps},
    }[search.solver]
    make = eigenpairs.SOLVERS[search.solver]
    return make(search.rank, oversample=search.oversample, tolerance=search.tolerance, **options)


def resolve(outputs: Outputs, params, batch, search: Search, view: View) -> tuple[Search, View]:
    """The search and the view with the solver and the jacobian that they come to, by shapes alone.

    Raises:
      ValueError: the solver's name is not known.
    """
    solver, jacobian = lookup(SOLVERS, search.solver, "sketch.solver")
    if search.solver == "auto":
        solver, jacobian = _choose_for(outputs, params, batch, search, view)
        view = view if jacobian == "rows" else view._replace(loss_rank=0)
    return search._replace(solver=solver), view._replace(jacobian=jacobian or view.jacobian)


def _choose_for(outputs, params, batch, search: Search, view: View) -> tuple[str, str]:
    """`choose` by the sizes of a model and its data."""
    out = jax.eval_shape(outputs, params, batch)
    num_outputs = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(out))
    return choose(
        examples=jax.tree.leaves(batch)[0].shape[0],
        outputs=min(view.loss_rank or num_outputs, num_outputs),
        side=num_outputs,
        size=sum(leaf.size for leaf in jax.tree.leaves(params)),
        products=(search.power_steps + 1) * search.rank + search.oversample + USUAL,
        flops=forward_flops(outputs, params, batch),
        itemsize=ravel_pytree(params)[0].dtype.itemsize,
        is_head=is_last_layer(outputs, view.features, params, batch),
    )


def choose(
    *, examples: int, outputs: int, side: int, size: int, products: int, flops: float, itemsize: int, is_head: bool
) -> tuple[str, str]:
    """The rule of `auto`: (solver, jacobian), by the floating-point operations of each and the memory of the rows.

    1. The last layer alone is seen in closed form.
    2. Rows [N K, P] and Hessians of the loss [N, M, M] that take more than `ROWS_GIB`: block Lanczos on matrix-free
       products. So it is for sequences, of whose rows there are T times as many.
    3. At most 256 rows or parameters, and M <= 256: the exact pairs, one small decomposition.
    4. Otherwise the cheapest of, with f the operations of one forward pass over all N examples, and l = 25 N M^3 those
       of the roots of the Hessians:
         matrix-free Lanczos   4 f B + 6 P B^2                          B products, and keeping their columns orthogonal
         Lanczos on the rows   l + 2 f K + 4 N K P B + 6 P B^2          K pullbacks, then B products
         exact                 l + 2 f K + 2 n^2 max(N K, P) + 25 n^3   with n = min(N K, P): a Gram matrix and its
                                                                        eigenvectors, at a third of a product's speed

    Args:
      examples, size: N, P.
      outputs: K, of an example, T times the symbols' number for a sequence; `loss_rank` where that is set.
      side: M, of an example's Hessian: K without `loss_rank`.
      products: B, that Lanczos may take, with those that ask whether it has overlooked a vector.
      flops: f.
      itemsize: bytes of an entry.
      is_head: whether the parameters are those of the last layer, with its inputs at hand.
    """
    if is_head:
        return "lanczos", "head"
    rows = examples * outputs
    if (rows * size + examples * side**2) * itemsize > ROWS_GIB * 2**30:
        return "lanczos", "matrix_free"
    narrow, wide = sorted((rows, size))
    if max(narrow, side) <= 256:
        return "exact", "rows"
    pulled = 25 * examples * side**3 + 2 * flops * outputs
    work = {
        ("lanczos", "matrix_free"): 4 * flops * products + 6 * size * products**2,
        ("lanczos", "rows"): pulled + 4 * rows * size * products + 6 * size * products**2,
        ("exact", "rows"): pulled + 2 * narrow**2 * wide + 25 * narrow**3,
    }
    return min(work, key=work.__getitem__)
