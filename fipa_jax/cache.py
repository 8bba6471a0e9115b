"""How does a phase of the head alone do without the network? On the body's features of all examples, computed once."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fipa_jax import metrics, tasks, trees


def check(experiment, settings: ConfigDict, phase: str) -> None:
    """Checks that a phase trains the head alone, with which its features can be cached.

    Raises:
      ValueError: the model has no head, or more than it is trained; names the field of `config.PHASE`.
    """
    task = experiment.problem.task
    if task.head is None:
        raise ValueError(f"config.{phase}.cache_body: this task's model has no head; set it to False")
    trained = trees.select(experiment.params, settings.trainable)
    beyond = [path for path in trained if not re.search(task.head_pattern, path)]
    if beyond:
        raise ValueError(
            f"config.{phase}.cache_body needs config.{phase}.trainable to select parameters of the head alone, "
            f"{task.head_pattern!r}; it selects {beyond[0]!r}"
        )


def cached(experiment, params, num_views: int, run: Callable = lambda f, *args: f(*args)):
    """The experiment seen by the model's head alone: the body's features of every example are computed once.

    The body does not move in such a phase, so no network is in its loop.

    Args:
      experiment: `experiment.Experiment`, and so is the result.
      params: the whole model's.
      num_views: V, random views of each training example whose features are computed too, for the head to train on;
        0 leaves augmentation out.
      run: (function, *args) -> its result; `jax.eval_shape` gives shapes alone.
    """
    task, batch_size = experiment.problem.task, experiment.config.eval.batch_size
    of_batch = lambda params, batch: task.outputs(params, batch)[1].body
    of_view = lambda params, batch: of_batch(params, task.augment(batch["key"][0], batch))
    body, view = (jax.jit(metrics.over_examples(function, batch_size)) for function in (of_batch, of_view))
    kept = lambda data: {name: field for name, field in data.items() if name != "image"}
    replace = lambda data: kept(data) | {"body": run(body, params, data)}
    head, train = tasks.head_only(task), replace(experiment.train)
    if num_views:
        num_examples = jax.tree.leaves(experiment.train)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(experiment.root, 2**31 + 1), [num_views, num_examples])
        views = [run(view, params, experiment.train | {"key": key}) for key in keys]
        train["views"] = run(lambda *views: jnp.stack(views, axis=1), *views)
    return experiment._replace(
        problem=experiment.problem._replace(task=head),
        train=train,
        held={prefix: replace(data) for prefix, data in experiment.held.items()},
        evaluate=jax.jit(metrics.make_evaluate(head, batch_size)),
        compiled={},
    )
