"""What SCAFFOLD and FedDyn keep of a client's gradients, under every optimiser: NumPy loops written from the papers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clients import make_hyper

from fipa_jax import aggregate, tasks
from fipa_jax.client import first_order, second_order, terms
from fipa_jax.client.examples import Client
from fipa_jax.curvature.sketch import Sketch
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as rounds
from fipa_jax.federation.parts import Parts, Rates

T, N, WIDTH, B, STEPS = 4, 6, 2, 0.7, 5
draw = np.random.default_rng(3)
X, Y = draw.normal(size=(T, N, WIDTH)), 3 * draw.normal(size=(T, N))
CURVATURE, SLOPE = np.einsum("mni,mnj->mij", X, X) / N, np.einsum("mni,mn->mi", X, Y) / N  # of the clients' losses
DATA = {"x": X.reshape(-1, WIDTH), "y": Y.reshape(-1)}
CLIENTS = Client(np.arange(T * N).reshape(T, N), np.full(T, N))
LINEAR = tasks.Task(
    init=lambda key: {"w": jnp.zeros([WIDTH])},
    outputs=lambda params, batch: ((batch["x"] @ params["w"])[:, None], ()),
    loss=lambda out, batch: (out[:, 0] - batch["y"]) ** 2 / 2,
    metrics=lambda out, batch: {},
)
REGULARISED = {"clip_norm": 0.4, "weight_decay": 0.1}
scaffold, dyn = functools.cache(terms.scaffold), functools.cache(terms.dyn)


def gradient(m, theta):
    return CURVATURE[m] @ theta - SLOPE[m]


def optimum(decay=0.0):
    return np.linalg.solve(CURVATURE.mean(0) + decay * np.eye(WIDTH), SLOPE.mean(0))


def weights(optimizer, n, b=B):
    """What each of n gradients counts in the move in the end, in units of the learning rate."""
    left = np.arange(n, 0, -1)
    return {
        "sgd": np.ones(n),
        "momentum": (1 - b**left) / (1 - b),
        "nesterov": (1 - b ** (left + 1)) / (1 - b),
    }[optimizer]


def descend(theta, slope, optimizer, n, lr, clip_norm=0.0, weight_decay=0.0):
    """(the move by n steps along a gradient, its mean as each counts): clipped, decay added, momentum, by hand."""
    start, trace, shares, slopes = theta, np.zeros_like(theta), [], []
    for _ in range(n):
        g = slope(theta)
        shares.append(min(1, clip_norm / np.linalg.norm(g)) if clip_norm else 1)
        slopes.append(g)
        g = shares[-1] * g + weight_decay * theta
        trace = g + B * trace
        theta = theta - lr * {"sgd": g, "momentum": trace, "nesterov": g + B * trace}[optimizer]
    counted = weights(optimizer, n) * shares
    return theta - start, counted @ np.array(slopes) / counted.sum()


@functools.cache
def local(term, optimizer="sgd", **options):
    solver = {"gradient": first_order.gradient} | second_order.LOCAL_SOLVERS
    if optimizer in solver:
        return solver[optimizer](LINEAR.loss, LINEAR.augment, term=term, **options)
    options = {"batch_size": 0, "steps": STEPS, "momentum": B} | options
    return first_order.first_order(LINEAR.loss, LINEAR.augment, optimizer=optimizer, term=term, **options)


def run(solver, term, number, lr, mu=0.0, cohort=T, lr_decay=1.0):
    """(ids of each round's clients, states before each round and after the last)."""
    parts = Parts(LINEAR, solver, term, None, aggregate.mean(), optax.identity(), T, cohort)
    rates = Rates(make_hyper(lr=lr, mu=mu), jnp.asarray(lr_decay), jnp.asarray(1.0))
    one, root = jax.jit(functools.partial(rounds.whole_round, parts)), jax.random.key(0)
    states, ids = [parts_lib.init(parts, LINEAR.init(None))], []
    data, clients = jax.tree.map(jnp.asarray, (DATA, CLIENTS))
    for k in range(number):
        ids.append(np.asarray(rounds.draw(parts, jnp.int32(k), rates, root)[0]).tolist())
        states.append(one(states[-1], rates, data, clients, root)[0])
    return ids, states


CASES = [
    *itertools.product(["scaffold"], first_order.LINEAR, [False, True]),
    ("dyn", "momentum", False),
    ("dyn", "nesterov", True),
]


@pytest.mark.parametrize(("name", "optimizer", "regularised"), CASES)
def test_rounds_of_a_part_of_the_clients_by_hand(x64, name, optimizer, regularised):
    """SCAFFOLD: algorithm 1, option II, in units of what the gradients have counted. FedDyn: algorithm 1."""
    options, mu, lr = REGULARISED if regularised else {}, 0.5, 0.1
    term = {"scaffold": scaffold, "dyn": dyn}[name]()
    ids, states = run(local(term, optimizer, **options), term, 8, lr, mu, cohort=2)
    theta, store = np.zeros(WIDTH), np.zeros((T, WIDTH))
    for of_round, state in zip(ids, states[1:], strict=True):
        mean, moves, old = store.mean(0), [], store.copy()
        for m in of_round:
            if name == "scaffold":
                slope = lambda y, m=m: gradient(m, y) - old[m] + mean
            else:
                slope = lambda y, m=m, theta=theta: gradient(m, y) - old[m] + mu * (y - theta)
            move, found = descend(theta, slope, optimizer, STEPS, lr, **options)
            store[m] = old[m] - mean + found if name == "scaffold" else old[m] - mu * move
            moves.append(move)
        theta = theta + np.mean(moves, axis=0) - (store.mean(0) / mu if name == "dyn" else 0)
        np.testing.assert_allclose(state.params["w"], theta, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.store["w"], store, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.shared["w"], store.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", first_order.LINEAR)
@pytest.mark.parametrize("fewer", [{"part": 0.3}, {"steps": 3}, {"steps": 4, "part": 0.5}])
def test_fewer_steps_are_seen_in_the_control(x64, optimizer, fewer):
    """A straggler's, and those that a sketch asks for."""
    hyper = make_hyper(lr=0.1)._replace(**{name: jnp.asarray(value) for name, value in fewer.items()})
    own, mean, theta = ({"w": jnp.asarray(draw.normal(size=WIDTH))} for _ in range(3))
    result = compiled(local(scaffold(), optimizer, **REGULARISED))(theta, hyper, own, mean)
    n = int(np.ceil(fewer.get("part", 1) * fewer.get("steps", STEPS)))
    slope = lambda y: gradient(0, y) - np.asarray(own["w"]) + np.asarray(mean["w"])
    move, found = descend(np.asarray(theta["w"]), slope, optimizer, n, 0.1, **REGULARISED)
    np.testing.assert_allclose(result.delta["w"], move, rtol=1e-9)
    np.testing.assert_allclose(result.store["w"], own["w"] - mean["w"] + found, rtol=1e-9)


def compiled(solver):
    """(params, hyper, store, shared, client's number) -> its result."""
    program, data = jax.jit(functools.partial(solver, LINEAR.outputs)), jax.tree.map(jnp.asarray, DATA)

    def one(theta, hyper, store, shared, m=0):
        client = jax.tree.map(lambda leaf: jnp.asarray(leaf[m]), CLIENTS)
        return program(theta, data, client, jax.random.key(0), hyper, store, shared)

    return one


@pytest.mark.parametrize("optimizer", ["adam", "yogi", "gradient", "natural_gradient"])
@pytest.mark.parametrize("batch_size", [0, 4])
def test_where_moves_are_in_units_of_their_own_the_control_is_the_first_gradient(x64, optimizer, batch_size):
    """Option I; whatever the mini-batches, of all examples, and without the weight decay."""
    whole = optimizer in ("gradient", "natural_gradient")
    options = {"weight_decay": 0.1} if whole else {"batch_size": batch_size, **REGULARISED}
    sketch = Sketch(jnp.ones(1), jnp.eye(WIDTH)[:, :1], None)
    own, mean, theta = ({"w": jnp.asarray(draw.normal(size=WIDTH))} for _ in range(3))
    hyper = make_hyper()._replace(sketch=sketch)
    result = compiled(local(scaffold(), optimizer, **options))(theta, hyper, own, mean)
    assert np.linalg.norm(result.delta["w"]) > 0
    np.testing.assert_allclose(result.store["w"], gradient(0, np.asarray(theta["w"])), rtol=1e-9, atol=1e-12)


ACCEPTED = [*first_order.OPTIMIZERS, "lbfgs", "natural_gradient"]


@pytest.mark.parametrize("optimizer", ACCEPTED)
@pytest.mark.parametrize("name", ["scaffold", "dyn"])
def test_the_fixed_point_is_the_minimum_of_all_clients_loss(x64, name, optimizer):
    """With each client's gradient there for its store nobody moves, and no store changes; elsewhere they do.

    Adam divides rounding by rounding: its learning rate is so small that this stays rounding.
    """
    lr = 1e-9 if optimizer in ("adam", "yogi") else 0.1
    term = {"scaffold": scaffold, "dyn": dyn}[name]()
    decay = 0.1 if optimizer in first_order.LINEAR else 0.0
    options = {"weight_decay": decay, "clip_norm": 0.4} if decay else {}
    program, sketch = compiled(local(term, optimizer, **options)), Sketch(jnp.ones(1), jnp.eye(WIDTH)[:, :1], None)
    theta, moved = optimum(decay), {}
    for m, (where, away) in itertools.product(range(2), {"there": 0.0, "elsewhere": 1.0}.items()):
        # What FedDyn keeps is the slope of all that the client descends along, its decay with it.
        own = gradient(m, theta) + (decay * theta if name == "dyn" else 0)
        mean = -decay * theta if name == "scaffold" else np.zeros(WIDTH)
        own, mean, start = ({"w": jnp.asarray(value)} for value in (own, mean, theta + away))
        result = program(start, make_hyper(lr=lr, mu=0.5)._replace(sketch=sketch), own, mean, m)
        moved[m, where] = np.linalg.norm(result.delta["w"])
        if where == "there":
            chex.assert_trees_all_close(result.store, own, atol=1e-6)
    for m in range(2):
        assert moved[m, "there"] < 1e-6 * moved[m, "elsewhere"] and np.linalg.norm(gradient(m, theta)) > 0.1


@pytest.mark.parametrize("optimizer", first_order.LINEAR)
@pytest.mark.parametrize("case", ["plain", "decay", "clip", "prox", "part"])
def test_an_updates_own_damping_gives_the_gradient_back(x64, optimizer, case):
    """(H + beta_m I) delta = -gradient, nearly: (1 + x) (1 - e^-x) / x of it, 1 to 1.299, with x = t (lam + pull)."""
    options = {"decay": {"weight_decay": 0.5}, "clip": {"clip_norm": 0.2}}.get(case, {}) | {"steps": 300}
    program = compiled(local(terms.prox() if case == "prox" else terms.none(), optimizer, **options))
    eigenvalues, basis = np.linalg.eigh(CURVATURE[0])
    slope = gradient(0, np.ones(WIDTH)) + options.get("weight_decay", 0)
    for lr in (1e-4, 1e-3, 1e-2, 5e-2):
        hyper = make_hyper(lr=lr, mu=0.5)._replace(part=jnp.asarray(0.5) if case == "part" else None)
        result = program({"w": jnp.ones(WIDTH)}, hyper, (), ())
        found = -(eigenvalues + result.damping) * (basis.T @ result.delta["w"]) / (basis.T @ slope)
        assert np.all(found > 0.97) and np.all(found < 1.35)


def quadratic_rounds(optimizer, number):
    """How far from the minimum 10 steps of 0.02 a round end: curvatures of 3 and 1, minima at 1 and -2."""
    steps, lr = 10, 0.02
    task = LINEAR._replace(
        init=lambda key: {"w": jnp.full([1], 30.0)},
        outputs=lambda params, batch: ((batch["x"] * params["w"][None])[:, :1], ()),
    )
    data = {"x": jnp.asarray([[3**0.5], [1.0]]), "y": jnp.asarray([3**0.5, -2.0])}
    clients = Client(jnp.arange(2)[:, None], jnp.ones(2, int))
    term = scaffold()
    solver = first_order.first_order(
        task.loss, task.augment, optimizer=optimizer, momentum=0.9, batch_size=0, steps=steps, term=term
    )
    parts = Parts(task, solver, term, None, aggregate.mean(), optax.identity(), 2, 2)
    rates = Rates(make_hyper(lr=lr), jnp.asarray(1.0), jnp.asarray(1.0))
    one = jax.jit(lambda state: rounds.whole_round(parts, state, rates, data, clients, jax.random.key(0))[0])
    state = parts_lib.init(parts, task.init(None))
    for _ in range(number):
        state = one(state)
    return abs(float(state.params["w"][0]) - (3 - 2) / 4)


@pytest.mark.parametrize("optimizer", first_order.LINEAR)
def test_scaffold_converges_under_momentum(x64, optimizer):
    assert quadratic_rounds(optimizer, 60) < 1e-8
