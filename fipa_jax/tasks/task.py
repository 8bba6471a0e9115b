"""What is learned: the `Task` record, and the tasks known by name.

This is the only open set of the package: a new task is a new file here and one line in `TASKS`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature import contracts
from fipa_jax.lookup import lookup

Batch = dict[str, jax.Array]  # {field: [B, ...]}, with a leading example axis
Init = Callable[[jax.Array], Any]  # key -> params
Outputs = Callable[[Any, Batch], tuple]  # (params, batch) -> (outputs [B, ..., K], features: `Features`, or ())
Loss = Callable[[jax.Array, Batch], jax.Array]  # (outputs, batch) -> [B], the loss of each example
Metrics = Callable[[jax.Array, Batch], dict[str, jax.Array]]  # (outputs, batch) -> {name: [B, ...]}
Augment = Callable[[jax.Array, Batch], Batch]  # (key, batch) -> a random view of the batch
Figures = Callable[[dict], dict]  # {name: [N, ...]}, the metrics of a set's examples -> {name: []}, what is reported
Head = Callable[[Any, jax.Array], tuple]  # (params, body's features [B, F]) -> (outputs, features)


def unaugmented(key: jax.Array, batch: Batch) -> Batch:
    """The batch as it is, for tasks without random views."""
    return batch


def means(values: dict) -> dict:
    """{name: []}, the means over a set's examples of their metrics {name: [N]}."""
    return {name: jnp.mean(value) for name, value in values.items()}


class Task(NamedTuple):
    """A learning problem as pure functions of parameters and a batch.

    `outputs` apart from `loss` is what lets one definition serve training, Gauss-Newton products and terms on the
    features. Nothing here reduces over examples: padding and weights are the caller's.
    """

    init: Init
    outputs: Outputs
    loss: Loss
    metrics: Metrics  # of each example; a figure's name says if higher is better, see `reporting.metrics.HIGHER`
    augment: Augment = unaugmented  # of training batches
    figures: Figures = means  # of a set of examples; a client's are the means of those metrics that go by their names
    head: Head | None = None  # the head of the model alone, where it has one
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

    head = contracts.given(task.head, "task.head, which alone is to be trained")

    def outputs(params, batch):
        return head(params, batch["body"])

    return task._replace(outputs=outputs, augment=augment)


class Problem(NamedTuple):
    """A task with its data, and who owns which example."""

    task: Task
    train: dict  # {field: array [N, ...]}, all clients' examples
    test: dict  # {field: array [N_test, ...]}, the server's test set
    holdout: dict | None  # examples set apart from the training set for tuning, or None
    clients: Sequence[np.ndarray]  # per client, the indices of its examples in `train`
    test_clients: Sequence[np.ndarray] | None = None  # the same in `test`, where they have test examples of their own
    names: Sequence[str] = ()  # of the clients, where they have some
    classes: Sequence[str] = ()  # the names of the classes, where there are some
    targets: Sequence[str] = ("y",)  # the names of the K numbers to learn, where it is numbers
    baseline: tuple[str, dict] | None = None  # (a constant answer, {figure: what it has on the test set})
    public: dict | None = None  # examples that are no client's, in the fields of `train`; their labels mean nothing


def check(problem: Problem, params: Any) -> None:
    """Refuses a problem whose data, owners and functions do not fit together, before anything is trained on it.

    Args:
      problem: one of this package's, or of a user's own.
      params: the model's.

    Raises:
      ValueError: names the part of the problem, what was needed and what arrived.
    """
    sets = {"train": problem.train, "test": problem.test} | ({"holdout": problem.holdout} if problem.holdout else {})
    for name, data in sets.items():
        try:
            contracts.num_examples(data)
        except ValueError as error:
            raise ValueError(str(error).replace("batch:", f"problem.{name}:", 1)) from None
    _check_owners("clients", problem.clients, "train", contracts.num_examples(problem.train))
    if problem.test_clients is not None:
        _check_owners("test_clients", problem.test_clients, "test", contracts.num_examples(problem.test))
    task = problem.task
    few = {name: jax.ShapeDtypeStruct((2, *field.shape[1:]), field.dtype) for name, field in problem.train.items()}
    made = jax.eval_shape(task.outputs, params, few)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ValueError(
            "task.outputs: needed a pair (outputs [B, ..., K], features), with () for no features, got "
            f"{contracts.kind(made)}"
        )
    for name, value in jax.eval_shape(task.metrics, made[0], few).items():
        if value.shape[:1] != (2,):
            raise ValueError(
                f"task.metrics: needed an axis of examples, [B, ...], of {name!r}, got {value.shape} of two"
            )


def _check_owners(name: str, clients: Sequence[np.ndarray], of: str, number: int) -> None:
    """Refuses owners whose examples are no places of `number` examples."""
    owned = [np.asarray(own) for own in clients]
    for client, own in enumerate(owned):
        if own.ndim != 1 or (own.size and own.dtype.kind not in "iu"):
            raise ValueError(
                f"problem.{name}: needed the indices of a client's examples in `{of}`, integers [N_m], got "
                f"{contracts.kind(own)} for client {client}; of a mask take np.flatnonzero(mask)"
            )
        if own.size and not (own.min() >= 0 and own.max() < number):
            raise ValueError(
                f"problem.{name}: `{of}` has the examples 0 to {number - 1}, and client {client} those from "
                f"{own.min()} to {own.max()}"
            )


TASKS = {  # name in `config.task.name` -> the module whose `build(config)` makes its problem
    "sine": "fipa_jax.tasks.regression",
    "gaussians_2d": "fipa_jax.tasks.regression",
    "images": "fipa_jax.tasks.images",
    "pde": "fipa_jax.tasks.pde",
    "own_data": "fipa_jax.tasks.own_data",
    "text": "fipa_jax.tasks.text",
}


def build(config) -> Problem:
    """Builds `config.task.name`; the module is imported only now, so that one task does not need another's packages.

    Raises:
      ValueError: the name is not known.
    """
    module = lookup(TASKS, config.task.name, "config.task.name")
    return importlib.import_module(module).build(config)
