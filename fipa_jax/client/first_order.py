"""What does a client do? It improves the broadcast parameters on its own examples, by steps along gradients.

A local solver is a `local_solver.LocalSolver`; `federation.parallel.map_clients` runs it for many clients. Those that
use curvature are in `second_order`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.client.examples import Client, gather, own_indices
from fipa_jax.client.local_solver import Hyper, Improvement, LocalSolver, Work, mean_gradient, regularised, solver_of
from fipa_jax.client.terms import Term, none
from fipa_jax.curvature.contracts import Loss
from fipa_jax.lookup import lookup

Augment = Callable[[jax.Array, dict], dict]  # (key, {field: [B, ...]}) -> the batch in a random view

# Gradient -> direction, without the learning rate: that is traced, so that a schedule or a sweep does not recompile.
WITH_MOMENTUM = {"momentum": optax.trace, "nesterov": functools.partial(optax.trace, nesterov=True)}
WITHOUT_MOMENTUM = {"adam": optax.scale_by_adam, "sgd": optax.identity, "yogi": optax.scale_by_yogi}
OPTIMIZERS = WITH_MOMENTUM | WITHOUT_MOMENTUM


def first_order(
    loss: Loss,
    augment: Augment,
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
) -> LocalSolver:
    """Local epochs (or steps) of a first-order method on shuffled mini-batches.

    Args:
      loss: (out, batch) -> [B].
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
    make = lookup(OPTIMIZERS, optimizer, "local.optimizer")
    term = term or none()
    if micro_batch > 0 and term.whole_batch:
        raise ValueError("local.micro_batch: this term compares the batch's examples with each other; set it to 0")
    scaled = make(momentum) if optimizer in WITH_MOMENTUM else make()
    direction = optax.chain(regularised(clip_norm, weight_decay), scaled)

    def improve(work: Work, key) -> Improvement:
        client, hyper, size = work.client, work.hyper, work.client.indices.shape[0]
        batch = min(batch_size or size, size)
        per_epoch = jnp.maximum((client.num_examples + batch - 1) // batch, 1)
        num_steps = _number_of_steps(client, hyper, steps if steps else epochs * per_epoch)
        order_key, augment_key = jax.random.split(key)
        in_order, next_batch = _mini_batches(order_key, client, batch, per_epoch)
        gradient_of = mean_gradient(work, loss, term, batch, micro_batch)

        def step(s, carry):
            theta, state, order, total = carry
            order, chosen, mask = next_batch(s, order)
            examples = augment(jax.random.fold_in(augment_key, s), gather(work.data, chosen))
            gradient, mean_loss = gradient_of(theta, examples, mask)
            update, state = direction.update(gradient, state, theta)
            theta = jax.tree.map(lambda p, u: (p - hyper.lr * u).astype(p.dtype), theta, update)
            return theta, state, order, total + mean_loss

        zero = jnp.zeros([], trees.ravel(trees.widened(work.params)).dtype)
        start = (work.params, direction.init(work.params), in_order, zero)
        theta, _, _, total = jax.lax.fori_loop(0, num_steps, step, start)
        delta = optax.tree.sub(theta, work.params)
        travelled = jnp.maximum(num_steps, 1) * hyper.lr
        # So much descent is (1 - e^{-travelled lam}) / lam times the gradient, about 1 / (lam + 1 / travelled).
        return Improvement(delta, total / jnp.maximum(num_steps, 1), travelled, damping=trees.ratio(1, travelled))

    return solver_of(improve, term)


def _number_of_steps(client: Client, hyper: Hyper, default):
    """[] int32: the steps that a client takes, the solver's own number by default, unless `hyper` says otherwise.

    An empty client takes no step at all; a client's trip count is its own, so small clients cost little.
    """
    wanted = jnp.where(hyper.steps > 0, hyper.steps, default)
    if hyper.part is not None:
        wanted = jnp.ceil(hyper.part * wanted).astype(jnp.int32)
    return jnp.where(client.num_examples > 0, wanted, 0)


def _mini_batches(key, client: Client, batch: int, per_epoch):
    """A client's examples in mini-batches, shuffled anew in every epoch.

    Args:
      key: of the orders.
      batch: B.
      per_epoch: [], the batches of an epoch.

    Returns:
      (the order to start with [N'], (step, order) -> (order, indices [B] into the data, mask [B])); N' is the padded
      number of examples, rounded up to whole batches.
    """
    size = client.indices.shape[0]
    in_order = jnp.arange(size + -size % batch)

    def shuffle(epoch):
        """Positions of the client's examples in a random order, those of the padding behind them."""
        draw = jax.random.uniform(jax.random.fold_in(key, epoch), in_order.shape)
        return jnp.argsort(jnp.where(in_order < client.num_examples, draw, 2.0))

    def next_batch(step, order):
        epoch, first = step // per_epoch, step % per_epoch * batch
        if batch < size:
            order = jax.lax.cond(first == 0, shuffle, lambda _: order, epoch)
        position = first + jnp.arange(batch)
        chosen = jax.lax.dynamic_slice(order, (first,), (batch,))
        return order, own_indices(client)[jnp.minimum(chosen, size - 1)], position < client.num_examples

    return in_order, next_batch


LOCAL_SOLVERS = {name: first_order for name in OPTIMIZERS}
