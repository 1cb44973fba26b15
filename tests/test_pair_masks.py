"""Which pairs are no negatives of each other: those that share an id, regions that overlap."""

import jax.numpy as jnp
import numpy as np
import plain_losses
import pytest
import tiny

from mmgem_jax.contrastive import Marks, Masks, rivals
from mmgem_jax.losses import Pairs


def masked(ids, image, boxes, masks, valid=None):
    """bool [N, N] of the pairs that these masks leave out, and that are no rivals for it."""
    N = len(ids)
    valid = np.ones(N, bool) if valid is None else valid
    pairs = Pairs(*map(jnp.asarray, (ids, image, boxes, valid)))
    marks = Marks(pairs, jnp.arange(N))
    rival, found = map(np.asarray, rivals(marks, marks, masks))
    different = valid[:, None] & valid[None] & ~np.eye(N, dtype=bool)
    np.testing.assert_array_equal(rival, different & ~found)
    return found


def test_duplicates_are_pairs_that_share_any_id():
    # 0 and 1 share the caption, 1 and 2 the text, and 3's text is 0's and 1's caption.
    ids = np.array([[5, 1], [5, 2], [6, 2], [8, 5]])
    expected = np.zeros((4, 4), bool)
    for i, j in ((0, 1), (1, 2), (0, 3), (1, 3)):
        expected[i, j] = expected[j, i] = True
    found = masked(ids, np.arange(4), np.zeros((4, 4), np.float32), Masks(True, 1.0))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(plain_losses.duplicate_mask(jnp.asarray(ids)), expected)


def plain_overlap(first, second):
    """Intersection over union of two boxes."""
    sides = [max(0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (area - shared)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_regions_overlap_within_their_image_alone(threshold):
    boxes = tiny.random_boxes(np.random.default_rng(3), (4, 6))
    image, ids = np.repeat(np.arange(4), 6), np.arange(24)[:, None]
    found = masked(ids, image, boxes.reshape(24, 4), Masks(False, threshold))
    expected = np.zeros((24, 24), bool)
    for image in range(4):
        for i in range(6):
            for j in range(6):
                over = plain_overlap(boxes[image, i], boxes[image, j])
                expected[image * 6 + i, image * 6 + j] = i != j and over > threshold
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        plain_losses.overlap_mask(jnp.asarray(boxes), threshold), expected
    )
    assert 0 < expected.sum() < 4 * 30


def test_padding_and_equal_boxes():
    boxes = np.zeros((4, 4), np.float32)
    boxes[:2] = 0.1, 0.2, 0.6, 0.7  # twice the same, and two of padding
    ids, image, valid = np.arange(4)[:, None], np.zeros(4, int), np.arange(4) < 2
    found = masked(ids, image, boxes, Masks(False, 0.99), valid)
    assert np.argwhere(found).tolist() == [[0, 1], [1, 0]]
    assert not masked(ids, image, boxes, Masks(True, 1.0), valid).any()
