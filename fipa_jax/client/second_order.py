"""Client solvers that use curvature on all of a client's examples: Gauss-Newton steps, L-BFGS, natural gradients.

They are local solvers, see `local_solver`. All examples enter every step: there are no mini-batches.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.client.examples import present
from fipa_jax.client.first_order import Augment
from fipa_jax.client.local_solver import (
    ByCurvature,
    Improvement,
    LocalSolver,
    Work,
    make_objective,
    mean_gradient,
    regularised,
    solver_of,
    takes_no,
)
from fipa_jax.client.terms import Term, none
from fipa_jax.curvature import contracts, products
from fipa_jax.curvature.contracts import Loss
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup

System = Literal["auto", "cg", "gram"]  # a name in `SYSTEMS`
GRAM_LIMIT = 2000  # N K up to which `auto` solves with the Gram matrix


def gauss_newton(
    loss: Loss,
    augment: Augment,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    epochs: int = 1,
    steps: int = 0,
    tries: int = 10,
    system: System = "auto",
    cg_steps: int = 100,
    term: Term | None = None,
) -> LocalSolver:
    """Levenberg-Marquardt Gauss-Newton steps on all of the client's examples, for regression tasks.

        delta = -(J^T L J / N + c I)^{-1} (J^T e / N + l2 theta)
              = -J^T (L J J^T / N + c I)^{-1} (e - l2 / c L J theta) / N - l2 / c theta

    e are the loss's gradients in the outputs [N K], J the Jacobian's rows [N K, P]; nothing of size [P, P] is formed.
    l2 is the weight decay, of the objective's l2/2 |theta|^2, and c the damping, l2 in it: with c = l2 the step is
    Gauss's and Newton's own. A smaller damping is raised to l2, but for an untested step, whose c may be the server's.
    Each step is scaled by the learning rate. Where it would raise the client's loss, it is tried again with ten times
    the damping (Marquardt 1963); after `tries` of that the client stays where it is.

    Args:
      loss: (out, batch) -> [B].
      weight_decay: l2 of the objective.
      epochs, steps: re-linearised steps a round; an epoch is one step, as it takes all examples.
      tries: dampings that are tried; 0 takes the step of the first one untested, as it is.
      system: `gram` solves the right-hand form (push-through identity), one [N K, N K] system; `cg` the left-hand one
        by conjugate gradients on matrix-free products; `auto` takes `gram` up to N K = 2000.
      cg_steps: products with the curvature that a damping may take; fewer where the residual is rounding alone.

    Raises:
      ValueError: a term or clipping is asked for, or the system is not known.
    """
    takes_no("gauss_newton", clip_norm=clip_norm)
    if term not in (None, none()):
        raise ValueError("local.optimizer = 'gauss_newton' takes no term: set term.name = 'none', or use 'lbfgs'")
    steps, loss = steps or epochs, contracts.one_number_each(loss)
    linearise = lookup(SYSTEMS, system, "local.gauss_newton.system")
    linearise = functools.partial(linearise, loss=loss, weight_decay=weight_decay, cg_steps=cg_steps)

    def improve(work: Work, key) -> Improvement:
        hyper, examples, mask = work.hyper, work.examples, present(work.client)
        flat, unravel = ravel_pytree(work.params)
        weight = mask.astype(flat.dtype) / jnp.maximum(work.client.num_examples, 1)

        @contracts.of_each_example
        def predict(params, batch):
            return work.outputs(params, batch)[0]

        def mean_loss(theta):
            return jnp.sum(weight * loss(predict(unravel(theta), examples), examples))

        def objective(theta):
            return mean_loss(theta) + _penalty(weight_decay, theta)

        def step(_, carry):
            theta, total, _ = carry
            before = mean_loss(theta)
            direction, least = linearise(predict, unravel(theta), examples, mask)

            def step_for(damping):
                return hyper.lr * direction(damping)

            if not tries:
                return theta + step_for(first), total + before, first
            at = theta, before + _penalty(weight_decay, theta)
            theta, damping = _marquardt(*at, objective, step_for, first, least, tries)
            return theta, total + before, damping

        first = jnp.maximum(hyper.damping, weight_decay) if tries else hyper.damping
        start = flat, jnp.zeros([], flat.dtype), first
        theta, total, damping = jax.lax.fori_loop(0, steps, step, vary_with(start, flat))
        return Improvement(unravel(theta - flat), total / steps, damping=damping)

    return _precise(solver_of(improve, none()))


def _penalty(weight_decay: float, theta):
    """[], l2/2 |theta|^2."""
    return weight_decay / 2 * jnp.sum(theta**2) if weight_decay else 0.0


def _marquardt(theta, before, objective, step_for, damping, least, tries: int):
    """(theta [P] after a step that does not raise the objective, that step's damping []), by trying ever larger ones.

    Args:
      theta: [P].
      before: [], its objective.
      objective: theta -> [].
      step_for: damping -> step [P].
      damping: [], the first one; each further one is ten times the one before it.
      least: [], the smallest damping that changes the step, for the further ones.
      tries: after so many theta stays where it is.
    """

    def worse(step):  # NaN compares false, and so is no improvement
        return ~(objective(theta + step) <= before)

    def failed(attempt):
        _, step, tried = attempt
        return (tried == 0) | ((tried < tries) & worse(step))

    def again(attempt):
        damping, _, tried = attempt
        damping = jnp.where(tried == 0, damping, jnp.maximum(10 * damping, least))
        return damping, step_for(damping), tried + 1

    damping, step, _ = jax.lax.while_loop(failed, again, vary_with((damping, jnp.zeros_like(theta), 0), theta))
    return jnp.where(worse(step), theta, theta + step), damping


def _gram(predict, params, examples, mask, *, loss, weight_decay, cg_steps):
    """(damping c -> the step [P] in its second form, the least damping that counts), from one Jacobian."""
    out = predict(params, examples)
    weight = mask.astype(out.dtype) / jnp.maximum(jnp.sum(mask), 1)
    gradient, hessian = products.loss_derivatives(loss, out, examples, weight)
    rows = products.jacobian_rows(predict, params, examples)  # [N, K, P]
    num_outputs, rows = rows.shape[1], rows.reshape(-1, rows.shape[2])

    def curve(tangent):
        return ravel_pytree(hessian(tangent))[0]

    system = jax.vmap(curve, in_axes=-1, out_axes=-1)((rows @ rows.T).reshape(*out.shape, -1))
    # A padded example's equation reads 0 = 0: with a one on the diagonal it can be solved.
    padding = jnp.repeat(~mask, num_outputs).astype(out.dtype)

    pull = weight_decay * ravel_pytree(params)[0] if weight_decay else None

    def direction(damping):
        pulled = 0 if pull is None else hessian((rows @ (pull / damping)).reshape(out.shape))
        solved = jnp.linalg.solve(system + jnp.diag(damping + padding), (gradient - pulled).reshape(-1))
        return -solved @ rows - (0 if pull is None else pull / damping)

    return direction, jnp.trace(system) * jnp.finfo(out.dtype).eps


def _cg(predict, params, examples, mask, *, loss, weight_decay, cg_steps):
    """(damping c -> the step [P] in its first form, the least damping that counts), by products with J^T L J / N."""
    ggn = products.make_ggn(predict, loss)(params, examples, mask)
    gradient = products.make_gradient(predict, loss)(params, examples, mask)
    if weight_decay:
        gradient = gradient + weight_decay * ravel_pytree(params)[0]
    eps = jnp.finfo(gradient.dtype).eps

    def product(vector):
        return ggn.product(vector[:, None])[:, 0]

    def direction(damping):
        def damped(vector):
            return product(vector) + damping * vector

        return -jax.scipy.sparse.linalg.cg(damped, gradient, tol=float(eps), maxiter=cg_steps)[0]

    # |H g| / |g| is no more than the largest eigenvalue; the trace is not at hand.
    length = jnp.maximum(jnp.linalg.norm(gradient), jnp.finfo(gradient.dtype).tiny)
    return direction, jnp.linalg.norm(product(gradient)) / length * eps


def _auto(predict, params, examples, mask, **options):
    """`_gram` for few outputs, else `_cg`."""
    small = jax.eval_shape(predict, params, examples).size <= GRAM_LIMIT
    return (_gram if small else _cg)(predict, params, examples, mask, **options)


# (predict, params, examples, mask) -> (damping -> step [P], the least damping that counts)
SYSTEMS = {"auto": _auto, "cg": _cg, "gram": _gram}


def lbfgs(
    loss: Loss,
    augment: Augment,
    *,
    memory_size: int = 10,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    epochs: int = 1,
    steps: int = 0,
    term: Term | None = None,
) -> LocalSolver:
    """L-BFGS with a zoom line search (Nocedal & Wright 2006, algorithms 7.4 and 3.5) on all of the client's examples.

    The objective is the mean loss plus l2/2 |theta|^2, l2 the weight decay, plus the term's penalty. The learning rate
    scales nothing: the line search chooses the step, strong Wolfe. A step that does not lower the objective, or is not
    finite, is not taken: the gradients of before are forgotten, and where that does not help either the client is done.
    With clients side by side (`chunk` other than 1) every evaluation in the line search costs two. In a `jax.shard_map`
    of your own it needs `check_vma=False`, which optax's line search asks for; the other local solvers do without.

    Args:
      loss: (out, batch) -> [B].
      memory_size: pairs of steps and gradient differences that are remembered; a round starts without any.
      weight_decay: l2 of the objective.
      epochs, steps: iterations a round, at most; an epoch is one, as it takes all examples.
      term: additive term of the objective.

    Raises:
      ValueError: clipping is asked for.
    """
    takes_no("lbfgs", clip_norm=clip_norm)
    term = term or none()
    steps = steps or epochs
    search = optax.lbfgs(memory_size=memory_size)

    def improve(work: Work, key) -> Improvement:
        examples, mask = work.examples, present(work.client)
        # As one vector: optax looks its state up by name, among which a parameter's could be.
        flat, unravel = ravel_pytree(work.params)
        objective = make_objective(work, loss, term)

        def losses(theta):
            return objective(unravel(theta), examples, mask)

        def value_of(theta):  # outside the function's domain the line search needs a value to turn back from
            value = losses(theta)[0] + _penalty(weight_decay, theta)
            return jnp.nan_to_num(value, nan=jnp.inf, posinf=jnp.inf, neginf=jnp.inf)

        value_and_gradient = optax.value_and_grad_from_state(value_of)
        forgotten = vary_with(search.init(flat), flat)

        def step(carry):
            s, theta, state, failures, total = carry
            value, gradient = value_and_gradient(theta, state=state)
            move, state = search.update(gradient, state, theta, value=value, grad=gradient, value_fn=value_of)
            update = jnp.asarray(move)
            reached = optax.tree.get(state, "value")
            better = jnp.isfinite(reached) & (reached <= value) & jnp.all(jnp.isfinite(update))
            state = optax.tree.where(better, state, forgotten)
            failures = jnp.where(better, 0, failures + 1)
            return s + 1, jnp.where(better, theta + update, theta), state, failures, total + losses(theta)[1]

        num_steps = jnp.where(work.client.num_examples > 0, steps, 0)

        def going(carry):
            s, _, _, failures, _ = carry
            return (s < num_steps) & (failures < 2)

        start = vary_with((0, flat, forgotten, 0, jnp.zeros([], flat.dtype)), flat)
        taken, theta, _, _, total = jax.lax.while_loop(going, step, start)
        found = Improvement(unravel(theta - flat), total / jnp.maximum(taken, 1))
        if not term.needs.gradient:
            return found
        slope = jax.grad(lambda theta: losses(theta)[0])
        between = (slope(flat) + slope(theta)) / 2  # which it is for least squares
        return found._replace(gradient=unravel(between))

    return _precise(solver_of(improve, term))


def natural_gradient(
    loss: Loss,
    augment: Augment,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    micro_batch: int = 0,
    term: Term | None = None,
) -> LocalSolver:
    """One step along the natural gradient, by the client's own sketch H_m ~= U diag(lam) U^T:

        delta = -lr (H_m + damping I)^{-1} g_m = -lr (g_m - U S (S U^T U S + damping I)^{-1} S U^T g_m) / damping

    with S = diag(lam)^{1/2}. (U^T U is the identity but for rounding, of which there is some in a basis of bfloat16.)
    g_m is the gradient on all of the client's examples, each in one random view: one pass over them. A server with the
    same damping undoes it exactly, whatever the rank: sum_m w_m (H_m + beta I) delta_m = -lr sum_m w_m g_m.

    Args:
      loss: (out, batch) -> [B].
      augment: (key, batch) -> batch, of the gradient alone; a sketch sees views by `curvature.on_views`.
      weight_decay, clip_norm, micro_batch, term: of the gradient, see `client.first_order`.
    """
    term, direction = term or none(), regularised(clip_norm, weight_decay)

    def improve(work: Work, key) -> Improvement:
        params, hyper, mask = work.params, work.hyper, present(work.client)
        sketch = contracts.given(hyper.sketch, "hyper.sketch of a natural gradient")
        if not isinstance(sketch, Sketch):
            raise ValueError("hyper.sketch of a natural gradient: needed a Sketch, of a rule that asks for eigenpairs")
        gradient_of = mean_gradient(work, loss, term, mask.size, micro_batch)
        objective, mean_loss = gradient_of(params, augment(key, work.examples), mask)
        gradient, unravel = ravel_pytree(direction.update(objective, direction.init(params), params)[0])
        change = -hyper.lr * (gradient - _explained(sketch, gradient, hyper.damping)) / hyper.damping
        change = jnp.where(work.client.num_examples > 0, change, 0)
        return Improvement(unravel(change), mean_loss, objective, hyper.damping)

    return _precise(solver_of(improve, term))


def _explained(sketch: Sketch, gradient, damping) -> jax.Array:
    """[P]: U S (S U^T U S + damping I)^{-1} S U^T g, what a sketch's directions hold of the gradient [P]."""
    basis, eigenvalues = (x.astype(gradient.dtype) for x in (sketch.basis, sketch.eigenvalues))
    root = jnp.sqrt(jnp.maximum(eigenvalues, 0))
    system = root[:, None] * (basis.T @ basis) * root[None] + damping * jnp.eye(root.size, dtype=root.dtype)
    return basis @ (root * jnp.linalg.solve(system, root * (basis.T @ gradient)))


def _precise(solve: LocalSolver) -> LocalSolver:
    """Products in full precision, on parameters of at least float32: rounding is smaller than what is compared."""

    @functools.wraps(solve)
    def precisely(outputs, params, *args):
        with jax.default_matmul_precision("highest"):
            result = solve(outputs, trees.widened(contracts.floating(params, "params")), *args)
        delta = jax.tree.map(lambda change, p: change.astype(p.dtype), result.delta, params)
        return result._replace(delta=delta)

    return precisely


LOCAL_SOLVERS = {"gauss_newton": gauss_newton, "lbfgs": lbfgs, "natural_gradient": natural_gradient}
BY_CURVATURE = {"natural_gradient": ByCurvature(("sketch",), "fipa", "sketch")}
