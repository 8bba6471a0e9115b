"""What is learned: the `Task` record, and the tasks known by name.

This is the only open set of the package: a new task is a new file here and one line in `TASKS`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Task(NamedTuple):
    """A learning problem as pure functions of parameters and a batch.

    A batch is a dict of arrays with a leading example axis [B, ...]. `outputs` apart from `loss` is what lets one
    definition serve training, Gauss-Newton products and terms on the features. Nothing here reduces over examples:
    padding and weights are the caller's.
    """

    init: Callable  # key -> params
    outputs: Callable  # (params, batch) -> (outputs [B, K], features: `models.Features`, or () if there are none)
    loss: Callable  # (outputs, batch) -> [B], loss of each example
    metrics: Callable  # (outputs, batch) -> {name: [B]}; averaged over examples; `accuracy` in a name: higher is better
    augment: Callable = lambda key, batch: batch  # a random view of a training batch
    figures: Callable = lambda means: means  # {name: mean over examples} -> what is reported of them
    head: Callable | None = None  # (params, body's features [B, F]) -> (outputs, features): the head alone
    head_pattern: str = ""  # regular expression for the paths of the head's parameters


def head_only(task: Task) -> Task:
    """The task seen by the head alone: its batches hold the body's features, `body` [B, F], instead of the inputs.

    Where they also hold those of V random views, `views` [B, V, F], one of them at random is the augmented example.
    """

    def augment(key, batch):
        if "views" not in batch:
            return batch
        num_examples, num_views, _ = batch["views"].shape
        drawn = jax.random.randint(key, [num_examples], 0, num_views)
        return {**batch, "body": batch["views"][jnp.arange(num_examples), drawn]}

    return task._replace(outputs=lambda params, batch: task.head(params, batch["body"]), augment=augment)


class Problem(NamedTuple):
    """A task with its data, and who owns which example."""

    task: Task
    train: dict  # {field: array [N, ...]}, all clients' examples
    test: dict  # {field: array [N_test, ...]}, the server's test set
    holdout: dict | None  # examples set apart from the training set for tuning, or None
    clients: Sequence[np.ndarray]  # per client, the indices of its examples in `train`


TASKS = {
    "sine": "fipa_jax.tasks.regression",
    "gaussians_2d": "fipa_jax.tasks.regression",
    "images": "fipa_jax.tasks.images",
    "pde": "fipa_jax.tasks.pde",
    "npz": "fipa_jax.tasks.own_data",
}


def build(config) -> Problem:
    """Builds `config.task.name`; the module is imported only now, so that one task does not need another's packages.

    Raises:
      ValueError: the name is not known.
    """
    if config.task.name not in TASKS:
        raise ValueError(f"config.task.name: unknown task {config.task.name!r}; known: {', '.join(sorted(TASKS))}")
    return importlib.import_module(TASKS[config.task.name]).build(config)
