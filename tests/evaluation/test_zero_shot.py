"""Class weights and accuracies against plain loops."""

import math

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.zero_shot import (
    class_weights,
    classification_metrics,
    likelihood_metrics,
)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_class_weights_normalise_average_normalise():
    rng = np.random.default_rng(0)
    # Lengths from .1 to 10: a plain mean of the prompts would be another vector.
    prompts = rng.normal(size=(4, 3, 6)) * 10 ** rng.uniform(-1, 1, size=(4, 3, 1))
    weights = class_weights(prompts.astype(np.float32))
    assert weights.shape == (4, 6) and weights.dtype == np.float32
    for weight, class_prompts in zip(weights.tolist(), prompts.tolist(), strict=True):
        total = [0.0] * 6
        for prompt in class_prompts:
            length = math.sqrt(sum(value * value for value in prompt))
            total = [sum_ + value / length for sum_, value in zip(total, prompt, strict=True)]
        length = math.sqrt(sum(value * value for value in total))
        assert weight == pytest.approx([value / length for value in total], abs=1e-6)


def loops(images, weights, labels):
    right, top5, of_class = 0, 0, {}
    for image, label in zip(images.tolist(), labels.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(image, row, strict=True)) for row in weights.tolist()]
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        right += order[0] == label
        top5 += label in order[:5]
        of_class.setdefault(label, []).append(order[0] == label)
    recalls = [sum(answers) / len(answers) for answers in of_class.values()]
    expected = {"acc1": right / len(labels), "mean_per_class_recall": sum(recalls) / len(recalls)}
    return expected | ({"acc5": top5 / len(labels)} if len(weights) >= 5 else {})


@pytest.mark.parametrize("classes", [3, 4, 5, 9])
@pytest.mark.parametrize("tied", [False, True])
def test_metrics_are_those_of_plain_loops(classes, tied):
    rng = np.random.default_rng(classes)
    draw = (lambda *shape: rng.choice([-1, 1], shape)) if tied else (lambda *s: rng.normal(size=s))
    images, weights = unit(draw(60, 4)), unit(draw(classes, 4))
    labels = rng.integers(0, classes, size=60) ** 2 // classes  # unequal, the last class absent
    metrics = classification_metrics(images, weights, labels)
    assert metrics == pytest.approx(loops(images, weights, labels), abs=1e-12)
    assert metrics["acc1"] != metrics["mean_per_class_recall"]
    assert classification_metrics(images, weights, labels, block_size=7) == metrics


def test_the_likeliest_text_is_the_class():
    rng = np.random.default_rng(0)
    log_probs = np.round(rng.normal(size=(60, 7)), 1)  # with ties, that the lower index wins
    labels = rng.integers(0, 6, 60)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    right = order[:, 0] == labels
    assert likelihood_metrics(log_probs, labels) == {
        "acc1": right.mean(),
        "acc5": np.mean((order[:, :5] == labels[:, None]).any(axis=1)),
        "mean_per_class_recall": pytest.approx(
            np.mean([right[labels == label].mean() for label in range(6)])
        ),
    }
    assert "acc5" not in likelihood_metrics(log_probs[:, :4], labels % 4)
    with pytest.raises(UserError, match="labels: found 7 in row 0, expected 0 to 6"):
        likelihood_metrics(log_probs, np.full(60, 7))
    log_probs[3, 2] = np.nan
    with pytest.raises(UserError, match="log_probs: found nan at 3, 2, expected a number"):
        likelihood_metrics(log_probs, labels)


def test_of_equal_classes_the_lower_index_is_the_answer():
    image = np.array([[1.0, 0.0]], np.float32)
    weights = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], np.float32)
    assert classification_metrics(image, weights, [1])["acc1"] == 1
    assert classification_metrics(image, weights, [2])["acc1"] == 0


def test_what_cannot_be_scored_is_an_error():
    images, weights = unit(np.ones((2, 3))), np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="labels: found 3 in row 1, expected 0 to 2"):
        classification_metrics(images, weights, [0, 3])
    with pytest.raises(UserError, match="labels: found 1 values, expected 2"):
        classification_metrics(images, weights, [0])
    with pytest.raises(UserError, match="weights: row 0 has the length 2"):
        classification_metrics(images, 2 * weights, [0, 1])
    with pytest.raises(UserError, match=r"prompt_embeddings: found the shape \(3, 3\)"):
        class_weights(weights)
    with pytest.raises(UserError, match="class 1 holds or averages to"):
        class_weights(np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]]))
    with pytest.raises(UserError, match="class 0 holds or averages to"):
        class_weights(np.array([[[np.nan, 0.0]]]))
