"""What does a client do? It improves the broadcast parameters on its own examples.

A local solver is `solve(outputs, params, data, client, key, hyper, memory, shared) -> LocalResult`: one client, pure,
jittable; `simulate.map_clients` runs it for many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import curvature
from fipa_jax.simulate import Client, gather, present
from fipa_jax.terms import Done, Local, Term, none

# Gradient -> direction, without the learning rate: that is traced, so that a schedule or a sweep does not recompile.
OPTIMIZERS = {
    "sgd": lambda momentum: optax.identity(),
    "momentum": lambda momentum: optax.trace(momentum),
    "nesterov": lambda momentum: optax.trace(momentum, nesterov=True),
    "adam": lambda momentum: optax.scale_by_adam(),
    "yogi": lambda momentum: optax.scale_by_yogi(),
}


TRIES = 10  # dampings that a Gauss-Newton step tries


class Hyper(NamedTuple):
    """Hyper-parameters of local work that are traced."""

    lr: jax.Array  # []
    damping: jax.Array  # [], of the Gauss-Newton step
    mu: jax.Array  # [], weight of the term


class LocalResult(NamedTuple):
    """What a client has after its local work."""

    delta: Any  # new minus broadcast parameters
    memory: Any  # of the term
    loss: jax.Array  # [], mean training loss over its steps


def first_order(
    loss: Callable,
    augment: Callable,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    batch_size: int = 50,
    epochs: int = 1,
    steps: int = 0,
    term: Term | None = None,
) -> Callable:
    """Local epochs (or steps) of a first-order method on shuffled mini-batches.

    Args:
      loss: (outputs, batch) -> [B].
      augment: (key, batch) -> batch.
      optimizer: a name in `OPTIMIZERS`; its state starts anew each round.
      momentum: of the optimisers `momentum` and `nesterov`.
      weight_decay: added to the gradient after clipping, as weight_decay * params.
      clip_norm: bound on the gradient's norm; 0 for none.
      batch_size: B; an epoch's last batch may be smaller. 0 takes all of the client's examples at once.
      epochs: passes over the client's own examples.
      steps: number of steps instead of epochs, where positive.
      term: additive term of the objective.

    Raises:
      ValueError: the optimiser is not known.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"local.optimizer: unknown optimizer {optimizer!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    term = term or none()
    direction = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        OPTIMIZERS[optimizer](momentum),
    )

    def solve(outputs, params, data, client: Client, key, hyper: Hyper, memory, shared) -> LocalResult:
        size = client.indices.shape[0]
        batch = min(batch_size or size, size)
        per_epoch = jnp.maximum((client.num_examples + batch - 1) // batch, 1)
        # An empty client takes no step at all; a client's trip count is its own, so small clients cost little.
        num_steps = jnp.where(client.num_examples > 0, steps if steps else epochs * per_epoch, 0)
        order_key, augment_key = jax.random.split(key)
        in_order = jnp.arange(size + -size % batch)

        def shuffle(epoch):
            """Positions of the client's examples in a random order, those of the padding behind them."""
            draw = jax.random.uniform(jax.random.fold_in(order_key, epoch), in_order.shape)
            return jnp.argsort(jnp.where(in_order < client.num_examples, draw, 2.0))

        def objective(theta, examples, mask):
            out, features = outputs(theta, examples)
            mean_loss = jnp.sum(jnp.where(mask, loss(out, examples), 0)) / jnp.maximum(jnp.sum(mask), 1)
            there = present(client)
            own = lambda field: data[field][client.indices]
            at = Local(theta, params, memory, shared, hyper.mu, examples, mask, out, features, outputs, own, there)
            penalty = term.penalty(at)
            return mean_loss + penalty, mean_loss

        def step(s, carry):
            theta, opt_state, order, total = carry
            epoch, first = s // per_epoch, s % per_epoch * batch
            if batch < size:
                order = jax.lax.cond(first == 0, shuffle, lambda _: order, epoch)
            position = first + jnp.arange(batch)
            chosen = jax.lax.dynamic_slice(order, (first,), (batch,))
            examples = gather(data, client.indices[jnp.minimum(chosen, size - 1)])
            examples = augment(jax.random.fold_in(augment_key, s), examples)
            gradient, mean_loss = jax.grad(objective, has_aux=True)(theta, examples, position < client.num_examples)
            update, opt_state = direction.update(gradient, opt_state, theta)
            theta = jax.tree.map(lambda p, u: (p - hyper.lr * u).astype(p.dtype), theta, update)
            return theta, opt_state, order, total + mean_loss

        zero = jnp.zeros([], ravel_pytree(params)[0].dtype)
        start = (params, direction.init(params), in_order, zero)
        theta, _, _, total = jax.lax.fori_loop(0, num_steps, step, start)
        delta = optax.tree.sub(theta, params)
        travelled = jnp.maximum(num_steps, 1) * hyper.lr
        memory = term.update(Done(memory, shared, params, delta, travelled, hyper.mu))
        return LocalResult(delta, memory, total / jnp.maximum(num_steps, 1))

    return solve


def gauss_newton(
    loss: Callable,
    augment: Callable,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    epochs: int = 1,
    steps: int = 0,
    term: Term | None = None,
) -> Callable:
    """Levenberg-Marquardt Gauss-Newton steps on all of the client's examples, for small regression tasks.

        delta = -(J^T L J / N + damping I)^{-1} J^T e / N = -J^T (L J J^T / N + damping I)^{-1} e / N

    e are the loss's gradients in the outputs [N K], J the Jacobian's rows [N K, P]. The right-hand form (push-through
    identity) solves one [N K, N K] system and never forms [P, P]. Each step is scaled by the learning rate. Where it
    would raise the client's loss, it is tried again with ten times the damping (Marquardt 1963); after `TRIES` of that
    the client stays where it is. Mini-batches and augmentation do not enter.

    Args:
      loss: (outputs, batch) -> [B].
      epochs, steps: re-linearised steps a round; an epoch is one step, as it takes all examples.

    Raises:
      ValueError: a term, weight decay or clipping is asked for.
    """
    if weight_decay or clip_norm:
        raise ValueError(
            "local.optimizer = 'gauss_newton' takes no local.weight_decay and no local.clip_norm: set both to 0"
        )
    if term not in (None, none()):
        raise ValueError("local.optimizer = 'gauss_newton' takes no term: set term.name = 'none'")
    steps = steps or epochs

    def solve(outputs, params, data, client: Client, key, hyper: Hyper, memory, shared) -> LocalResult:
        examples, mask = gather(data, client.indices), present(client)
        flat, unravel = ravel_pytree(params)
        weight = mask.astype(flat.dtype) / jnp.maximum(client.num_examples, 1)
        predict = lambda params, batch: outputs(params, batch)[0]
        mean_loss = lambda theta: jnp.sum(weight * loss(predict(unravel(theta), examples), examples))

        def linearise(theta):
            """damping -> the step, from one Jacobian and one Gram matrix."""
            out = predict(unravel(theta), examples)
            gradient, hessian = curvature.loss_derivatives(loss, out, examples, weight)
            rows = curvature.jacobian_rows(predict, unravel(theta), examples)  # [N, K, P]
            num_outputs, rows = rows.shape[1], rows.reshape(-1, theta.size)
            curve = jax.vmap(lambda tangent: ravel_pytree(hessian(tangent))[0], in_axes=-1, out_axes=-1)
            with jax.default_matmul_precision("highest"):
                system = curve((rows @ rows.T).reshape(*out.shape, -1))
            # A padded example's equation reads 0 = 0: with a one on the diagonal it can be solved.
            padding = jnp.repeat(~mask, num_outputs).astype(theta.dtype)

            def step_for(damping):
                with jax.default_matmul_precision("highest"):
                    solution = jnp.linalg.solve(system + jnp.diag(damping + padding), gradient.reshape(-1))
                    return -hyper.lr * (solution @ rows)

            return step_for, jnp.trace(system) * jnp.finfo(theta.dtype).eps

        def improve(_, carry):
            theta, total = carry
            before = mean_loss(theta)
            step_for, least = linearise(theta)

            def again(attempt):
                damping, _, tries = attempt
                damping = jnp.where(tries == 0, damping, jnp.maximum(10 * damping, least))
                return damping, step_for(damping), tries + 1

            # NaN compares false, and so is no improvement.
            worse = lambda step: ~(mean_loss(theta + step) <= before)
            failed = lambda attempt: (attempt[2] == 0) | ((attempt[2] < TRIES) & worse(attempt[1]))
            start = (hyper.damping, jnp.zeros_like(theta), 0)
            _, step, _ = jax.lax.while_loop(failed, again, start)
            return jnp.where(worse(step), theta, theta + step), total + before

        theta, total = jax.lax.fori_loop(0, steps, improve, (flat, jnp.zeros([], flat.dtype)))
        return LocalResult(unravel(theta - flat), memory, total / steps)

    return solve


LOCAL_SOLVERS = {**{name: first_order for name in OPTIMIZERS}, "gauss_newton": gauss_newton}
