"""The honest floor under a retrieval score: what bare pixels reach, without any learning.

Every drawing is shrunk to 16 x 16 RGB by PIL's antialiased bilinear filter (the strictest floor of
its filters), the sides stretched to match. A test drawing is as near to a name as to the nearest
training drawing of that name, by L2 over the pixels. Names are ranked for a drawing, and drawings
for a name, by that distance. A model that does not beat this has learned little more than colour
and layout.

Axes: I test drawings, M names of the gallery, D pixel values of a shrunken drawing.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.retrieval import (
    RECALL_AT,
    first_relevant_rank,
    rank_metrics,
    require_length,
)

SIDE = 16


def pixel_floor(
    train_images: Sequence[np.ndarray],
    train_names: Sequence[str],
    test_images: Sequence[np.ndarray],
    test_names: Sequence[str],
    ks: Sequence[int] = RECALL_AT,
    block_size: int = 256,
) -> dict[str, float]:
    """The keys of `retrieval_metrics`, for the nearest training drawing by pixels.

    Images are uint8 [H, W, 3] on the background they are to be compared on. The gallery of names
    is that of the test drawings, in sorted order, which decides ties; other training drawings are
    not looked at. A test name that no training drawing has is never found at any k, and counts in
    the median with the rank one past the gallery's end. Raises UserError where sizes do not fit.
    """
    require_length("train_names", train_names, "train_images", len(train_images))
    require_length("test_names", test_names, "test_images", len(test_images))
    if not len(test_images):
        raise UserError("test_images: found none, expected one or more")
    names, test_ids = np.unique(test_names, return_inverse=True)
    index = {name: place for place, name in enumerate(names.tolist())}
    in_gallery = [row for row, name in enumerate(train_names) if name in index]
    in_gallery.sort(key=lambda row: index[train_names[row]])
    train_ids = np.array([index[train_names[row]] for row in in_gallery], int)
    train = _shrunken("train_images", train_images, in_gallery)
    test = _shrunken("test_images", test_images, range(len(test_images)))

    scores = np.full((len(test), len(names)), -np.inf)
    if in_gallery:
        starts = np.flatnonzero(np.diff(train_ids, prepend=-1))  # where the next name begins
        for start in range(0, len(test), block_size):
            block = slice(start, start + block_size)
            distances = _squared_distances(test[block], train)
            scores[block, train_ids[starts]] = -np.minimum.reduceat(distances, starts, axis=1)
    relevant = test_ids[:, None] == np.arange(len(names))  # [I, M]
    of_images = first_relevant_rank(scores, relevant)
    of_names = first_relevant_rank(scores.T, relevant.T)
    return rank_metrics("image_to_text", of_images, len(names), ks) | rank_metrics(
        "text_to_image", of_names, len(test), ks
    )


def _shrunken(field: str, images: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
    shrunken = np.empty((len(rows), SIDE * SIDE * 3))
    for place, row in enumerate(rows):
        image = np.asarray(images[row])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"{field}: image {row} is {image.dtype} {image.shape}, expected uint8 [H, W, 3]"
            )
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        shrunken[place] = np.asarray(small).ravel()
    return shrunken


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    # Whole numbers below 2^53: exact in float64, so equal distances are equal to the last bit.
    squares = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)
    return squares - 2 * left @ right.T
