"""The figures of a classifier against NumPy and scikit-learn, on sets with ties and missing classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.reporting import metrics
from fipa_jax.tasks import classification

scores = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle")


def _values(num_classes, size=60, seed=0, present=None):
    """(logits [N, K] with ties, labels [N])."""
    draw = np.random.default_rng(seed)
    logits = np.round(draw.normal(size=(size, 1 if num_classes == 2 else num_classes)), 1)
    label = draw.choice(num_classes if present is None else present, size)
    return jnp.asarray(logits, jnp.float32), jnp.asarray(label)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_figures_are_those_of_scikit_learn(num_classes):
    logits, label = _values(num_classes)
    of_each = classification.metrics(logits, {"label": label})
    found = jax.jit(classification.figures)(of_each)
    probability = np.asarray(of_each["probability"], np.float64)
    answer = probability.argmax(1)
    score = probability[:, 1] if num_classes == 2 else probability / probability.sum(1, keepdims=True)
    wanted = {
        "accuracy": scores.accuracy_score(label, answer),
        "balanced_accuracy": scores.balanced_accuracy_score(label, answer),
        "loss": scores.log_loss(label, probability / probability.sum(1, keepdims=True)),
        "auc": scores.roc_auc_score(label, score, multi_class="ovr"),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)
    assert set(found) == {*wanted, "calibration_error"}


def test_classes_that_a_set_lacks_do_not_count():
    logits, label = _values(4, present=[0, 2])
    found = classification.figures(classification.metrics(logits, {"label": label}))
    right = np.asarray(jnp.argmax(logits, 1) == label)
    wanted = np.mean([right[np.asarray(label) == k].mean() for k in (0, 2)])
    np.testing.assert_allclose(found["balanced_accuracy"], wanted, rtol=1e-5)
    curves = [scores.roc_auc_score(np.asarray(label) == k, jax.nn.softmax(logits)[:, k]) for k in (0, 2)]
    np.testing.assert_allclose(found["auc"], np.mean(curves), rtol=1e-5)


def test_of_one_class_alone_there_is_no_curve():
    logits, _ = _values(2)
    found = classification.figures(classification.metrics(logits, {"label": jnp.ones(len(logits), int)}))
    assert np.isnan(found["auc"]) and np.isfinite(found["balanced_accuracy"])


def test_one_logit_is_two_logits_of_which_one_is_zero():
    logits, label = _values(2)
    pair = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
    for a, b in zip(
        *(jax.tree.leaves(classification.metrics(x, {"label": label})) for x in (logits, pair)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_constant_answer_is_that_of_a_dummy():
    from sklearn.dummy import DummyClassifier

    draw = np.random.default_rng(3)
    train, test = draw.choice(3, 50, p=[0.2, 0.5, 0.3]), draw.choice(3, 40)
    most, found = classification.of_the_largest_class(train, test, 3)
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((50, 1)), train)
    answer, probability = dummy.predict(np.zeros((40, 1))), dummy.predict_proba(np.zeros((40, 1)))
    assert most == answer[0]
    np.testing.assert_allclose(found["accuracy"], scores.accuracy_score(test, answer))
    np.testing.assert_allclose(found["loss"], scores.log_loss(test, probability))
    np.testing.assert_allclose(found["balanced_accuracy"], scores.balanced_accuracy_score(test, answer))


def test_a_clients_figures_are_those_that_are_means():
    logits, label = _values(3)
    own = metrics.of_clients(classification.metrics(logits, {"label": label}), classification.figures)
    assert set(own) == {"accuracy", "loss"}


def test_calibration_error_by_hand():
    draw = np.random.default_rng(0)
    confidence, correct = draw.uniform(0.1, 1, 200), draw.integers(0, 2, 200).astype(float)
    confidence[:3] = [1.0, 0.0, 1 / 15]
    wanted = 0.0
    for b in range(15):
        chosen = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | ((b == 14) & (confidence == 1)))
        if chosen.any():
            wanted += chosen.mean() * abs(correct[chosen].mean() - confidence[chosen].mean())
    found = classification.calibration_error(jnp.asarray(confidence), jnp.asarray(correct))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_area_under_the_curve_of_a_large_test_set_in_float32():
    """Of 120,000 examples the pairs do not fit into 32 bits."""
    positive = np.arange(120_000) % 6 < 5
    score = (np.random.default_rng(0).normal(size=positive.size) + positive).astype(np.float32)
    found = jax.jit(classification.area_under_curve)(jnp.asarray(score), jnp.asarray(positive))
    np.testing.assert_allclose(found, scores.roc_auc_score(positive, score), rtol=1e-6)
