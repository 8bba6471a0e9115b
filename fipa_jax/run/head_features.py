"""How does a phase of the head alone do without the network? On the body's features of all examples, computed once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.federation.parallel import make_mesh
from fipa_jax.reporting import metrics
from fipa_jax.tasks import task as tasks
from fipa_jax.tasks.classification import averaged


def check(experiment, settings: ConfigDict, phase: str) -> None:
    """Checks that a phase trains the head alone, with which its features can be cached.

    Raises:
      ValueError: the model has no head, or more than it is trained, or there are no random views to keep; names the
        field of the phase.
    """
    task = experiment.problem.task
    if task.head is None:
        raise ValueError(f"config.{phase}.cache_body: this task's model has no head; set it to False")
    if settings.cache_views and task.augment is tasks.unaugmented:
        raise ValueError(f"config.{phase}.cache_views: this task shows no random views; set it to 0")
    trained = trees.select(experiment.params, settings.trainable)
    beyond = [path for path in trained if not re.search(task.head_pattern, path)]
    if beyond:
        raise ValueError(
            f"config.{phase}.cache_body needs config.{phase}.trainable to select parameters of the head alone, "
            f"{task.head_pattern!r}; it selects {beyond[0]!r}"
        )


def cached(experiment, params, num_views: int, by_shapes: bool = False):
    """The experiment seen by the model's head alone: the body's features of every example are computed once.

    The body does not move in such a phase, so no network is in its loop.

    Args:
      experiment: `experiment.Experiment`, and so is the result.
      params: the whole model's.
      num_views: V, random views of each training example whose features are computed too, for the head to train on;
        0 leaves augmentation out.
      by_shapes: compute nothing, and give arrays' shapes instead of arrays.
    """
    task, people, batch_size = experiment.problem.task, experiment.population, experiment.config.eval.batch_size
    of_batch = lambda params, batch: task.outputs(params, batch)[1].body
    run = jax.eval_shape if by_shapes else lambda function, *args: function(*args)

    def of_view(given, batch):
        params, key = given
        return of_batch(params, task.augment(jax.random.fold_in(key, batch["example"][0]), batch))

    def of_people(function, people, given):
        return jax.eval_shape(function, given, people.data) if by_shapes else people.values(function, given)

    body, view = (jax.jit(metrics.over_examples(function, batch_size)) for function in (of_batch, of_view))
    kept = lambda data: {name: field for name, field in data.items() if name != "image"}
    train = kept(people.data) | {"body": of_people(body, people, params)}
    if num_views:
        num_examples = jax.tree.leaves(people.data)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(experiment.root, 2**31 + 1), num_views)
        numbered = people.over(people.data | {"example": np.arange(num_examples, dtype=np.int32)})
        views = [of_people(view, numbered, (params, key)) for key in keys]
        stack = jnp.stack if by_shapes or isinstance(views[0], jax.Array) else np.stack  # they stay where they are
        train["views"] = run(lambda *views: stack(views, axis=1), *views)
    head, public = tasks.head_only(task), experiment.problem.public
    if public is not None:
        public = kept(public) | {"body": run(body, params, public)}
    return experiment._replace(
        problem=experiment.problem._replace(task=head, public=public),
        population=people.over(train),
        held={prefix: kept(data) | {"body": run(body, params, data)} for prefix, data in experiment.held.items()},
        evaluate=jax.jit(metrics.make_evaluate(head, batch_size, make_mesh(experiment.config.devices))),
        evaluate_drawn=jax.jit(metrics.make_evaluate(averaged(head), batch_size, make_mesh(experiment.config.devices))),
        compiled={},
    )
