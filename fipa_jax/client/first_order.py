"""What does a client do? It improves the broadcast parameters on its own examples, by steps along gradients.

A local solver is a `local_solver.LocalSolver`; `federation.parallel.map_clients` runs it for many clients. Those that
use curvature are in `second_order`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from fipa_jax import trees
from fipa_jax.client.examples import Client, gather, own_indices
from fipa_jax.client.layer_steps import PRECONDITIONS, Preconditioner
from fipa_jax.client.local_solver import (
    Hyper,
    Improvement,
    LocalSolver,
    MeanGradient,
    Work,
    in_micro_batches,
    mean_gradient,
    regularised,
    solver_of,
    takes_no,
)
from fipa_jax.client.terms import Term, none
from fipa_jax.curvature.contracts import Loss
from fipa_jax.derivatives import vary_with
from fipa_jax.lookup import lookup

Augment = Callable[[jax.Array, dict], dict]  # (key, {field: [B, ...]}) -> the batch in a random view


def yogi() -> optax.GradientTransformation:
    """Yogi (Zaheer et al. 2018, algorithm 2) as optax has it, with Adam's bias correction and v from 1e-6.

    But for its first moment, which starts at 0 as published: optax's starts at 1e-6, and moves where no gradient is.
    """
    rule = optax.scale_by_yogi()

    def init(params):
        state = cast(optax.ScaleByAdamState, rule.init(params))
        return state._replace(mu=optax.tree.zeros_like(params))

    return optax.GradientTransformation(init, rule.update)


Optimizer = Literal["momentum", "nesterov", "sgd", "adam", "yogi"]  # a name in `OPTIMIZERS`
MakeTransform = Callable[..., optax.GradientTransformation]
# Gradient -> direction, without the learning rate: that is traced, so that a schedule or a sweep does not recompile.
WITH_MOMENTUM: dict[str, MakeTransform] = {
    "momentum": optax.trace,
    "nesterov": functools.partial(optax.trace, nesterov=True),
}
# Linear in the gradients: their steps are weighted sums of them.
LINEAR: dict[str, MakeTransform] = WITH_MOMENTUM | {"sgd": optax.identity}
OPTIMIZERS: dict[str, MakeTransform] = LINEAR | {"adam": optax.scale_by_adam, "yogi": yogi}


def first_order(
    loss: Loss,
    augment: Augment,
    *,
    optimizer: Optimizer | Preconditioner = "sgd",
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
      optimizer: a name in `OPTIMIZERS`; its state starts anew each round. `adam` is algorithm 1 of Kingma and Ba
        (2015), `yogi` what `yogi` says, both with optax's defaults. Or one of `layer_steps.PRECONDITIONS`: plain steps
        along directions that are divided by the client's curvature.
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
    known: dict[str, MakeTransform] = OPTIMIZERS | {name: optax.identity for name in PRECONDITIONS}
    make = lookup(known, optimizer, "local.optimizer")
    precondition = PRECONDITIONS.get(optimizer, _nothing_divided)
    term = term or none()
    if micro_batch > 0 and term.whole_batch:
        raise ValueError("local.micro_batch: this term compares the batch's examples with each other; set it to 0")
    scaled = make(momentum) if optimizer in WITH_MOMENTUM else make()
    linear = optimizer in LINEAR
    tally = _tally(scaled if linear else optax.identity(), clip_norm, weight_decay if term.needs.gradient else 0.0)
    direction = optax.chain(regularised(clip_norm, weight_decay), scaled)

    def improve(work: Work, key) -> Improvement:
        hyper = work.hyper
        order_key, augment_key = jax.random.split(key)
        batches = mini_batches(order_key, work.client, hyper, batch_size, epochs, steps)
        gradient_of = mean_gradient(work, loss, term, batches.size, micro_batch)
        shaped = precondition(hyper)

        def step(s, carry):
            theta, state, order, total, entries = carry
            order, chosen, mask = batches.following(s, order)
            examples = augment(jax.random.fold_in(augment_key, s), gather(work.data, chosen))
            gradient, mean_loss = gradient_of(theta, examples, mask)
            update, state = direction.update(gradient, state, theta)
            entries = tally.add(entries, gradient, theta)
            theta = jax.tree.map(lambda p, u: (p - hyper.lr * u).astype(p.dtype), theta, shaped(update))
            return theta, state, order, total + mean_loss, entries

        zero = jnp.zeros([], trees.ravel(trees.widened(work.params)).dtype)
        start = (work.params, direction.init(work.params), batches.in_order, zero, tally.init(work.params))
        theta, _, _, total, entries = jax.lax.fori_loop(0, batches.steps, step, vary_with(start, work.params))
        found = Improvement(optax.tree.sub(theta, work.params), total / jnp.maximum(batches.steps, 1))
        if linear:
            pull = weight_decay + (hyper.mu if term.pulls else 0.0)
            return _told_by(entries, found, hyper.lr, pull, term.needs.gradient)
        return found._replace(gradient=_at_broadcast(work, gradient_of, batches.size)) if term.needs.gradient else found

    return solver_of(improve, term)


def _nothing_divided(hyper: Hyper) -> Callable[[Any], Any]:
    """What leaves directions as they are."""
    return lambda update: update


class Entries(NamedTuple):
    """What the steps of a linear optimiser are made of; a step's direction is sum_k a_k (s_k g_k + decay theta_k)."""

    state: Any  # the optimiser's, on the entries
    weight: jax.Array  # [], sum of all a_k s_k so far, s_k what clipping leaves of the gradient g_k
    decay: Any  # sum of all a_k decay theta_k so far; () for none


class Tally(NamedTuple):
    """How `Entries` come about."""

    init: Callable[[Any], Entries]  # params -> no entries
    add: Callable[[Entries, Any, Any], Entries]  # (entries, gradient, params) -> entries, after one more step


def _tally(optimizer: optax.GradientTransformation, clip_norm: float, weight_decay: float) -> Tally:
    """What all gradients count in the move together, by the optimiser itself run on s_k and on decay theta_k.

    With momentum b and n steps sum_k a_k is (n - b (1 - b^n) / (1 - b)) / (1 - b); with Nesterov's, as optax has it, a
    gradient's a_k counts one step more: (n - b^2 (1 - b^n) / (1 - b)) / (1 - b).
    """

    def entry(gradient, params):
        kept = clip_norm / jnp.maximum(optax.tree.norm(gradient), clip_norm) if clip_norm else jnp.ones([])
        return kept.astype(_precision(params)), optax.tree.scale(weight_decay, params) if weight_decay else ()

    def init(params):
        blank = jnp.zeros([], _precision(params)), optax.tree.zeros_like(params) if weight_decay else ()
        return Entries(optimizer.init(blank), *blank)

    def add(entries, gradient, params):
        taken, state = optimizer.update(entry(gradient, params), entries.state)
        return Entries(state, *optax.tree.add((entries.weight, entries.decay), taken))

    return Tally(init, add)


def _precision(params):
    """The parameters' own, and float32 at least: a count must not stop at 256."""
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)


def _told_by(entries: Entries, found: Improvement, lr, pull, gradient: bool) -> Improvement:
    """What a linear optimiser's client has found, with its damping and, if wanted, the mean of its gradients.

    Its delta is -lr (weighted sum of gradients + entries.decay), the weights sum to entries.weight, and beside the loss
    its objective holds pull/2 |theta|^2 or pull/2 |theta - broadcast|^2.
    """
    travelled = jnp.where(entries.weight > 0, entries.weight, 1) * lr
    # So much descent is (1 - e^{-travelled lam}) / lam times the gradient, about 1 / (lam + 1 / travelled).
    found = found._replace(damping=trees.ratio(1, travelled) + pull)
    if not gradient:
        return found
    moved = found.delta if entries.decay == () else jax.tree.map(lambda d, w: d + lr * w, found.delta, entries.decay)
    return found._replace(gradient=jax.tree.map(lambda d: (-trees.ratio(d, travelled)).astype(d.dtype), moved))


def _at_broadcast(work: Work, gradient_of: MeanGradient, batch: int) -> Any:
    """The gradient of the client's objective at the broadcast parameters, over all of its examples as they are."""
    size = work.client.indices.shape[0]
    position = jnp.arange(size + -size % batch)
    examples = gather(work.data, own_indices(work.client)[jnp.minimum(position, size - 1)])
    of_all = in_micro_batches(gradient_of, position.size // batch)
    return of_all(work.params, examples, position < work.client.num_examples)[0]


def _number_of_steps(client: Client, hyper: Hyper, default):
    """[] int32: the steps that a client takes, the solver's own number by default, unless `hyper` says otherwise.

    An empty client takes no step at all; a client's trip count is its own, so small clients cost little.
    """
    wanted = jnp.where(hyper.steps > 0, hyper.steps, default)
    if hyper.part is not None:
        wanted = jnp.ceil(hyper.part * wanted).astype(jnp.int32)
    return jnp.where(client.num_examples > 0, wanted, 0)


class Batches(NamedTuple):
    """A client's mini-batches of a round."""

    size: int  # B
    steps: jax.Array  # [] int32, how many it takes
    in_order: jax.Array  # [N'], the order to start with; N' is N, padded, rounded up to whole batches
    following: Callable[..., tuple]  # (step, order) -> (order, indices [B] into the data, mask [B])


def mini_batches(key, client: Client, hyper: Hyper, batch_size: int, epochs: int, steps: int) -> Batches:
    """A client's examples in mini-batches, shuffled anew in every epoch.

    Args:
      key: of the orders.
      batch_size, epochs, steps: see `first_order`.
    """
    size = client.indices.shape[0]
    batch = min(batch_size or size, size)
    per_epoch = jnp.maximum((client.num_examples + batch - 1) // batch, 1)
    in_order = jnp.arange(size + -size % batch)

    def shuffle(epoch):
        """Positions of the client's examples in a random order, those of the padding behind them."""
        draw = jax.random.uniform(jax.random.fold_in(key, epoch), in_order.shape)
        own_first = jnp.where(in_order < client.num_examples, draw, 2.0)
        return vary_with(jnp.argsort(own_first), own_first)

    def following(step, order):
        epoch, first = step // per_epoch, step % per_epoch * batch
        if batch < size:
            order = jax.lax.cond(first == 0, shuffle, lambda _: order, epoch)
        position = first + jnp.arange(batch)
        chosen = jax.lax.dynamic_slice(order, (first,), (batch,))
        return order, own_indices(client)[jnp.minimum(chosen, size - 1)], position < client.num_examples

    number = _number_of_steps(client, hyper, steps if steps else epochs * per_epoch)
    return Batches(batch, number, in_order, following)


def gradient(
    loss: Loss,
    augment: Augment,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    micro_batch: int = 0,
    term: Term | None = None,
) -> LocalSolver:
    """Minus the gradient of the client's objective at the broadcast parameters, over all of its examples.

    What FIPA from sums wants in its gradient form; under `mean` it is gradient descent at the server's learning rate.

    Args:
      loss, weight_decay, micro_batch, term: see `first_order`.
      augment: (key, batch) -> batch: the examples are seen in one random view each.
      clip_norm: not taken: a clipped gradient is none.

    Raises:
      ValueError: a bound on the norm is asked for.
    """
    takes_no("gradient", clip_norm=clip_norm)
    term = term or none()

    def improve(work: Work, key) -> Improvement:
        size = work.client.indices.shape[0]
        gradient_of = mean_gradient(work, loss, term, size, micro_batch)
        mask = jnp.arange(size) < work.client.num_examples
        examples = augment(key, gather(work.data, own_indices(work.client)))
        slope, mean_loss = gradient_of(work.params, examples, mask)
        whole = optax.tree.add_scale(slope, weight_decay, work.params) if weight_decay else slope
        return Improvement(optax.tree.scale(-1, whole), mean_loss, gradient=slope)

    return solver_of(improve, term)


LOCAL_SOLVERS = {name: first_order for name in (*OPTIMIZERS, *PRECONDITIONS)}
