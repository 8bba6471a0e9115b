"""Which models fit a client's data, not only which one? IVON learns a Gaussian over them, by steps like Adam's.

A client's belief is N(m, 1 / (N s)) with a mean m and a precision s of each parameter, per example of N. Improved
Variational Online Newton (IVON, Shen et al. 2024, arXiv 2402.17641, algorithm 1) draws theta = m + noise, takes the
gradient g there, and reads the curvature off it:

    hhat = g noise / sigma^2,   h <- b2 h + (1 - b2) hhat + (1 - b2)^2 (h - hhat)^2 / (2 (h + d)),   sigma^2 = 1 / (N s)
    m <- m - lr (gbar + linear + d m) / (h + d),   s = (h + d) / rho

with gbar the debiased mean of gradients. With d the weight decay, linear = 0 and rho = 1 that is IVON. In ADMM's form
(arXiv 2506.13150), with the server's belief (mbar, sbar) and a client's duals (v, u), d = rho sbar - u and
linear = v - rho sbar mbar: it minimises E[loss] + <duals, moments> + rho KL(own belief, server's belief) / N.

Of IVON-ADMM the structure is followed: duals for mean and precision, natural parameters that add up, one round on
quadratic losses. Its pseudocode was not at hand. Ours are what is derived from that objective: the belief with which a
client begins (the server's mean, its own dual u for a curvature), one N for all clients (of those who took part last),
and what the server does in `aggregate.posteriors`. Published step sizes and settings may not carry over.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import trees
from fipa_jax.client.examples import gather
from fipa_jax.client.first_order import Augment, mini_batches
from fipa_jax.client.local_solver import (
    Hyper,
    Improvement,
    LocalSolver,
    Work,
    mean_gradient,
    regularised,
    solver_of,
    takes_no,
)
from fipa_jax.client.terms import Term, none
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Loss, Number
from fipa_jax.curvature.sketch import Diagonal
from fipa_jax.derivatives import vary_with


class IvonState(NamedTuple):
    """What IVON keeps between steps; `linear`, `offset` and `rho` say which of the two forms it is."""

    count: jax.Array  # [] int32
    momentum: Any  # of the parameters' shapes, mean gradient
    curvature: Any  # h
    noise: Any  # of the last draw
    offset: Any  # d
    linear: Any
    size: jax.Array  # [], N
    rho: jax.Array  # []


def scale_by_ivon(
    size: Number, weight_decay: Number = 1e-3, curvature: Number = 0.1, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """IVON as an optax transform: gradients at a `draw` become directions, without the learning rate, as of Adam.

    Example:
      rule = scale_by_ivon(size=1000)
      state = rule.init(mean)
      theta, state = draw(key, mean, state)
      direction, state = rule.update(gradient_at(theta), state, mean)

    Args:
      size: N, examples.
      weight_decay: d, of the mean loss: N d is the precision of the prior about 0.
      curvature: h to begin with.
      b1, b2: of the means of gradients and of curvature. Published b2 is 0.99999; a client takes fewer steps.
    """

    def init(params):
        blank, dtype = optax.tree.zeros_like(params), trees.ravel(params).dtype
        filled = (optax.tree.full_like(params, value) for value in (curvature, 0.0, weight_decay, 0.0))
        h, noise, offset, linear = filled
        numbers = jnp.asarray(size, dtype), jnp.ones([], dtype)
        return IvonState(jnp.int32(0), blank, h, noise, offset, linear, *numbers)

    def update(updates, state, params=None):
        count = state.count + 1
        variance = variance_of(state)

        def curved(h, g, noise, d, var):
            seen = g * noise / var
            return b2 * h + (1 - b2) * seen + (1 - b2) ** 2 * (h - seen) ** 2 / (2 * (h + d))

        curvature = jax.tree.map(curved, state.curvature, updates, state.noise, state.offset, variance)
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, updates)
        debias = 1 - b1 ** count.astype(state.size.dtype)

        def direction(g, theta, h, d, linear):
            return (g / debias + linear + d * theta) / (h + d)

        step = jax.tree.map(direction, momentum, params, curvature, state.offset, state.linear)
        return step, state._replace(count=count, momentum=momentum, curvature=curvature)

    return optax.GradientTransformation(init, update)


def variance_of(state: IvonState) -> Any:
    """sigma^2 = 1 / (N s) of every parameter."""
    return jax.tree.map(lambda h, d: state.rho / (state.size * (h + d)), state.curvature, state.offset)


def draw(key: jax.Array, params: Any, state: IvonState) -> tuple[Any, IvonState]:
    """(parameters drawn from the belief, the state that remembers by how much they differ from the mean)."""
    scale, unravel = ravel_pytree(jax.tree.map(jnp.sqrt, variance_of(state)))
    noise = unravel(scale * jax.random.normal(key, scale.shape, scale.dtype))
    return optax.tree.add(params, noise), state._replace(noise=noise)


class Posterior(NamedTuple):
    """What the server tells clients of its belief; a field of `local_solver.Hyper`."""

    precision: jax.Array  # [P], sbar, per example
    prior: jax.Array  # [], of the prior about 0, per example
    size: jax.Array  # [], N, examples of all who took part last; 0 before
    rho: jax.Array  # [], the step of ADMM's duals


def duals() -> Term:
    """What clients of ADMM's form keep: the duals (v, u) of mean and precision, zeros at first, see `ivon`."""
    return Term(init=lambda params: {"mean": optax.tree.zeros_like(params), "precision": optax.tree.zeros_like(params)})


def ivon(
    loss: Loss,
    augment: Augment,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    batch_size: int = 50,
    micro_batch: int = 0,
    epochs: int = 1,
    steps: int = 0,
    term: Term | None = None,
) -> LocalSolver:
    """Local epochs of IVON from the belief of the server; the client sends its update and its precision, a `Diagonal`.

    FedIvon (Pal et al. 2024) where the term keeps nothing; with the term `duals` IVON-ADMM (arXiv 2506.13150), whose
    client then moves its duals by rho times the difference of its natural parameters to the server's:

        v <- v + rho (s m - sbar mbar),   u <- u + rho (s - sbar)

    Args: see `first_order.first_order`; no weight decay is taken, as the belief has a prior of its own.

    Raises:
      ValueError: a weight decay, or another term than `duals` that keeps something.
    """
    takes_no("ivon", weight_decay=weight_decay)
    term = term or none()
    clipped = regularised(clip_norm, 0.0)

    def improve(work: Work, key) -> Improvement:
        client = work.client
        order_key, augment_key, noise_key = jax.random.split(key, 3)
        batches = mini_batches(order_key, client, work.hyper, batch_size, epochs, steps)
        gradient_of = mean_gradient(work, loss, term, batches.size, micro_batch)
        rule = scale_by_ivon(1.0)
        start = begun(cast(IvonState, rule.init(work.params)), work.hyper, work.params, work.store, client.num_examples)

        def step(s, carry):
            mean, state, order, total = carry
            order, chosen, mask = batches.following(s, order)
            examples = augment(jax.random.fold_in(augment_key, s), gather(work.data, chosen))
            theta, state = draw(jax.random.fold_in(noise_key, s), mean, state)
            gradient, mean_loss = gradient_of(theta, examples, mask)
            gradient = clipped.update(gradient, clipped.init(mean))[0]
            update, state = rule.update(gradient, state, mean)
            mean = jax.tree.map(lambda p, u: (p - work.hyper.lr * u).astype(p.dtype), mean, update)
            return mean, state, order, total + mean_loss

        zero = jnp.zeros([], trees.ravel(work.params).dtype)
        carry = vary_with((work.params, start, batches.in_order, zero), work.params)
        mean, state, _, total = jax.lax.fori_loop(0, batches.steps, step, carry)
        precision = jax.tree.map(lambda h, d: (h + d) / state.rho, state.curvature, state.offset)
        found = Improvement(optax.tree.sub(mean, work.params), total / jnp.maximum(batches.steps, 1))
        return found._replace(message=Diagonal(trees.ravel(precision)))

    solve = solver_of(improve, term)

    def with_duals(outputs, params, data, client, key, hyper, store, shared):
        result = solve(outputs, params, data, client, key, hyper, store, shared)
        if store == ():
            return result
        return result._replace(store=moved(store, params, result.delta, result.message, hyper.posterior))

    return with_duals


def begun(state: IvonState, hyper: Hyper, params: Any, store: Any, examples: jax.Array) -> IvonState:
    """IVON's state as a client's round begins: its belief is the server's, its objective by its duals, if it has some.

    Args:
      state: a fresh one.
      hyper: with the server's belief.
      params: mbar.
      store: the client's duals, or ().
      examples: [], of the client.
    """
    told: Posterior = contracts.given(hyper.posterior, "hyper.posterior of the local solver 'ivon'")
    sbar = ravel_pytree(params)[1](told.precision)
    if store == ():
        h = jax.tree.map(lambda s: jnp.maximum(s - told.prior, 0), sbar)
        offset = jax.tree.map(lambda s: jnp.broadcast_to(told.prior, s.shape), sbar)
        return state._replace(curvature=h, offset=offset, size=jnp.maximum(examples, 1).astype(state.size.dtype))
    offset = jax.tree.map(lambda s, u: told.rho * s - u, sbar, store["precision"])
    linear = jax.tree.map(lambda v, s, m: v - told.rho * s * m, store["mean"], sbar, params)
    size = jnp.where(told.size > 0, told.size, jnp.maximum(examples, 1)).astype(state.size.dtype)
    return state._replace(curvature=store["precision"], offset=offset, linear=linear, size=size, rho=told.rho)


def moved(store: Any, params: Any, delta: Any, message: Diagonal, told: Posterior) -> Any:
    """A client's duals after its round, see `ivon`."""
    unravel = ravel_pytree(params)[1]
    sbar, own = unravel(told.precision), unravel(message.values)
    new = optax.tree.add(params, delta)

    def of_mean(v, s, m, s_old, m_old):
        return v + told.rho * (s * m - s_old * m_old)

    mean = jax.tree.map(of_mean, store["mean"], own, new, sbar, params)
    precision = jax.tree.map(lambda u, s, s_old: u + told.rho * (s - s_old), store["precision"], own, sbar)
    return {"mean": mean, "precision": precision}


LOCAL_SOLVERS = {"ivon": ivon}
