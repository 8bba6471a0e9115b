"""Gauss-Newton and L-BFGS clients against dense solves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clients import (
    INDICES,
    KEEP,
    NUM_EXAMPLES,
    make_client,
    make_data,
    make_hyper,
    make_params,
    network,
    softmax,
    solve,
    squared,
)
from jax.flatten_util import ravel_pytree

from fipa_jax.client import second_order, terms
from fipa_jax.client.examples import Client
from fipa_jax.federation import parallel as simulate

GAUSS_NEWTON = {"solver": second_order.gauss_newton, "steps": 2}
LBFGS = {"solver": second_order.lbfgs}
SOLVERS = {
    "gram": GAUSS_NEWTON | {"system": "gram"},
    "cg": GAUSS_NEWTON | {"system": "cg"},
    "lbfgs": LBFGS | {"steps": 3},
}
each_solver = pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
flat = lambda tree: np.asarray(ravel_pytree(tree)[0])


def _dense_steps(loss, count, steps, lr, damping, l2=0.0):
    """What Gauss-Newton steps by the [P, P] system move the parameters by."""
    start, unravel = ravel_pytree(make_params())
    theta, own = np.asarray(start), {name: field[INDICES[:count]] for name, field in make_data().items()}

    @jax.jit
    def pieces(theta):
        predict = lambda theta: network(unravel(theta), own)[0]
        out = predict(theta)
        total = lambda out: jnp.sum(loss(out, own))
        return jax.jacobian(predict)(theta).reshape(-1, theta.size), jax.grad(total)(out), jax.hessian(total)(out)

    for _ in range(steps):
        jacobian, error, hessian = (np.asarray(piece) for piece in pieces(theta))
        hessian = hessian.reshape(error.size, error.size)
        system = jacobian.T @ hessian @ jacobian / count + max(damping, l2) * np.eye(theta.size)
        theta = theta - lr * np.linalg.solve(system, jacobian.T @ error.reshape(-1) / count + l2 * theta)
    return theta - np.asarray(start)


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("loss", [squared, softmax])
@pytest.mark.parametrize("system", ["gram", "cg"])
def test_gauss_newton_equals_the_dense_step(x64, loss, system, l2):
    lr, damping, count = 0.7, 0.1, 5
    options = SOLVERS[system] | {"weight_decay": l2}
    result = solve(make_client(count), make_hyper(lr=lr, damping=damping), loss=loss, **options)
    wanted = _dense_steps(loss, count, 2, lr, damping, l2)
    np.testing.assert_allclose(flat(result.delta), wanted, rtol=1e-8, atol=1e-12)
    assert result.damping == max(damping, l2)


@each_solver
def test_with_weight_decay_a_client_ends_where_its_objective_is_least(x64, options):
    l2, steps = 0.2, {"steps": 60, "weight_decay": 0.2}
    own = {name: field[INDICES[:5]] for name, field in make_data().items()}

    def objective(params):
        return jnp.mean(softmax(network(params, own)[0], own)) + l2 / 2 * jnp.sum(ravel_pytree(params)[0] ** 2)

    found = solve(make_client(5), make_hyper(lr=1.0, damping=1e-6), loss=softmax, **(options | steps))
    after = jax.tree.map(jnp.add, make_params(), found.delta)
    before, at_end = (np.linalg.norm(flat(jax.grad(objective)(params))) for params in (make_params(), after))
    assert at_end < 1e-5 * before


def test_the_two_systems_give_the_same_and_auto_takes_the_small_one(x64, monkeypatch):
    hyper = make_hyper(lr=1.0, damping=1e-3)
    gram, cg, auto = (solve(make_client(8), hyper, **GAUSS_NEWTON, system=system) for system in ("gram", "cg", "auto"))
    chex.assert_trees_all_close(gram, cg, rtol=1e-8, atol=1e-12)
    chex.assert_trees_all_equal(gram, auto)
    monkeypatch.setattr(second_order, "GRAM_LIMIT", 0)
    large = solve(make_client(8), hyper, **GAUSS_NEWTON, system="auto", tries=9)  # other options, traced anew
    chex.assert_trees_all_equal(cg, large)


def test_cg_stops_after_its_steps(x64):
    """One step of it is the steepest descent to the minimum along the gradient."""
    result = solve(make_client(8), make_hyper(lr=1.0), solver=second_order.gauss_newton, system="cg", cg_steps=1)
    towards = flat(jax.grad(lambda p: jnp.mean(squared(network(p, make_data())[0], make_data())))(make_params()))
    found = flat(result.delta)
    np.testing.assert_allclose(found, towards * (found @ towards) / (towards @ towards), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("system", ["gram", "cg"])
def test_without_tries_the_step_is_taken_as_it_is(x64, system):
    """Also where it goes uphill, which a client that tries dampings does not accept."""
    uphill = make_hyper(lr=-1.0, damping=0.1)
    options = {"solver": second_order.gauss_newton, "system": system, "steps": 1}
    raw = flat(solve(make_client(5), uphill, tries=0, **options).delta)
    np.testing.assert_allclose(raw, _dense_steps(squared, 5, 1, -1.0, 0.1), rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(flat(solve(make_client(5), uphill, **options).delta), 0)


def _linear(params, batch):
    """Least squares, with a minimum known in closed form; the parameters are called as optax calls its own state."""
    return batch["x"] @ params["value"], ()


def _minimum(count, mu=0.0, slope=0.0):
    """The change from the start to the minimum of 1/2N |x w - y|^2 + mu/2 |w - start|^2 + <slope, w>."""
    x, y = (np.asarray(make_data()[name])[INDICES[:count]] for name in ("x", "y"))
    start = np.asarray(make_params()["w"])
    system = x.T @ x / count + mu * np.eye(x.shape[1])
    return np.linalg.solve(system, x.T @ (y - x @ start) / count - slope)


def _solve_linear(count, mu=0.0, steps=20, **options):
    start = {"value": make_params()["w"]}
    return solve(make_client(count), make_hyper(mu=mu), start, outputs=_linear, steps=steps, **LBFGS, **options)


@pytest.mark.parametrize("count", [5, 8])
def test_lbfgs_reaches_the_minimum_of_least_squares(x64, count):
    result = _solve_linear(count)
    np.testing.assert_allclose(result.delta["value"], _minimum(count), rtol=1e-6, atol=1e-7)


def test_lbfgs_does_not_take_the_learning_rate(x64):
    one, other = (solve(make_client(5), make_hyper(lr=lr), **SOLVERS["lbfgs"]) for lr in (0.1, 7.0))
    chex.assert_trees_all_equal(one, other)


def test_an_epoch_of_lbfgs_is_an_iteration(x64):
    by_epochs = solve(make_client(5), make_hyper(), epochs=3, **LBFGS)
    chex.assert_trees_all_equal(by_epochs, solve(make_client(5), make_hyper(), epochs=9, **SOLVERS["lbfgs"]))


def test_the_loss_of_lbfgs_is_the_mean_over_its_iterations(x64):
    """Of the training loss, without the term."""
    one, two = (_solve_linear(8, mu=5.0, steps=steps, term=_prox()) for steps in (1, 2))
    x, y = make_data()["x"], make_data()["y"]
    loss = lambda change: jnp.mean(jnp.sum((x @ (make_params()["w"] + change) - y) ** 2, axis=1)) / 2
    np.testing.assert_allclose(one.loss, loss(0), rtol=1e-12)
    np.testing.assert_allclose(two.loss, (loss(0) + loss(one.delta["value"])) / 2, rtol=1e-12)


_prox, _scaffold = functools.cache(terms.prox), functools.cache(terms.scaffold)


def test_lbfgs_minimises_the_penalised_objective(x64):
    for mu in (0.5, 5.0):
        result = _solve_linear(5, mu, term=_prox())
        np.testing.assert_allclose(result.delta["value"], _minimum(5, mu), rtol=1e-6, atol=1e-7)


def test_scaffold_remembers_the_mean_gradient_on_the_way_of_lbfgs(x64):
    """Of least squares this is the one in the middle."""
    draw = np.random.default_rng(3)
    own, mean = ({"value": jnp.asarray(draw.normal(size=make_params()["w"].shape))} for _ in range(2))
    count, slope = 8, np.asarray(mean["value"] - own["value"])
    result = _solve_linear(count, steps=20, term=_scaffold(), store=own, shared=mean)
    delta = np.asarray(result.delta["value"])
    np.testing.assert_allclose(delta, _minimum(count, slope=slope), rtol=1e-6, atol=1e-7)
    x, y = (np.asarray(make_data()[name]) for name in ("x", "y"))
    middle = x.T @ (x @ (np.asarray(make_params()["w"]) + delta / 2) - y) / count + slope
    np.testing.assert_allclose(result.store["value"], middle - slope, rtol=1e-6, atol=1e-7)


@each_solver
def test_what_the_padding_holds_does_not_matter(x64, options):
    one = solve(make_client(5), make_hyper(), **options)
    other = solve(make_client(5, np.where(np.arange(NUM_EXAMPLES) < 5, INDICES, 6)), make_hyper(), **options)
    alone = solve(make_client(5, INDICES[:5]), make_hyper(), **options)
    chex.assert_trees_all_close(one, other, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(one, alone, rtol=1e-9, atol=1e-12)
    assert np.isfinite(one.loss) and np.linalg.norm(flat(one.delta)) > 0


@each_solver
def test_an_empty_client_does_not_move(x64, options):
    result = solve(make_client(0), make_hyper(), **options)
    chex.assert_trees_all_equal(result.delta, jax.tree.map(jnp.zeros_like, make_params()))
    np.testing.assert_array_equal(result.loss, 0)


def test_an_empty_client_does_not_move_along_its_term(x64):
    """SCAFFOLD's has no minimum of its own."""
    result = _solve_linear(0, term=_scaffold(), store={"value": jnp.ones((3, 3))}, shared={"value": jnp.zeros((3, 3))})
    np.testing.assert_array_equal(result.delta["value"], 0)


@each_solver
def test_a_client_whose_data_are_not_finite_stays_and_says_so(x64, options):
    data = make_data()
    data["x"] = data["x"].at[INDICES[2], 0].set(jnp.nan)
    result = solve(make_client(5), make_hyper(), data=data, **options)
    np.testing.assert_array_equal(flat(result.delta), 0)
    assert np.isnan(result.loss), "the round counts it"


def test_lbfgs_stays_where_the_loss_is_finite(x64):
    """log has no value beyond the first unit step: the line search turns back and goes on."""
    outputs = lambda params, batch: (jnp.log(params["w"]) * jnp.ones_like(batch["y"]), ())
    start = {"w": jnp.asarray([0.05, 1.0, 1.0])[None]}
    data = {"y": -jnp.ones((NUM_EXAMPLES, 3)) * 5}
    result = solve(make_client(8), make_hyper(), start, data, outputs=outputs, steps=30, **LBFGS)
    np.testing.assert_allclose(start["w"] + result.delta["w"], np.exp(-5) * np.ones((1, 3)), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("gram", "float64"),
        ("cg", "float64"),
        ("lbfgs", "float64"),
        pytest.param("lbfgs", "float32", marks=pytest.mark.slow),
    ],
)
def test_clients_side_by_side_are_clients_one_after_another(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf, tree)
        options, data, params = dict(SOLVERS[name]), cast(make_data()), cast(make_params())
        local = functools.partial(options.pop("solver")(squared, KEEP, **options), network)
        one = lambda params, data, hyper, client: local(params, data, client, jax.random.key(0), hyper, (), ())
        clients = Client(jnp.stack([jnp.asarray(INDICES)] * 3), jnp.asarray([5, 0, 8]))
        mapped = jax.jit(
            lambda chunk: simulate.map_clients(one, (params, data, make_hyper()), clients, chunk=chunk),
            static_argnums=0,
        )
        after, beside = mapped(1), mapped(0)
        tolerance = {"float32": 1e-3, "float64": 1e-8}[dtype]
        chex.assert_trees_all_close(after, beside, rtol=tolerance, atol=tolerance)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {dtype}
        assert np.all(np.asarray(after.delta["w"][1]) == 0) and np.all(np.any(after.delta["w"][::2] != 0, (1, 2)))


def test_wrong_choices_name_the_field():
    with pytest.raises(ValueError, match=r"gauss_newton.*term\.name = 'none'"):
        second_order.gauss_newton(squared, KEEP, term=terms.prox())
    second_order.gauss_newton(squared, KEEP, term=terms.TERMS["none"]())
    with pytest.raises(ValueError, match=r"local\.gauss_newton\.system: unknown 'dense'; known: auto, cg, gram"):
        second_order.gauss_newton(squared, KEEP, system="dense")
    for name in ("gauss_newton", "lbfgs"):
        solver = second_order.LOCAL_SOLVERS[name]
        with pytest.raises(ValueError, match=rf"local\.optimizer = '{name}' takes no local\.clip_norm"):
            solver(squared, KEEP, clip_norm=1.0)
