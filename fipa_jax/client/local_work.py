"""What do local solvers share? The numbers that they are given, what they return, and a client's objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax.client.examples import Client, masked_mean, present
from fipa_jax.client.terms import Local, Term
from fipa_jax.curvature.sketch import Sketch

FEW = 5  # examples whose activations in a small network stay in a core's cache


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
