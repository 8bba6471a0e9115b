"""What do tasks with classes share? Probabilities, the cross-entropy, and the figures of a classifier.

A classifier's outputs are logits: [B, K] of K classes, or [B, 1] of two, the second one's against the first one's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fipa_jax.tasks.task import Task, means


def loss(outputs: jax.Array, batch: dict) -> jax.Array:
    """[B], the cross-entropy of logits [B, K], or [B, 1] (Bernoulli), and `batch["label"]` [B]."""
    if outputs.shape[1] == 1:
        return optax.sigmoid_binary_cross_entropy(outputs[:, 0], batch["label"].astype(outputs.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])


def squared(outputs: jax.Array, batch: dict) -> jax.Array:
    """[B], half the squared distance of outputs [B, K] to the label's unit vector: a linear head has a closed form."""
    return jnp.sum((outputs - jax.nn.one_hot(batch["label"], outputs.shape[1], dtype=outputs.dtype)) ** 2, axis=1) / 2


LOSSES = {"cross_entropy": loss, "squared": squared}


def averaged(task: Task) -> Task:
    """The task of a classifier of several models, params [S, ...]: its logits [B, K] are log mean_s p_s.

    So the loss of each example is minus the logarithm of the mean likelihood, and calibration that of the mean.
    """

    def outputs(stacked, batch):
        each = jax.lax.map(lambda params: jnp.log(probabilities(task.outputs(params, batch)[0])), stacked)
        return jax.nn.logsumexp(each, axis=0) - jnp.log(len(each)), ()

    return task._replace(outputs=outputs)


def probabilities(outputs: jax.Array) -> jax.Array:
    """[B, K], the classes' probabilities, two of them for one logit."""
    if outputs.shape[1] == 1:
        return jax.nn.sigmoid(jnp.concatenate([-outputs, outputs], axis=1))
    return jax.nn.softmax(outputs, axis=1)


def metrics(outputs: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """{name: [B, ...]} of each example: its loss, whether it is classified rightly, its probabilities and its class."""
    probability = probabilities(outputs)
    correct = jnp.argmax(probability, axis=1) == batch["label"]
    of_each = {"accuracy": correct.astype(outputs.dtype), "loss": loss(outputs, batch)}
    return of_each | {"probability": probability, "label": batch["label"]}


def figures(values: dict) -> dict:
    """{name: []} of a set of examples, whose `metrics` {name: [N, ...]} are given.

    Accuracy, loss, the calibration error, and, as classes may differ in size, the mean of the classes' accuracies
    (`balanced_accuracy`) and of the areas under their receiver operating characteristics (`auc`). Classes that the set
    lacks count in neither.
    """
    correct, label, probability = values["accuracy"], values["label"], values["probability"]
    of_class = jax.nn.one_hot(label, probability.shape[1], dtype=probability.dtype)  # [N, K]
    size = jnp.sum(of_class, axis=0)
    right = jnp.sum(of_class * correct[:, None], axis=0)
    curves = jax.vmap(area_under_curve, in_axes=1)(probability, of_class > 0)
    return means({"accuracy": correct, "loss": values["loss"]}) | {
        "balanced_accuracy": _mean_where(size > 0, right / jnp.maximum(size, 1)),
        "auc": _mean_where(jnp.isfinite(curves), curves),
        "calibration_error": calibration_error(jnp.max(probability, axis=1), correct),
    }


def area_under_curve(score: jax.Array, positive: jax.Array) -> jax.Array:
    """[], the probability that a positive example has a higher score than another one, equal ones counting half.

    It is the area under the receiver operating characteristic, by ranks (Mann and Whitney 1947): (the mean of
    the positives' ranks - (n + 1) / 2) / m, with n positives and m others.

    Args:
      score: [N].
      positive: [N] bool.

    Returns:
      NaN where one of the two is missing.
    """
    ordered = jnp.sort(score)
    below, not_above = (jnp.searchsorted(ordered, score, side=side) for side in ("left", "right"))
    rank = (below + not_above + 1) / 2  # from 1 on; the mean of theirs for equal scores
    n = jnp.sum(positive).astype(rank.dtype)
    m = positive.size - n
    # By means: of 100,000 examples sums have more than 32 bits.
    above = jnp.sum(jnp.where(positive, rank / jnp.maximum(n, 1), 0)) - (n + 1) / 2
    return jnp.where((n > 0) & (m > 0), above / jnp.maximum(m, 1), jnp.nan).astype(score.dtype)


def calibration_error(confidence: jax.Array, correct: jax.Array, bins: int = 15) -> jax.Array:
    """Expected calibration error (Guo et al. 2017, eq. 3): sum_b n_b/N |accuracy_b - confidence_b|, over equal bins.

    Args:
      confidence: [N], the probability of the predicted class.
      correct: [N], 0 or 1.
    """
    which = jnp.clip(jnp.floor(confidence * bins).astype(int), 0, bins - 1)
    gap = jax.ops.segment_sum(correct - confidence, which, num_segments=bins)
    return jnp.sum(jnp.abs(gap)) / confidence.size


def of_the_largest_class(train: np.ndarray, test: np.ndarray, num_classes: int) -> tuple[int, dict[str, float]]:
    """(the largest class of the training labels, {figure: what who always answers by its shares has on the test}).

    Args:
      train, test: [N] and [N_test], labels.
      num_classes: K.
    """
    share = np.bincount(train, minlength=num_classes) / len(train)
    most = int(share.argmax())
    with np.errstate(divide="ignore"):
        cost = -np.log(share)[test].mean()
    figures = {"accuracy": (test == most).mean(), "loss": cost, "auc": 0.5}
    figures["balanced_accuracy"] = 1 / len(np.unique(test)) if most in test else 0.0
    return most, {name: float(value) for name, value in figures.items()}


def _mean_where(holds: jax.Array, values: jax.Array) -> jax.Array:
    """[], the mean of values [K] where `holds` [K]; NaN where it holds nowhere."""
    number = jnp.sum(holds)
    total = jnp.sum(jnp.where(holds, values, 0))
    return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)
