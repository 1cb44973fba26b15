"""Retrieval of regions by their texts: among all of a set, and among those of one image.

A text and a box are relevant to each other when a region of the data set has both; texts are what
`normalise_caption` leaves of them. Boxes that share a text are all right answers to it: of two
clouds neither is the other's error. And regions of one box, which is an object with several texts,
are one item to find, with any of these texts as an answer.

Axes: N regions, T distinct texts, M distinct boxes, E joint embedding.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np

from mmgem_jax.evaluation.captioning import normalise_caption
from mmgem_jax.evaluation.retrieval import (
    RECALL_AT,
    chance_of,
    first_relevant_rank,
    rank_metrics,
    ranks_of,
    unit_embeddings,
)


@dataclasses.dataclass(frozen=True)
class Truth:
    """Which of a data set's regions share a text, and which a box."""

    images: np.ndarray  # int [N], the image of each region
    text_of: np.ndarray  # int [N], which distinct text is each region's
    box_of: np.ndarray  # int [N], which distinct box
    texts: list[str]  # T, each as it is first written
    boxes: np.ndarray  # int [M], the first region of each distinct box

    def by_image(self) -> Iterator[np.ndarray]:
        """For each image that has regions, their places, int [n]."""
        order = np.argsort(self.images, kind="stable")
        return iter(np.split(order, np.flatnonzero(np.diff(self.images[order])) + 1))


def truth_of(regions) -> Truth:
    """The truth about Regions."""
    first_texts, text_of = _distinct(map(normalise_caption, regions.texts))
    boxes = zip(regions.images.tolist(), map(bytes, regions.boxes), strict=True)
    first_boxes, box_of = _distinct(boxes)
    texts = [regions.texts[place] for place in first_texts]
    return Truth(regions.images, text_of, box_of, texts, first_boxes)


def _distinct(values: Iterable[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct value first is, and which of them each value is."""
    first, found = {}, []
    for place, value in enumerate(values):
        number, _ = first.setdefault(value, (len(first), place))
        found.append(number)
    return np.asarray([place for _, place in first.values()]), np.asarray(found)


def region_retrieval_metrics(
    truth: Truth,
    embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    ks: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Recall@k and median ranks of regions [N, E] and of the texts of their truth [T, E].

    `text_to_region_*`: each distinct text, among all boxes. `region_to_text_*`: each box, among all
    distinct texts. `within_image_*`: each region's text, among the boxes of its image; it counts
    for k where these are more than k, since else k find everything (and for the median where they
    are two or more). `within_image_chance` is what a random order has at k = 1. A k that no gallery
    is large enough for is left out. Raises UserError where embeddings do not fit.
    """
    texts = unit_embeddings("text_embeddings", text_embeddings)
    boxes = unit_embeddings("embeddings", embeddings)[truth.boxes]
    to_box = ranks_of(texts, boxes, relevance(truth.text_of, truth.box_of))
    to_text = ranks_of(boxes, texts, relevance(truth.box_of, truth.text_of))
    metrics = rank_metrics("text_to_region", to_box, len(boxes), ks)
    metrics |= rank_metrics("region_to_text", to_text, len(texts), ks)

    ranks, sizes = np.zeros(len(embeddings), int), np.zeros(len(embeddings), int)
    for own, gallery, relevant in within_images(truth):
        scores = texts[truth.text_of[own]].astype(np.float64) @ boxes[gallery].astype(np.float64).T
        ranks[own] = first_relevant_rank(scores.astype(np.float32), relevant)  # equal boxes tie
        sizes[own] = len(gallery)
    for k in ks:
        if (sizes > k).any():
            metrics[f"within_image_r{k}"] = float(np.mean(ranks[sizes > k] <= k))
    if (sizes > 1).any():
        metrics["within_image_median_rank"] = float(np.median(ranks[sizes > 1]))
        metrics["within_image_chance"] = within_image_chance(truth, (1,))["within_image_r1"]
    return metrics


def region_chance_metrics(truth: Truth, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What a random ranking has; the median within an image is left out."""
    pairs = np.unique(np.stack([truth.text_of, truth.box_of]), axis=1)
    sizes = len(truth.texts), len(truth.boxes)
    of_text, of_box = (
        np.bincount(side, minlength=size) for side, size in zip(pairs, sizes, strict=True)
    )
    metrics = chance_of("text_to_region", of_text, sizes[1], ks)
    metrics |= chance_of("region_to_text", of_box, sizes[0], ks)
    return metrics | within_image_chance(truth, ks)


def within_image_chance(truth: Truth, ks: Sequence[int]) -> dict[str, float]:
    """The `within_image_*` recalls of a random order.

    With n boxes, r of them relevant, P(best rank <= k) = 1 - C(n - r, k) / C(n, k).
    """
    found = {k: [] for k in ks}
    for _, gallery, relevant in within_images(truth):
        n, r = len(gallery), relevant.sum(axis=1)
        for k in (k for k in ks if k < n):
            place = np.arange(k)
            missed = np.maximum(n - r[:, None] - place, 0) / (n - place)
            found[k].append(1 - missed.prod(axis=1))
    return {
        f"within_image_r{k}": float(np.concatenate(shares).mean())
        for k, shares in found.items()
        if shares
    }


def within_images(truth: Truth) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each image its regions [n], its distinct boxes [m], and what is right, bool [n, m].

    A box is right for a region's text where any region of that box has the same text.
    """
    for own in truth.by_image():
        gallery, column = np.unique(truth.box_of[own], return_inverse=True)
        same_text = truth.text_of[own, None] == truth.text_of[own]
        yield own, gallery, same_text @ (column[:, None] == np.arange(len(gallery)))


def relevance(queries: np.ndarray, items: np.ndarray) -> Callable[[slice, slice], np.ndarray]:
    """The function `relevant` of `ranks_of`, where these pairs [N] of both are relevant."""
    order = np.argsort(queries, kind="stable")
    queries, items = queries[order], items[order]

    def relevant(rows: slice, columns: slice) -> np.ndarray:
        own = slice(*np.searchsorted(queries, [rows.start, rows.stop]))
        row, column = queries[own] - rows.start, items[own] - columns.start
        inside = (column >= 0) & (column < columns.stop - columns.start)
        found = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
        found[row[inside], column[inside]] = True
        return found

    return relevant
