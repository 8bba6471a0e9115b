"""Physics-informed learning of a differential equation whose domain is split between clients (arXiv 2601.13608, PDEs).

A network u(x) is fitted to N[u](x) = f(x) inside the domain and to u(x) = g(x) on its faces. The outputs whose squares
make up the loss, and whose Jacobian makes up the curvature, are the residuals

    N[u](x_n) - f(x_n) inside,    sqrt(lambda) (u(x_n) - g(x_n)) on the boundary

An equation is one record, `Equation`; put your own into `EQUATIONS`.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import trees
from fipa_jax.lookup import lookup
from fipa_jax.models import networks
from fipa_jax.tasks.task import Problem, Task, means

Function = Callable[[jax.Array], jax.Array]  # points x [B, d] -> [B]
Operator = Callable[[Function, jax.Array], jax.Array]  # (u, x [B, d]) -> [B], N[u] at x; see `derivative`


class Equation(NamedTuple):
    """A differential equation on a box, as functions of points x [B, d]; the clients' strips cut its first axis."""

    operator: Operator
    solution: Function  # the test set, and the values on the faces
    lower: tuple  # corners of the box, [d]
    upper: tuple
    faces: tuple | None = None  # of (axis, 0 for lower | 1 for upper), where u is given; None for all of them
    source: Function | None = None  # f; None for N[solution], which makes any function a solution


def derivative(u: Function, x: jax.Array, axis: int, order: int = 1) -> jax.Array:
    """[B], the derivative of u: [B, d] -> [B] at x along one axis, forward over forward: no Hessian is formed.

    Each value of u may depend on its own point alone. (Taylor mode, `jax.experimental.jet`, is 17 % faster for
    Laplacians in two and three dimensions and 7 % slower in one.)
    """
    for _ in range(order):
        u = _along(u, axis)
    return u(x)


def _along(u: Function, axis: int) -> Function:
    """du/dx_axis, as a function."""

    def slope(x):
        return jax.jvp(u, (x,), (jnp.zeros_like(x).at[:, axis].set(1),))[1]

    return slope


def laplacian(u: Function, x: jax.Array) -> jax.Array:
    """[B], the sum of the second derivatives of u along all axes."""
    return trees.total(derivative(u, x, axis, order=2) for axis in range(x.shape[1]))


def poisson(dim: int) -> Equation:
    """-Laplace u = f on [-1, 1]^d, with u = sum_i sin(pi x_i)."""

    def operator(u, x):
        return -laplacian(u, x)

    def solution(x):
        return jnp.sum(jnp.sin(jnp.pi * x), axis=1)

    return Equation(operator, solution, dim * (-1.0,), dim * (1.0,))


def fisher_kpp() -> Equation:
    """-u'' + u (1 - u) = f on [-1, 1], with u = x^2 (1 - x)."""

    def operator(u, x):
        return -derivative(u, x, 0, order=2) + u(x) * (1 - u(x))

    def solution(x):
        return x[:, 0] ** 2 * (1 - x[:, 0])

    return Equation(operator, solution, (-1.0,), (1.0,))


def burgers(viscosity: float = 0.01 / math.pi, nodes: int = 200) -> Equation:
    """u_t + u u_x = nu u_xx on x in [-1, 1], t in [0, 1], u(x, 0) = -sin(pi x), u(+-1, t) = 0; points are (x, t).

    The solution is the Cole-Hopf formula (Basdevant et al. 1986), y = x - 2 sqrt(nu t) z, Gauss-Hermite nodes z:

        u = -E[sin(pi y) phi(y)] / E[phi(y)],    phi(y) = exp(-cos(pi y) / (2 pi nu))
    """
    z, weight = np.polynomial.hermite.hermgauss(nodes)

    def operator(u, x):
        return derivative(u, x, 1) + u(x) * derivative(u, x, 0) - viscosity * derivative(u, x, 0, order=2)

    def solution(x):
        y = x[:, :1] - 2 * jnp.sqrt(viscosity * x[:, 1:]) * z[None]  # [B, nodes]
        share = jax.nn.softmax(jnp.log(weight)[None] - jnp.cos(jnp.pi * y) / (2 * jnp.pi * viscosity), axis=1)
        return -jnp.sum(share * jnp.sin(jnp.pi * y), axis=1)

    def source(x):
        return jnp.zeros(x.shape[0], x.dtype)

    initial_and_sides = ((0, 0), (0, 1), (1, 0))
    return Equation(operator, solution, (-1.0, 0.0), (1.0, 1.0), initial_and_sides, source)


def helmholtz(waves: tuple = (1, 4), wave_number: float = 1.0) -> Equation:
    """Laplace u + k^2 u = f on [-1, 1]^2, with u = sin(a_1 pi x_1) sin(a_2 pi x_2) (Wang et al. 2021)."""

    def operator(u, x):
        return laplacian(u, x) + wave_number**2 * u(x)

    def solution(x):
        return jnp.prod(jnp.sin(jnp.pi * jnp.asarray(waves)[None] * x), axis=1)

    return Equation(operator, solution, (-1.0, -1.0), (1.0, 1.0))


EQUATIONS = {
    "poisson_1d": poisson(1),
    "poisson_2d": poisson(2),
    "poisson_3d": poisson(3),
    "fisher_kpp": fisher_kpp(),
    "burgers": burgers(),
    "burgers_mild": burgers(0.03 / math.pi),
    "helmholtz": helmholtz(),
}


def physics(module, equation: Equation, boundary_weight: float, dtype) -> Task:
    """The task of fitting a flax module, x [B, d] -> (u [B, 1], features), to an equation.

    Batches of the training set hold `x` [B, d], `boundary` [B] and the right-hand side `y` [B, 1], f or g; those of the
    test set hold the `solution` [B] instead, and their outputs are u itself.
    """

    point = jnp.zeros([1, len(equation.lower)], dtype)

    def init(key):
        return module.init(key, point)["params"]

    def outputs(params, batch):
        def u(x):
            return module.apply({"params": params}, x)[0][:, 0]

        if "solution" in batch:
            return u(batch["x"])[:, None], ()
        inside = equation.operator(u, batch["x"]) - batch["y"][:, 0]
        on_boundary = math.sqrt(boundary_weight) * (u(batch["x"]) - batch["y"][:, 0])
        return jnp.where(batch["boundary"], on_boundary, inside)[:, None], ()

    return Task(init, outputs, _loss, _metrics, figures=_figures)


def _loss(outputs, batch):
    """[B], the half-squared residuals [B, 1]."""
    return jnp.sum(outputs**2, axis=-1) / 2


def _metrics(outputs, batch):
    """{name: [B]}: the loss, and where the solution is known the two squares of which `_figures` makes the error."""
    if "solution" in batch:
        return {"mse": (outputs[:, 0] - batch["solution"]) ** 2, "solution_squared": batch["solution"] ** 2}
    return {"loss": _loss(outputs, batch)}


def _figures(values: dict) -> dict:
    """The relative error in L2, where the solution is known."""
    of_set = means(values)
    if "solution_squared" not in of_set:
        return of_set
    return {"relative_l2": jnp.sqrt(of_set["mse"] / of_set["solution_squared"])}


def build(config) -> Problem:
    """Builds the equation `config.task.equation`, each client with its strip of the first axis.

    Raises:
      ValueError: the equation is not known.
    """
    task = config.task
    equation = lookup(EQUATIONS, task.equation, "config.task.equation")
    x, boundary, clients = _points(equation, task)
    x_test = _grid(equation, task.test_points)
    with jax.enable_x64(True):  # the data are exact whatever the run's precision
        y = np.where(boundary, equation.solution(jnp.asarray(x)), _source(equation, jnp.asarray(x)))
        solution = np.asarray(equation.solution(jnp.asarray(x_test)))
    dtype = np.dtype(config.precision)
    train = {"x": x.astype(dtype), "y": y.astype(dtype)[:, None], "boundary": boundary}
    test = {"x": x_test.astype(dtype), "solution": solution.astype(dtype)}
    module = networks.build(config.model, num_outputs=1)
    return Problem(physics(module, equation, task.boundary_weight, dtype), train, test, None, clients)


def _source(equation: Equation, x: jax.Array) -> jax.Array:
    """[B], the right-hand side f at points [B, d]."""
    return equation.source(x) if equation.source else equation.operator(equation.solution, x)


def _points(equation: Equation, task) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(x [N, d], bool [N]: is it on a face, for each client the indices of its points), strip after strip."""
    draw = np.random.default_rng(task.seed)
    edges = np.linspace(equation.lower[0], equation.upper[0], task.num_clients + 1)
    strips = [
        _strip(equation, strip, task.examples_per_client, task.boundary_points, draw)
        for strip in itertools.pairwise(edges)
    ]
    x, boundary = (np.concatenate(arrays) for arrays in zip(*strips, strict=True))
    ends = np.cumsum([len(points) for points, _ in strips])
    return x, boundary, np.split(np.arange(len(x)), ends[:-1])


def _grid(equation: Equation, num_points: int) -> np.ndarray:
    """[N, d], a grid on the whole box, of about so many points, faces included."""
    dim = len(equation.lower)
    side = round(num_points ** (1 / dim))
    axes = [np.linspace(low, high, side) for low, high in zip(equation.lower, equation.upper, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, dim)


def _strip(equation: Equation, strip, inside: int, on_face: int, draw) -> tuple[np.ndarray, np.ndarray]:
    """A client's random points in its strip, then those on each face that the strip touches: (x [N, d], bool [N])."""
    lower, upper = np.array(equation.lower), np.array(equation.upper)
    ends = lower[0], upper[0]
    lower[0], upper[0] = strip

    def uniform(count):
        return lower + (upper - lower) * draw.random((count, lower.size))

    parts = [uniform(inside)]
    every = itertools.product(range(lower.size), (0, 1))
    for axis, side in every if equation.faces is None else equation.faces:
        if axis == 0 and strip[side] != ends[side]:
            continue
        points = uniform(on_face)
        points[:, axis] = (lower, upper)[side][axis]
        parts.append(points)
    return np.concatenate(parts), np.repeat([False, True], [inside, sum(map(len, parts[1:]))])
