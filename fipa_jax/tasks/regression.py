"""Regression of a function known in closed form, on split domains (arXiv 2601.13608, sections on regression)."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from fipa_jax.models import networks
from fipa_jax.tasks.task import Figures, Loss, Metrics, Problem, Task, means

PUBLIC = 64  # points of the domain, about, at which a private run may see the model's curvature


def regression(module, example: np.ndarray) -> Task:
    """A task from a flax module: half-squared error 1/2 |y_hat - y|^2, so that L_n is the identity."""
    return of_vectors(module, example, _loss, _metrics)


def of_vectors(module, example: np.ndarray, loss: Loss, metrics: Metrics, figures: Figures = means) -> Task:
    """A task from a flax module on inputs that are vectors, `batch["x"]` [B, d].

    Args:
      module: flax module, x [B, d] -> (outputs [B, K], features).
      example: array [d], an input of the right width.
      loss, metrics, figures: of the task.
    """

    def init(key):
        return module.init(key, jnp.asarray(example)[None])["params"]

    def outputs(params, batch):
        return module.apply({"params": params}, batch["x"])

    head, pattern = functools.partial(networks.apply_head, module.head_layers), f"^({'|'.join(module.head_layers)})/"
    return Task(init, outputs, loss, metrics, figures=figures, head=head, head_pattern=pattern)


def _loss(outputs, batch):
    """[B], the half-squared errors of outputs [B, K]."""
    return jnp.sum((outputs - batch["y"]) ** 2, axis=-1) / 2


def _metrics(outputs, batch):
    """{name: [B]} of outputs [B, K]."""
    return {"mse": jnp.mean((outputs - batch["y"]) ** 2, axis=-1)}


def pack(x: np.ndarray, y: np.ndarray, dtype) -> dict[str, np.ndarray]:
    """Inputs [N, d] and targets [N, K] as the fields of a data set, in the run's precision."""
    return {"x": x.astype(dtype), "y": y.astype(dtype)}


def build(config) -> Problem:
    """Builds the task `config.task.name`: `sine` or `gaussians_2d`."""
    function, x, x_test, clients = FUNCTIONS[config.task.name](config.task)
    dtype = np.dtype(config.precision)
    train, test = pack(x, function(x), dtype), pack(x_test, function(x_test), dtype)
    module = networks.build(config.model, num_outputs=train["y"].shape[1])
    # The domain is public: points on it that are nobody's, without their values.
    points = x_test[:: max(len(x_test) // PUBLIC, 1)]
    public = pack(points, np.zeros_like(function(points)), dtype)
    return Problem(regression(module, train["x"][0]), train, test, None, clients, public=public)


def _sine(task):
    """sin(2 pi x) on [0, 1]; each client an interval of equal length and a uniform grid on it."""

    def function(x):
        return np.sin(2 * np.pi * x)

    edges = np.linspace(0, 1, task.num_clients + 1)
    x = np.concatenate([np.linspace(a, b, task.examples_per_client) for a, b in itertools.pairwise(edges)])
    clients = np.split(np.arange(x.size), task.num_clients)
    return function, x[:, None], np.linspace(0, 1, 1000)[:, None], clients


# (A, mx, my, sx, sy) of the six anisotropic Gaussians of the published experiment.
GAUSSIANS = np.array(
    [
        (1.40, 0.18, 0.28, 0.06, 0.05),
        (0.90, 0.50, 0.28, 0.10, 0.06),
        (0.95, 0.82, 0.28, 0.11, 0.07),
        (0.75, 0.18, 0.72, 0.07, 0.06),
        (0.70, 0.50, 0.82, 0.07, 0.07),
        (0.80, 0.82, 0.74, 0.10, 0.07),
    ]
)


def _gaussians_2d(task):
    """A sum of six Gaussians on [0, 1]^2; six clients own the cells of a 2 x 3 grid, one peak in each."""

    def function(x):
        height, mx, my, sx, sy = GAUSSIANS.T
        return (height * np.exp(-(((x[:, :1] - mx) / sx) ** 2 + ((x[:, 1:] - my) / sy) ** 2) / 2)).sum(1, keepdims=True)

    rows, columns, n = 2, 3, task.examples_per_client
    corners = [(c / columns, r / rows) for r in range(rows) for c in range(columns)]
    draw = np.random.default_rng(task.seed)
    size = np.array([1 / columns, 1 / rows])
    x = np.concatenate([np.array(corner) + size * draw.random((n, 2)) for corner in corners])
    grid = np.linspace(0, 1, 256)
    x_test = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    return function, x, x_test, np.split(np.arange(x.shape[0]), len(corners))


# `config.task` -> (function x [N, d] -> y [N, K], x of the clients, x of the test set, the clients' indices)
FUNCTIONS = {"sine": _sine, "gaussians_2d": _gaussians_2d}
