"""What does a client do? It improves the broadcast parameters on its own examples.

A local solver is `solve(outputs, params, data, client, key, hyper, memory, shared) -> LocalResult`: one client, pure,
jittable; `simulate.map_clients` runs it for many. Those that use curvature are in `second_order`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.simulate import Client, gather, masked_mean, present
from fipa_jax.sketch import Sketch
from fipa_jax.terms import Done, Local, Term, none

FEW = 5  # examples whose activations in a small network stay in a core's cache
# Gradient -> direction, without the learning rate: that is traced, so that a schedule or a sweep does not recompile.
OPTIMIZERS = {
    "sgd": lambda momentum: optax.identity(),
    "momentum": lambda momentum: optax.trace(momentum),
    "nesterov": lambda momentum: optax.trace(momentum, nesterov=True),
    "adam": lambda momentum: optax.scale_by_adam(),
    "yogi": lambda momentum: optax.scale_by_yogi(),
}


class Hyper(NamedTuple):
    """Hyper-parameters of local work that are traced."""

    lr: jax.Array  # []
    damping: jax.Array  # [], of the Gauss-Newton step or the natural gradient
    mu: jax.Array  # [], weight of the term
    steps: jax.Array | int = 0  # [] int32, local steps, where positive, instead of the solver's own number
    sketch: Sketch | None = None  # the client's own, where the solver asks for it
    part: jax.Array | None = None  # [] in (0, 1], the share of the steps after which a first-order solver stops


class LocalResult(NamedTuple):
    """What a client has after its local work."""

    delta: Any  # new minus broadcast parameters
    memory: Any  # of the term
    loss: jax.Array  # [], mean training loss over its steps
    before: Any = ()  # [], mean loss over its examples at the broadcast parameters, where the rule asks for it
    damping: Any = ()  # [], beta_m of (H_m + beta_m I) delta = -gradient, nearly, where the rule asks for it
    age: Any = ()  # [] int32, rounds ago at which it started, where clients may be late
    faults: Any = ()  # `faults.Faults`, what goes wrong with the upload, where faults are injected


def make_objective(outputs, loss, term: Term, params, data, client: Client, hyper: Hyper, memory, shared) -> Callable:
    """Builds `objective(theta, examples, mask) -> (mean loss + the term's penalty, mean loss)` of a client.

    The means are over the mask's examples; the arguments are those of a local solver.
    """
    there = present(client)
    own = lambda field: data[field][client.indices]

    def objective(theta, examples, mask):
        out, features = outputs(theta, examples)
        mean_loss = masked_mean(loss(out, examples), mask)
        at = Local(theta, params, memory, shared, hyper.mu, examples, mask, out, features, outputs, own, there)
        return mean_loss + term.penalty(at), mean_loss

    return objective


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


def regularised(clip_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """Clips a gradient's norm, and adds weight_decay * params; 0 for neither."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
    )


def in_micro_batches(gradient: Callable, number: int) -> Callable:
    """`gradient(theta, examples, mask) -> (gradient, mean loss)`, as a sum over so many micro-batches."""
    if number == 1:
        return gradient

    def summed(theta, examples, mask):
        parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), (examples, mask))
        shares = jnp.sum(parts[1], axis=1) / jnp.maximum(jnp.sum(mask), 1)

        def add(total, part):
            given, share = part
            found = gradient(theta, *given)
            return jax.tree.map(lambda t, g: (t + share * g).astype(t.dtype), total, found), None

        blank = jax.tree.map(jnp.zeros_like, theta), jnp.zeros([], ravel_pytree(theta)[0].dtype)
        return jax.lax.scan(add, blank, (parts, shares))[0]

    return summed


def micro_batch_of(wanted: int, batch: int) -> int:
    """The largest divisor of the batch that is at most as wanted; as suits the backend, the nearest to a few."""
    divisors = [m for m in range(1, batch + 1) if batch % m == 0]
    if wanted < 0 and jax.default_backend() == "cpu":
        return min((m for m in divisors if 2 * m > FEW), key=lambda m: abs(m - FEW), default=batch)
    return max(m for m in divisors if m <= (wanted if wanted > 0 else batch))


def steps_for(least: jax.Array, lr: jax.Array, scale: float, most: int) -> jax.Array:
    """tau = ceil(c / -ln(1 - lr lam_min)), between 1 and `most`: the published rule for the number of local steps.

    After tau steps of gradient descent the error in the weakest direction kept has shrunk by a factor of e^{-c}.

    Args:
      least: [], lam_min, see `sketch.smallest`.
      lr: [].
      scale: c.
      most: the bound.
    """
    rate = -jnp.log1p(-jnp.clip(lr * least, 0, 1))  # infinite where one step does it
    steps = scale / jnp.maximum(rate, jnp.finfo(least.dtype).tiny)
    return jnp.clip(jnp.ceil(steps), 1, most).astype(jnp.int32)


LOCAL_SOLVERS = {name: first_order for name in OPTIMIZERS}
