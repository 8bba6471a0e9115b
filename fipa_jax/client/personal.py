"""How does a client get a model of its own? It fits its own examples, drawn to a common model by a quadratic prior:

    theta_m = argmin  sum of losses_m(theta) + strength/2 (theta - anchor)^T M (theta - anchor)

With M = I and the common model as anchor that is Ditto's personal model (Li et al. 2021, algorithm 1, at its optimum).
With M = H + beta I, the other clients' curvature at the common model, it is an online Laplace approximation (Ritter et
al. 2018, of tasks that come one after another; here the others' data are the first task): the client moves freely where
the others' data do not say much, and little where they do. With M the inverse covariance of the other clients' own
models it is empirical Bayes: the client moves where they moved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.client import examples
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper, LocalResult, LocalSolver
from fipa_jax.client.second_order import gauss_newton
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Loss
from fipa_jax.curvature.sketch import Sketch, TaskOutputs

STEPS = 20  # of Gauss-Newton
NOT_SEEN = (
    1e-3  # the variance, in units of the mean one, of directions in which no two clients' models were seen to differ
)
FREE = 1e-4  # so much of what holds the other parameters holds those that a client has for itself


class Prior(NamedTuple):
    """What a client's own parameters are drawn to, and how strongly in which direction; in float32 at least.

    M = S (I + Q diag(g) Q^T) S with S = diag(scale), which is never formed. v -> anchor + S^{-1} (I + Q diag(g)
    Q^T)^{-1/2} v gives parameters for which the prior is |v|^2.
    """

    anchor: jax.Array  # [P]
    scale: jax.Array  # [P], positive
    basis: jax.Array  # [P, D], Q, orthonormal columns
    curvature: jax.Array  # [D], g, above -1


def quadratic(prior: Prior, theta: jax.Array) -> jax.Array:
    """(theta - anchor)^T M (theta - anchor) [] of parameters [P]."""
    return jnp.sum(_to_round(prior, theta) ** 2)


def proximity(params: Any, own: str = "") -> Prior:
    """The prior |theta - params|^2, Ditto's. Parameters that a client has for itself are nearly free of it.

    Args:
      params: the anchor.
      own: regular expression over the paths of the parameters that a client has for itself; "" for none.
    """
    anchor = _vector(params)
    scale = jnp.where(_own(params, own), FREE**0.5, 1).astype(anchor.dtype)
    return Prior(anchor, scale, jnp.zeros([anchor.size, 0], anchor.dtype), jnp.zeros([0], anchor.dtype))


def curvature(params: Any, sketches: Sketch, num_examples: jax.Array, damping: float = 0.1, own: str = "") -> Prior:
    """The prior (theta - params)^T (H + beta I) (theta - params), H the clients' mean curvature at `params`.

    Where each client has some parameters E for itself, the curvature that counts is what is left when these have been
    fitted: the Schur complement H_m - H_m E (E^T H_m E)^+ E^T H_m, here of each client's sketch. Of E itself only a
    small part of beta is left, `FREE`. For half-squared errors and the bias of the outputs that is the covariance of
    the model's derivatives *within* the clients: a shift of all of a client's answers says nothing of another's.
    Where no client takes part, or none that does has any curvature, beta is 1: that is the prior of `proximity`.

    Args:
      params: the anchor, where the sketches were taken.
      sketches: of C clients, stacked: eigenvalues [C, R], basis [C, P, R].
      num_examples: [C], of each; 0 leaves a client out, whatever its sketch.
      damping: beta in units of H's mean eigenvalue, tr H / P; positive.
      own: see `proximity`.

    Raises:
      ValueError: the damping is not positive, or not finite; a number of examples is negative or NaN.
    """
    _check_positive(damping=damping)
    contracts.at_least(0, num_examples=num_examples)
    anchor, mine = _vector(params), _own(params, own)
    weights = jnp.asarray(num_examples, anchor.dtype)
    weights = trees.ratio(weights, jnp.sum(weights))
    kept = trees.zero_unless(weights > 0, (sketches.basis, sketches.eigenvalues))
    basis, eigenvalues = (part.astype(anchor.dtype) for part in kept)
    powers = weights[:, None] * jnp.maximum(eigenvalues, 0)
    factors = basis * jnp.sqrt(powers)[:, None, :]  # [C, P, R]
    beta = damping * jnp.sum(powers) / anchor.size
    beta = jnp.where(beta > jnp.finfo(anchor.dtype).tiny, beta, 1)
    scale = jnp.sqrt(beta) * jnp.where(mine, FREE**0.5, 1).astype(anchor.dtype)
    if mine.any():
        factors = jax.vmap(_fitted_out, in_axes=(0, None))(factors, np.flatnonzero(mine))
    side_by_side = jnp.moveaxis(factors, 0, 1).reshape(anchor.size, -1)  # [P, C R], H = F F^T
    columns, singular_values, _ = jnp.linalg.svd(side_by_side / scale[:, None], full_matrices=False)
    return Prior(anchor, scale, columns, singular_values**2)


def spread(params: Any, moves: jax.Array) -> Prior:
    """The prior (theta - params)^T (D^T D / s + c I)^{-1} (theta - params): by how much clients differ, and in what.

    D^T D is the sum over clients of d_m d_m^T, d_m = theta_m - params the way to a client's own model, and s its mean
    eigenvalue. That is the covariance of a Gaussian from which the clients' models are drawn, estimated from those of
    clients with many examples (empirical Bayes). c is `NOT_SEEN`. Where no client has moved it is
    |theta - params|^2 / c, and no variance counts for more than c / eps, eps the rounding of one.

    Args:
      params: the anchor.
      moves: D [C, P], such as those of `personalise` with the prior `curvature`.
    """
    anchor, moves = _vector(params), trees.widened(contracts.floating(moves, "moves"))
    numbers = jnp.finfo(anchor.dtype)
    mean = jnp.maximum(jnp.sum(moves**2) / anchor.size, numbers.tiny)
    columns, singular_values, _ = jnp.linalg.svd(moves.T.astype(anchor.dtype), full_matrices=False)
    variances = singular_values**2 / mean
    scale = jnp.full_like(anchor, NOT_SEEN**-0.5)
    return Prior(anchor, scale, columns, jnp.maximum(NOT_SEEN / (variances + NOT_SEEN), numbers.eps) - 1)


def fitter(loss: Loss, steps: int = STEPS) -> LocalSolver:
    """The local solver that fits a client's own model by so many Gauss-Newton steps; a linear model needs one.

    It takes the prior where a round's solvers take `shared`, and its strength, positive, as `hyper.mu`. It computes in
    float32 at least, and its update is in the parameters' own dtypes. In the coordinates of
    `Prior` the objective is the mean loss and |v|^2 / 2, which `second_order.gauss_newton` solves as weight decay.
    """
    in_round = gauss_newton(loss, lambda key, batch: batch, weight_decay=1.0, steps=steps)

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        _check_positive(**{"hyper.mu": hyper.mu})
        prior, (theta, unravel) = shared, ravel_pytree(trees.widened(contracts.floating(params, "params")))
        unit = jnp.sqrt(jnp.maximum(client.num_examples, 1) / hyper.mu)

        def params_at(v):
            return unravel(prior.anchor + unit * _from_round(prior, v))

        def outputs_at(v, batch):
            return outputs(params_at(v), batch)

        start, plain = _to_round(prior, theta) / unit, hyper._replace(damping=jnp.zeros_like(hyper.mu))
        found = in_round(outputs_at, start, data, client, key, plain, store, ())
        found_at = params_at(start + found.delta)
        moved = jax.tree.map(lambda new, old: (new - old).astype(jnp.result_type(old)), found_at, params)
        return found._replace(delta=moved, damping=None)

    return solve


def personalise(
    outputs: TaskOutputs,
    loss: Loss,
    params: Any,
    data: dict,
    client: Client,
    prior: Prior,
    strength: jax.Array | float,
    *,
    steps: int = STEPS,
) -> Any:
    """A client's own parameters, from `params` on; jit it, or vmap it over clients.

    Example:
      def loss(out, batch):
          return jnp.sum((out - batch["y"]) ** 2, axis=1) / 2

      sketch = fipa_jax.curvature.make_sketch(model, loss, rank=10, solver="rows")  # model(params, batch) -> [B, K]
      sketches = jax.vmap(lambda batch: sketch(key, params, batch))(others)  # {field: [C, N, ...]}
      prior = curvature(params, sketches, num_examples=jnp.full([C], N))
      rows = jnp.arange(5)
      mine = personalise(lambda p, b: (model(p, b), ()), loss, params, data, Client(rows, rows.size), prior, 0.1)

    Args:
      outputs: (params, batch) -> (out [B, K], features).
      loss: (out, batch) -> [B].
      params: where the fit starts, the common model.
      data: {field: [N, ...]}.
      client: which of them are its own.
      prior: see `curvature` and `proximity`.
      strength: for how many examples of the client the prior counts; positive. The others' curvature is a mean over
        their N examples: with N the result is the posterior of all data, one model for all. As clients differ, far less
        is better: choose it on held-out examples.
      steps: of Gauss-Newton.

    Returns:
      The parameters in their own dtypes; all is computed in float32 at least.

    Raises:
      ValueError: the strength is not positive, or not finite; the client's examples are not in the data; the parameters
        are not floating-point arrays.
    """
    _check_positive(strength=strength)
    examples.check(client, data)
    wide = trees.widened(contracts.floating(params, "params"))
    strength = jnp.asarray(strength, trees.ravel(wide).dtype)
    hyper = Hyper(lr=jnp.ones_like(strength), damping=jnp.zeros_like(strength), mu=strength)
    found = fitter(loss, steps)(outputs, wide, data, client, jax.random.key(0), hyper, (), prior)
    own = jax.tree.map(jnp.add, wide, found.delta)
    return jax.tree.map(lambda new, old: new.astype(jnp.result_type(old)), own, params)


def _check_positive(**numbers: Any) -> None:
    """Refuses, with a ValueError, numbers that are not above 0 or not finite; those that are traced pass."""
    for name, value in numbers.items():
        if contracts.is_known(value) and not np.all((np.asarray(value) > 0) & (np.asarray(value) < np.inf)):
            raise ValueError(f"{name}: needed a finite number above 0, got {value}")


def _vector(params: Any) -> jax.Array:
    """[P], the parameters in float32 at least."""
    return trees.ravel(trees.widened(contracts.floating(params, "params")))


def _from_round(prior: Prior, v: jax.Array) -> jax.Array:
    """S^{-1} (I + Q diag(g) Q^T)^{-1/2} v [P], what lies away from the anchor."""
    return _by_directions(prior, v, -0.5) / prior.scale


def _to_round(prior: Prior, theta: jax.Array) -> jax.Array:
    """Its inverse, of theta - anchor: v [P]."""
    return _by_directions(prior, prior.scale * (theta - prior.anchor), 0.5)


def _by_directions(prior: Prior, vector: jax.Array, power: float) -> jax.Array:
    """(I + Q diag(g) Q^T)^power times a vector [P]."""
    along = jnp.matmul(vector, prior.basis, precision="highest")
    return vector + jnp.matmul(prior.basis, ((1 + prior.curvature) ** power - 1) * along, precision="highest")


def _own(params: Any, pattern: str) -> np.ndarray:
    """[P] bool: which entries belong to parameters whose path holds the regular expression; "" for none."""
    leaves = trees.paths(params)
    chosen = trees.select(params, pattern) if pattern else {}
    return np.concatenate([np.full(np.size(leaf), path in chosen) for path, leaf in leaves.items()])


def _fitted_out(factor: jax.Array, rows: np.ndarray) -> jax.Array:
    """F (I - G^+ G) [P, R] of F [P, R] and its rows G: F F^T without what these parameters explain of it."""
    own = factor[rows]
    return factor - jnp.einsum("pr,rs->ps", factor, jnp.linalg.pinv(own) @ own, precision="highest")
