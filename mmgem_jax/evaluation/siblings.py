"""Siblings: two scenes that differ in one late detail, and the two long texts that tell them apart.

A text is right where its own image is more similar to it than the image's sibling is. A model that
does not read so far gives both texts one embedding, and has one of the two right: 0.5, as chance.

Axes: I images, T texts, E joint embedding.
"""

from collections.abc import Sequence

import numpy as np

from mmgem_jax.errors import UserError

OTHER = {"a": "b", "b": "a"}


def siblings_of(keys: Sequence) -> np.ndarray:
    """The place of each image's sibling, int [I]: keys are alike but for a last letter a or b.

    Raises UserError naming the first image that has none.
    """
    keys = [str(key) for key in keys]
    place = {key: row for row, key in enumerate(keys)}
    found = []
    for key in keys:
        sibling = place.get(key[:-1] + OTHER[key[-1]]) if key[-1:] in OTHER else None
        if sibling is None:
            raise UserError(
                f"task siblings: image {key} has no sibling; expected two by two keys that end in "
                "a and b"
            )
        found.append(sibling)
    return np.asarray(found)


def sibling_metrics(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    text_image: Sequence[int],
    siblings: np.ndarray,
) -> dict[str, float]:
    """The share of texts [T, E] that prefer their image [I, E], by place [T], to its sibling.

    Equally similar is wrong. `siblings` are those of `siblings_of`.
    """
    own = np.asarray(text_image)
    images, texts = image_embeddings.astype(np.float64), text_embeddings.astype(np.float64)
    # As in `retrieval.score_blocks`: equal embeddings must tie.
    ours, other = (
        np.sum(texts * images[place], axis=1).astype(np.float32) for place in (own, siblings[own])
    )
    return {"accuracy": float(np.mean(ours > other))}
