"""Zero-shot classification: an image's class is the one whose prompts it is most similar to.

Or, by the decoder, the one whose text is the likeliest for the image (`likelihood_metrics`).

The protocol is CLIP's (Radford et al., 2021, arXiv 2103.00020, section 3.1): the class weight is
the normalised mean of its normalised prompt embeddings, over an ensemble of templates.

Axes: I images, C classes, P prompts of a class, E joint embedding.
"""

from collections.abc import Sequence

import numpy as np

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.retrieval import (
    best_ranks,
    first_relevant_rank,
    require_finite,
    require_length,
    unit_embeddings,
)


def class_weights(prompt_embeddings: np.ndarray) -> np.ndarray:
    """One unit vector a class, float32 [C, E], out of its prompts' embeddings [C, P, E].

    Raises UserError where a vector to normalise is zero or not finite.
    """
    prompts = np.asarray(prompt_embeddings, np.float64)
    if prompts.ndim != 3 or not prompts.size:
        raise UserError(
            f"prompt_embeddings: found the shape {prompts.shape},"
            " expected [classes, prompts, width]"
        )
    means = _normalised(prompts).mean(axis=1)
    return _normalised(means).astype(np.float32)


def prompted_metrics(
    embeddings: np.ndarray, prompts: np.ndarray, templates: int, labels: Sequence[int]
) -> dict[str, float]:
    """`classification_metrics` of embeddings [I, E] by the prompts [C * P, E] of the classes.

    `templates` is P; the prompts of a class stand together.
    """
    weights = class_weights(prompts.reshape(-1, templates, prompts.shape[1]))
    return classification_metrics(embeddings, weights, labels)


def check_labels(where: str, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """Raises UserError where a label has no class name."""
    if max(labels) >= len(class_names):
        raise UserError(
            f"class_names: found {len(class_names)}, expected {max(labels) + 1} or more, for "
            f"{where} has the label {max(labels)}"
        )


def classification_metrics(
    image_embeddings: np.ndarray,
    weights: np.ndarray,
    labels: Sequence[int],
    block_size: int = 256,
) -> dict[str, float]:
    """Accuracy of images [I, E] against class weights [C, E] and labels [I].

    `acc1`; `acc5` where there are five classes or more; `mean_per_class_recall` over the classes
    that occur in the labels. Of equally similar classes the one with the lower index is the answer.
    Raises UserError where embeddings, labels or sizes do not fit.
    """
    images = unit_embeddings("image_embeddings", image_embeddings)
    weights = unit_embeddings("weights", weights)
    labels = _labels(labels, "image_embeddings", len(images), len(weights))
    ranks = best_ranks(images, weights, labels, np.arange(len(weights)), block_size)
    return _accuracies(ranks, labels, len(weights))


def likelihood_metrics(log_probs: np.ndarray, labels: Sequence[int]) -> dict[str, float]:
    """The keys of `classification_metrics` for log P(class text | image), [I, C], and labels [I].

    An image's class is the one whose text is the likeliest. Raises UserError where the labels do
    not fit or a log P is not finite.
    """
    images, classes = log_probs.shape
    require_finite("log_probs", log_probs)
    labels = _labels(labels, "log_probs", images, classes)
    ranks = first_relevant_rank(log_probs, labels[:, None] == np.arange(classes))
    return _accuracies(ranks, labels, classes)


def _labels(labels: Sequence[int], other: str, images: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    require_length("labels", labels, other, images)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise UserError(
            f"labels: found {labels[outside[0]]} in row {outside[0]}, expected 0 to {classes - 1}"
        )
    return labels


def _accuracies(ranks: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """The metrics of the rank [I], from 1, that each image's own class has."""
    metrics = {"acc1": float(np.mean(ranks <= 1))}
    if classes >= 5:
        metrics["acc5"] = float(np.mean(ranks <= 5))
    images_of_class = np.bincount(labels)
    present = images_of_class > 0
    right_of_class = np.bincount(labels, weights=ranks == 1)
    recall = right_of_class[present] / images_of_class[present]
    return metrics | {"mean_per_class_recall": float(recall.mean())}


def _normalised(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    wrong = np.argwhere(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise UserError(
            f"prompt_embeddings: class {wrong[0][0]} holds or averages to a vector of the length"
            f" {lengths[tuple(wrong[0])]:.4g}, expected one that can be normalised"
        )
    return vectors / lengths
