"""Pairs of scenes by their keys, and which of the two a text prefers."""

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.siblings import sibling_metrics, siblings_of


def test_siblings_differ_in_the_last_letter():
    assert siblings_of(["s/1a", "s/2b", "s/1b", "s/2a"]).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("keys", [["1a", "1b", "2a"], ["1a", "1c"], [1, 2], [""]])
def test_an_image_without_a_sibling_is_named(keys):
    with pytest.raises(UserError, match=r"task siblings: image .* has no sibling; expected two by"):
        siblings_of(keys)


def test_the_own_image_must_be_more_similar():
    images = np.eye(4, dtype=np.float32)
    siblings = np.asarray([1, 0, 3, 2])
    right = sibling_metrics(images, images, [0, 1, 2, 3], siblings)
    wrong = sibling_metrics(images, images[[1, 0, 3, 2]], [0, 1, 2, 3], siblings)
    same = sibling_metrics(images, images[[0, 0, 3, 3]], [0, 1, 2, 3], siblings)
    assert [scores["accuracy"] for scores in (right, wrong, same)] == [1, 0, 0.5]
    # A tie is no preference; other scenes are not asked.
    ties = sibling_metrics(images, images[[2, 2, 0, 0]], [0, 1, 2, 3], siblings)
    assert ties["accuracy"] == 0
