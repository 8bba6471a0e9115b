"""Differential equations: their solutions solve them, clients have their strips, and the loss is that of the paper."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fipa_jax import config as config_lib
from fipa_jax import tasks
from fipa_jax.config import recipes
from fipa_jax.reporting import metrics
from fipa_jax.run import whole_run
from fipa_jax.tasks import pde


def _config(equation, **fields):
    config = config_lib.default()
    config.task.name, config.task.equation = "pde", equation
    config.task.num_clients, config.task.examples_per_client = 3, 20
    config.task.boundary_points, config.task.boundary_weight, config.task.test_points = 4, 7.0, 30
    config.model.widths, config.precision = (5,), "float64"
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def problems():
    """equation -> (its problem, its record), in float64."""
    with jax.enable_x64(True):
        return {name: (tasks.build(_config(name)), equation) for name, equation in pde.EQUATIONS.items()}


each_equation = pytest.mark.parametrize("name", pde.EQUATIONS)


@pytest.mark.parametrize("dim", [1, 3])
def test_derivatives_are_those_of_closed_forms(x64, dim):
    """u = exp(a x) sin(b x), the product over the axes of x."""
    a, b = np.array([0.3, -0.7, 0.2])[:dim], np.array([2.0, 1.0, -3.0])[:dim]
    x = np.random.default_rng(0).uniform(-1, 1, size=(6, dim))
    u = lambda x: jnp.prod(jnp.exp(a[None] * x) * jnp.sin(b[None] * x), axis=1)
    # d/dx exp(a x) sin(b x) is the imaginary part of (a + i b)^order exp((a + i b) x).
    factor = lambda order: np.imag((a + 1j * b) ** order * np.exp((a + 1j * b) * x))

    def wanted(axis, order):
        return np.prod(np.where(np.arange(dim) == axis, factor(order), factor(0)), axis=1)

    for axis in range(dim):
        for order in (1, 2, 3):
            found = pde.derivative(u, jnp.asarray(x), axis, order)
            np.testing.assert_allclose(found, wanted(axis, order), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(
        pde.laplacian(u, jnp.asarray(x)), sum(wanted(axis, 2) for axis in range(dim)), rtol=1e-11, atol=1e-13
    )


# The right-hand sides in closed form, of x = the columns of the points.
def _sines(*x):
    return np.pi**2 * sum(np.sin(np.pi * one) for one in x)


SOURCES = {
    "poisson_1d": _sines,
    "poisson_2d": _sines,
    "poisson_3d": _sines,
    "fisher_kpp": lambda x: 6 * x - 2 + x**2 * (1 - x) * (1 - x**2 * (1 - x)),
    "burgers": lambda x, t: 0 * x,
    "burgers_mild": lambda x, t: 0 * x,
    "helmholtz": lambda x, y: (1 - 17 * np.pi**2) * np.sin(np.pi * x) * np.sin(4 * np.pi * y),
}


@each_equation
def test_the_solution_solves_its_equation(x64, problems, name):
    """At the interior points, with the right-hand side on paper and that in the data; Burgers' at steep ones too."""
    problem, equation = problems[name]
    inside = ~problem.train["boundary"]
    x, y = problem.train["x"][inside], problem.train["y"][inside, 0]
    source = SOURCES[name](*x.T)
    np.testing.assert_allclose(y, source, rtol=0, atol=1e-10)
    if name.startswith("burgers"):
        x = np.concatenate([x, np.c_[np.linspace(-0.02, 0.02, 9), np.full(9, 0.9)]])
        source = np.zeros(len(x))
    found = jax.jit(lambda x: equation.operator(equation.solution, x))(jnp.asarray(x))
    np.testing.assert_allclose(found, source, rtol=0, atol=1e-10)
    assert np.ptp(equation.solution(jnp.asarray(x))) > 0.5


@each_equation
def test_the_values_on_the_faces_are_the_solutions(x64, problems, name):
    problem, equation = problems[name]
    boundary = problem.train["boundary"]
    x, y = problem.train["x"][boundary], problem.train["y"][boundary, 0]
    np.testing.assert_allclose(y, equation.solution(jnp.asarray(x)), rtol=0, atol=1e-14)
    if name.startswith("burgers"):  # -sin(pi x) at first, zero on the sides
        np.testing.assert_allclose(y, np.where(x[:, 1] == 0, -np.sin(np.pi * x[:, 0]), 0), atol=1e-12)
    if name.startswith(("poisson", "helmholtz")):
        zero = [np.sin(np.pi * x).sum(axis=1), np.sin(np.pi * x[:, 0]) * np.sin(4 * np.pi * x[:, -1])]
        np.testing.assert_allclose(y, zero[name == "helmholtz"], atol=1e-12)


def test_the_quadrature_of_burgers_has_converged(x64):
    x = np.random.default_rng(0).uniform((-1, 0), (1, 1), size=(300, 2))
    x[:20, 0] = np.linspace(-0.01, 0.01, 20)  # where it is steep
    few, half, default = (np.asarray(pde.burgers(nodes=n).solution(jnp.asarray(x))) for n in (20, 100, 200))
    assert np.abs(half - default).max() < 1e-12 < np.abs(few - default).max()
    np.testing.assert_allclose(pde.burgers().solution(jnp.asarray(x * [[-1, 1]])), -default, atol=1e-12)  # it is odd


@each_equation
def test_every_client_has_its_strip_and_the_faces_that_this_touches(problems, name):
    problem, equation = problems[name]
    lower, upper = np.array(equation.lower), np.array(equation.upper)
    edges = np.linspace(lower[0], upper[0], 4)
    known = equation.faces or [(axis, side) for axis in range(lower.size) for side in (0, 1)]
    assert np.array_equal(np.sort(np.concatenate(problem.clients)), np.arange(len(problem.train["x"])))
    for m, examples in enumerate(problem.clients):
        x, boundary = problem.train["x"][examples], problem.train["boundary"][examples]
        assert np.all((x >= lower) & (x <= upper)) and (~boundary).sum() == 20
        assert np.all((x[:, 0] >= edges[m]) & (x[:, 0] <= edges[m + 1]))
        assert np.ptp(x[~boundary][:, 0]) > 0.5 * (edges[1] - edges[0])
        touched = [(axis, side) for axis, side in known if axis > 0 or (m, side) in ((0, 0), (2, 1))]
        assert boundary.sum() == 4 * len(touched)
        on = [int(np.sum(x[boundary][:, axis] == (lower, upper)[side][axis])) for axis, side in touched]
        assert on == [4] * len(touched)
        for axis, side in {(axis, side) for axis in range(lower.size) for side in (0, 1)} - set(touched):
            assert not np.any(x[boundary][:, axis] == (lower, upper)[side][axis])
    grid = problem.test["x"]
    assert len(grid) == round(30 ** (1 / lower.size)) ** lower.size
    np.testing.assert_array_equal([grid.min(axis=0), grid.max(axis=0)], [lower, upper])


def _network(params, x):
    """(u, its Laplacian) of one hidden layer of tanh, in numpy."""
    hidden, last = params["Dense_0"], params["Dense_1"]
    t = np.tanh(x @ hidden["kernel"] + hidden["bias"])
    squares = np.sum(np.asarray(hidden["kernel"]) ** 2, axis=0)
    return (t @ last["kernel"] + last["bias"])[:, 0], (-2 * t * (1 - t**2) * squares) @ last["kernel"][:, 0]


def _random_params(task):
    flat, unravel = ravel_pytree(task.init(jax.random.key(0)))
    return jax.tree.map(np.asarray, unravel(jnp.asarray(np.random.default_rng(1).normal(size=flat.size), flat.dtype)))


@pytest.mark.parametrize("name", ["poisson_2d", "helmholtz"])
def test_the_loss_is_the_mean_of_half_the_squared_residuals(x64, problems, name):
    problem, _ = problems[name]
    params, data = _random_params(problem.task), problem.train
    u, laplacian = _network(params, data["x"])
    residual = (-laplacian if name == "poisson_2d" else laplacian + u) - data["y"][:, 0]
    wanted = np.where(data["boundary"], 7.0 * (u - data["y"][:, 0]) ** 2, residual**2) / 2

    def both(params, data):
        outputs, _ = problem.task.outputs(params, data)
        return outputs, problem.task.loss(outputs, data), metrics.make_evaluate(problem.task, 16)(params, data)

    outputs, losses, evaluated = jax.jit(both)(params, data)
    assert outputs.shape == (len(data["x"]), 1)
    np.testing.assert_allclose(losses, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(evaluated["loss"], wanted, rtol=1e-9, atol=1e-12)
    figures = metrics.overall(evaluated, "train", problem.task.figures)
    np.testing.assert_allclose(figures.pop("train_loss"), wanted.mean(), rtol=1e-9)
    assert not figures


def test_the_test_set_is_measured_by_the_relative_error(x64, problems):
    problem, _ = problems["poisson_2d"]
    params, data = _random_params(problem.task), problem.test
    u, _ = _network(params, data["x"])
    solution = np.sin(np.pi * data["x"]).sum(axis=1)
    np.testing.assert_allclose(data["solution"], solution, atol=1e-12)
    evaluated = jax.jit(metrics.make_evaluate(problem.task, 16))(params, data)
    (name, value), *others = metrics.overall(evaluated, "test", problem.task.figures).items()
    assert name == "test_relative_l2" and not others and metrics.direction(name) < 0
    np.testing.assert_allclose(value, np.linalg.norm(u - solution) / np.linalg.norm(solution), rtol=1e-9)


def test_an_unknown_equation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"config\.task\.equation: unknown 'heat'; known: .*fisher_kpp"):
        tasks.build(_config("heat"))


def test_data_do_not_depend_on_the_precision(problems):
    """But for their rounding: right-hand sides are made in float64."""
    for name in ("burgers", "helmholtz"):
        single, (double, _) = tasks.build(_config(name, precision="float32")), problems[name]
        for mine, theirs in ((single.train, double.train), (single.test, double.test)):
            for field, value in theirs.items():
                assert mine[field].dtype == (bool if field == "boundary" else np.float32)
                np.testing.assert_array_equal(mine[field], value.astype(mine[field].dtype))


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.slow
def test_an_equation_of_ones_own_learns(tmp_path, monkeypatch, precision):
    """Transport u_x + u = f with u given on the left alone; Levenberg-Marquardt as the shipped configs have it."""
    own = pde.Equation(
        lambda u, x: pde.derivative(u, x, 0) + u(x), lambda x: jnp.exp(-2 * x[:, 0]), (0.0,), (1.0,), ((0, 0),)
    )
    monkeypatch.setitem(pde.EQUATIONS, "transport", own)
    config = recipes.pde("transport", "")
    small = _config("transport", precision=precision)
    config.task, config.model, config.precision, config.compare = small.task, small.model, precision, ("fipa",)
    config.fipa.rounds, config.fipa.sketch.rank = 2, 5
    with jax.enable_x64(precision == "float64"):
        problem = tasks.build(config)
        task = problem.task
        start = task.init(jax.random.fold_in(jax.random.key(config.seed), 2**31))
        evaluated = metrics.make_evaluate(task, 99)(start, problem.test)
        before = float(metrics.overall(evaluated, "test", task.figures)["test_relative_l2"])
    np.testing.assert_array_equal([problem.train["boundary"][own].sum() for own in problem.clients], [4, 0, 0])
    whole_run.run(config, tmp_path)
    first, last = metrics.read(tmp_path / "metrics.jsonl")
    assert first["damping"] == pytest.approx(0.1) and not last["undone"]
    assert last["test_relative_l2"] < 0.7 * before


def test_an_equation_may_have_no_faces_at_all(x64, monkeypatch):
    """As one with conditions of its own in the operator; None is for all of them."""
    equation = pde.fisher_kpp()._replace(faces=())
    monkeypatch.setitem(pde.EQUATIONS, "free", equation)
    problem = tasks.build(_config("free"))
    assert not problem.train["boundary"].any() and len(problem.train["x"]) == 60
    chex.assert_trees_all_equal([len(own) for own in problem.clients], [20, 20, 20])
