"""A small network on split data, and the centralised Levenberg-Marquardt method on all of them, dense and in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from fipa_jax import aggregate, tasks
from fipa_jax.aggregate.limits import Limits
from fipa_jax.client import second_order, terms
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import Hyper, with_initial_loss
from fipa_jax.curvature import sketch
from fipa_jax.curvature.sketch import plain
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation.parts import Parts, Rates
from fipa_jax.federation.round import whole_round

COUNTS = np.array([6, 3, 5])  # examples of the clients, padded to 6
RANK = 6  # of the curvature of the largest client: one output for each example
WIDTH, HIDDEN = 2, 3


def _outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return hidden @ params["v"], ()


def _init(key):
    draw = np.random.default_rng(3)
    shapes = {"b": [HIDDEN], "v": [HIDDEN, 1], "w": [WIDTH, HIDDEN]}
    return {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}


_loss = lambda out, batch: jnp.sum((out - batch["y"]) ** 2, axis=1) / 2
TASK = tasks.Task(_init, _outputs, _loss, lambda out, batch: {"loss": _loss(out, batch)})


def problem():
    """(data, clients): every client has a block of the examples, the padding an outlier that must not count."""
    draw, size = np.random.default_rng(0), len(COUNTS) * COUNTS.max()
    data = {"x": draw.normal(size=(size, WIDTH)), "y": draw.normal(size=(size, 1))}
    indices = np.arange(size).reshape(len(COUNTS), -1)
    for own, count in zip(indices, COUNTS, strict=True):
        data["y"][own[count:]] = 100
    return {name: jnp.asarray(field) for name, field in data.items()}, Client(jnp.asarray(indices), jnp.asarray(COUNTS))


def rates(lr=1.0):
    array = lambda value: jnp.asarray(value, float)
    return Rates(Hyper(array(lr), array(123.0), array(0.0)), array(1.0), array(1.0))


def sketcher(rank=RANK):
    """Exact sketches of this rank."""
    return plain(lambda outputs, features: sketch.make_sketch(outputs, TASK.loss, rank=rank, solver="rows"))


@functools.cache
def parts():
    """One Gauss-Newton step a round with the server's damping, which is to be put into the state; exact sketches."""
    rule = aggregate.fipa(relative=False, limits=Limits(max_step=0.0), trust=True)
    local = second_order.gauss_newton(TASK.loss, TASK.augment, steps=1, tries=0)
    return Parts(
        task=TASK,
        local=with_initial_loss(local, TASK.loss),
        term=terms.none(),
        sketcher=sketcher(),
        aggregator=rule,
        server=optax.identity(),
        num_clients=len(COUNTS),
        cohort=len(COUNTS),
        announce=rule.announce,
    )


def start():
    """The parameters that a run starts from, [P]."""
    return np.asarray(ravel_pytree(TASK.init(None))[0])


@functools.cache
def _compiled():
    return jax.jit(functools.partial(whole_round, parts()))


@functools.cache
def run(damping, num_rounds):
    """([parameters before each round and after the last], [info of each round])."""
    step, state = _compiled(), parts_lib.init(parts(), TASK.init(None))
    hyper = state.aggregator.hyper | {"damping": jnp.asarray(damping, float)}
    state = state._replace(aggregator=state.aggregator._replace(hyper=hyper))
    visited, infos = [np.asarray(ravel_pytree(state.params)[0])], []
    for _ in range(num_rounds):
        state, info = step(state, rates(), *problem(), jax.random.key(0))
        visited.append(np.asarray(ravel_pytree(state.params)[0]))
        infos.append(jax.device_get(info))
    return visited, infos


@functools.cache
def _residuals():
    """theta -> (residuals of all examples, their Jacobian)."""
    _, unravel = ravel_pytree(TASK.init(None))
    data, _ = problem()
    residual = lambda theta: (_outputs(unravel(theta), data)[0] - data["y"])[:, 0]
    return jax.jit(lambda theta: (residual(theta), jax.jacobian(residual)(theta)))


def dense(theta):
    """[(loss, gradient, H)] of each client, and last of all examples together."""
    residual, jacobian = map(np.asarray, _residuals()(theta))
    _, clients = problem()
    own = [indices[:count] for indices, count in zip(np.asarray(clients.indices), COUNTS, strict=True)]
    found = []
    for examples in (*own, np.concatenate(own)):
        r, rows, count = residual[examples], jacobian[examples], len(examples)
        found.append((r @ r / count / 2, rows.T @ r / count, rows.T @ rows / count))
    return found


def levenberg_marquardt(theta, damping, num_rounds):
    """The parameters before each round and after the last; the damping that a step has earned comes a round later."""
    visited, growth, last = [theta], 2, None
    for _ in range(num_rounds):
        loss, gradient, curvature = dense(theta)[-1]
        step = -np.linalg.solve(curvature + damping * np.eye(theta.size), gradient)
        if last and not (gain := (last[1] - loss) / last[2]) > 0:
            damping, growth = max(damping, last[3]) * growth, 2 * growth
            theta, last = last[0], None
        else:
            used = damping
            if last:
                damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2
            last = theta, loss, -gradient @ step - step @ curvature @ step / 2, used
            theta = theta + step
        visited.append(theta)
    return visited
