"""What does a client do? It improves the broadcast parameters on its own examples.

A local solver is `solve(outputs, params, data, client, key, hyper, memory, shared) -> LocalResult`: one client, pure,
jittable; `simulate.map_clients` runs it for many. Those that use curvature are in `second_order`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.client.examples import Client, gather
from fipa_jax.client.local_work import Hyper, LocalResult, in_micro_batches, make_objective, micro_batch_of, regularised
from fipa_jax.client.terms import Done, Term, none

# Gradient -> direction, without the learning rate: that is traced, so that a schedule or a sweep does not recompile.
OPTIMIZERS = {
    "sgd": lambda momentum: optax.identity(),
    "momentum": lambda momentum: optax.trace(momentum),
    "nesterov": lambda momentum: optax.trace(momentum, nesterov=True),
    "adam": lambda momentum: optax.scale_by_adam(),
    "yogi": lambda momentum: optax.scale_by_yogi(),
}


def first_order(
    loss: Callable,
    augment: Callable,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    batch_size: int = 50,
    micro_batch: int = 0,
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
      micro_batch: examples whose gradients are computed at a time, as many as divide the batch; 0 for all, -1 for what
        suits the backend: a few on a CPU, whose cache then holds their activations. The gradient is the same but for
        rounding.
      epochs: passes over the client's own examples.
      steps: number of steps instead of epochs, where positive.
      term: additive term of the objective.

    Raises:
      ValueError: the optimiser is not known; micro-batches with a term that needs the whole batch.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"local.optimizer: unknown optimizer {optimizer!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    term = term or none()
    if micro_batch > 0 and term.whole_batch:
        raise ValueError("local.micro_batch: this term compares the batch's examples with each other; set it to 0")
    direction = optax.chain(regularised(clip_norm, weight_decay), OPTIMIZERS[optimizer](momentum))

    def solve(outputs, params, data, client: Client, key, hyper: Hyper, memory, shared) -> LocalResult:
        size = client.indices.shape[0]
        batch = min(batch_size or size, size)
        per_epoch = jnp.maximum((client.num_examples + batch - 1) // batch, 1)
        # An empty client takes no step at all; a client's trip count is its own, so small clients cost little.
        wanted = jnp.where(hyper.steps > 0, hyper.steps, steps if steps else epochs * per_epoch)
        if hyper.part is not None:
            wanted = jnp.ceil(hyper.part * wanted).astype(jnp.int32)
        num_steps = jnp.where(client.num_examples > 0, wanted, 0)
        order_key, augment_key = jax.random.split(key)
        in_order = jnp.arange(size + -size % batch)

        def shuffle(epoch):
            """Positions of the client's examples in a random order, those of the padding behind them."""
            draw = jax.random.uniform(jax.random.fold_in(order_key, epoch), in_order.shape)
            return jnp.argsort(jnp.where(in_order < client.num_examples, draw, 2.0))

        objective = make_objective(outputs, loss, term, params, data, client, hyper, memory, shared)
        at_a_time = batch if term.whole_batch else micro_batch_of(micro_batch, batch)
        descent = in_micro_batches(jax.grad(objective, has_aux=True), batch // at_a_time)

        def step(s, carry):
            theta, opt_state, order, total = carry
            epoch, first = s // per_epoch, s % per_epoch * batch
            if batch < size:
                order = jax.lax.cond(first == 0, shuffle, lambda _: order, epoch)
            position = first + jnp.arange(batch)
            chosen = jax.lax.dynamic_slice(order, (first,), (batch,))
            examples = gather(data, client.indices[jnp.minimum(chosen, size - 1)])
            examples = augment(jax.random.fold_in(augment_key, s), examples)
            gradient, mean_loss = descent(theta, examples, position < client.num_examples)
            update, opt_state = direction.update(gradient, opt_state, theta)
            theta = jax.tree.map(lambda p, u: (p - hyper.lr * u).astype(p.dtype), theta, update)
            return theta, opt_state, order, total + mean_loss

        zero = jnp.zeros([], ravel_pytree(params)[0].dtype)
        start = (params, direction.init(params), in_order, zero)
        theta, _, _, total = jax.lax.fori_loop(0, num_steps, step, start)
        delta = optax.tree.sub(theta, params)
        travelled = jnp.maximum(num_steps, 1) * hyper.lr
        memory = term.update(Done(memory, shared, params, delta, travelled, hyper.mu))
        # So much descent is (1 - e^{-travelled lam}) / lam times the gradient, about 1 / (lam + 1 / travelled).
        damping = trees.ratio(1, travelled)
        return LocalResult(delta, memory, total / jnp.maximum(num_steps, 1), damping=damping)

    return solve


LOCAL_SOLVERS = {name: first_order for name in OPTIMIZERS}
