"""Where phrases point, on maps made by hand."""

import numpy as np
import pytest

from mmgem_jax.evaluation.examples import Regions
from mmgem_jax.evaluation.pointing import cell_centres, pointed_cells, pointing_metrics
from mmgem_jax.evaluation.region_retrieval import truth_of

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def score(boxes, texts, images, pointed, map_shape=(2, 4)):
    made = Regions(np.asarray(images), np.float32(boxes), texts, list(range(len(texts))))
    return pointing_metrics(truth_of(made), made.boxes, np.asarray(pointed), map_shape)


def test_the_most_similar_cell_is_pointed_at_and_of_equal_ones_the_first():
    cells = np.zeros((2, 3, 2), np.float32)
    cells[..., 0] = 1  # all cells but one are alike
    cells[1, 1] = (0, 1)
    assert pointed_cells(cells, np.float32([[0, 1], [1, 0]])).tolist() == [4, 0]


def test_centres_are_x_and_y_row_by_row():
    np.testing.assert_allclose(
        cell_centres(2, 3),
        [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [1 / 6, 0.75], [0.5, 0.75], [5 / 6, 0.75]],
    )


def test_right_is_in_the_box():
    found = score([LEFT, RIGHT, RIGHT], ["cat", "dog", "sun"], [0, 0, 1], [1, 1, 6])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["chance"], found["reachable"]) == (0.5, 1)


def test_a_phrase_may_point_at_any_region_of_its_image_that_has_it():
    found = score([LEFT, RIGHT, LEFT], ["Cat", "cat", "cat"], [0, 0, 1], [3, 0, 3])
    assert found["accuracy"] == pytest.approx(2 / 3)  # not the other image's
    assert found["chance"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_box_between_the_centres_cannot_be_hit():
    found = score([(0.3, 0, 0.35, 1), LEFT], ["pin", "cat"], [0, 0], [1, 0])
    assert found == {"accuracy": 0.5, "chance": 0.25, "reachable": 0.5}


def test_a_box_that_is_tall_is_not_one_that_is_wide():
    found = score([(0, 0, 0.25, 1), (0, 0, 1, 0.5)], ["tall", "wide"], [0, 0], [4, 3])
    assert found["accuracy"] == 1
    found = score([(0, 0, 0.25, 1), (0, 0, 1, 0.5)], ["tall", "wide"], [0, 0], [3, 4])
    assert found["accuracy"] == 0
