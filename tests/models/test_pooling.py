"""PoolAggregator against RoIAlign in plain loops, and what it is for simple boxes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax.models.pooling import (
    WHOLE_IMAGE,
    bin_weights,
    boxes_around_cells,
    check_boxes,
    pool,
)

TOLERANCE = 1e-5
WHOLE = np.array([[WHOLE_IMAGE]], np.float32)


def feature_map(height, width, depth=3, batch=1, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((batch, height, width, depth)).astype(np.float32)


pool = jax.jit(pool, static_argnums=2)
bin_weights = jax.jit(bin_weights, static_argnums=(2, 3))


def bilinear(image, y, x):
    """RoIAlign's reading of image [H, W, D] at a point; cell (i, j) lies at y = i, x = j."""
    H, W, D = image.shape
    if y < -1 or y > H or x < -1 or x > W:
        return np.zeros(D)
    y, x = max(y, 0.0), max(x, 0.0)
    top, left = int(y), int(x)
    if top >= H - 1:
        top = bottom = H - 1
        y = float(top)
    else:
        bottom = top + 1
    if left >= W - 1:
        left = right = W - 1
        x = float(left)
    else:
        right = left + 1
    down, along = y - top, x - left
    above = (1 - along) * image[top, left] + along * image[top, right]
    below = (1 - along) * image[bottom, left] + along * image[bottom, right]
    return (1 - down) * above + down * below


def roi_align(image, box, grid):
    """`torchvision.ops.roi_align(aligned=True, sampling_ratio=-1)` of one box, by its loops."""
    H, W, D = image.shape
    x0, y0, x1, y1 = (float(value) for value in box)
    start_y, start_x = y0 * H - 0.5, x0 * W - 0.5
    bin_y, bin_x = (y1 - y0) * H / grid, (x1 - x0) * W / grid
    samples_y, samples_x = math.ceil(bin_y), math.ceil(bin_x)
    result = np.zeros((grid, grid, D))
    for row, column in np.ndindex(grid, grid):
        for i, j in np.ndindex(samples_y, samples_x):
            y = start_y + (row + (i + 0.5) / samples_y) * bin_y
            x = start_x + (column + (j + 0.5) / samples_x) * bin_x
            result[row, column] += bilinear(image, y, x)
    return result.reshape(grid * grid, D) / (samples_y * samples_x)


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(16, 16, 8), (6, 6, 1), (6, 6, 3), (9, 5, 2), (4, 7, 6)]
)
def test_equals_roi_align_on_random_boxes(height, width, grid):
    images = feature_map(height, width, batch=4)
    boxes = tiny.random_boxes(np.random.default_rng(grid), (4, 25))
    boxes[:, 0] *= 0.05 / np.maximum(boxes[:, 0].max(), 0.05)  # smaller than a cell
    boxes[:, 1] = WHOLE_IMAGE
    boxes[:, 2:5, 2:] = 1.0  # up to the edge
    ours = np.asarray(pool(images, boxes, grid))
    for b, r in np.ndindex(4, 25):
        expected = roi_align(images[b].astype(np.float64), boxes[b, r], grid)
        np.testing.assert_allclose(ours[b, r], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (6, 6), (5, 9)])
def test_the_whole_box_in_one_bin_is_the_mean(height, width):
    images = feature_map(height, width)
    expected = images.mean(axis=(1, 2))[:, None, None]
    np.testing.assert_allclose(pool(images, WHOLE, 1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [4, 6, 7, 16, 24])
def test_the_whole_box_with_a_bin_a_cell_is_the_map(size):
    images = feature_map(size, size)
    expected = images.reshape(1, 1, size * size, -1)
    np.testing.assert_allclose(pool(images, WHOLE, size), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("size", "grid"), [(16, 8), (16, 4), (6, 3), (6, 2), (12, 4)])
def test_a_grid_that_divides_the_map_is_average_pooling(size, grid):
    images, cell = feature_map(size, size), size // grid
    blocks = images.reshape(1, grid, cell, grid, cell, -1).mean(axis=(2, 4))
    expected = blocks.reshape(1, 1, grid * grid, -1)
    np.testing.assert_allclose(pool(images, WHOLE, grid), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [6, 13, 16, 21, 24, 27, 41])
def test_a_box_of_whole_cells_is_their_average_at_every_map_size(size):
    """Also where a cell's borders, k / size in fp32, are not exact: no sample leaks out."""
    edges = (np.arange(size + 1) / size).astype(np.float32)
    for cells in (1, 2, 3):
        start, end = edges[:-cells], edges[cells:]
        weights = np.asarray(bin_weights(jnp.asarray(start), jnp.asarray(end), 1, size))[:, 0]
        expected = sum(np.eye(size)[i : i + len(start)] for i in range(cells)) / cells
        np.testing.assert_allclose(weights, expected, rtol=0, atol=TOLERANCE)


def test_rows_and_columns_are_not_confused():
    """The left half of an image with its columns numbered is 0.5, of one with rows 1.5."""
    numbers = np.arange(4, dtype=np.float32)
    columns = np.broadcast_to(numbers[None, :, None], (4, 4, 1))
    rows = np.broadcast_to(numbers[:, None, None], (4, 4, 1))
    left = np.tile(np.array([[[0, 0, 0.5, 1]]], np.float32), (2, 1, 1))
    found = pool(np.stack([columns, rows]), left, 1)
    np.testing.assert_allclose(np.asarray(found).ravel(), [0.5, 1.5], rtol=0, atol=TOLERANCE)
    quarters = pool(np.stack([columns, rows]), np.tile(WHOLE, (2, 1, 1)), 2)[:, 0, :, 0]
    np.testing.assert_allclose(quarters[0], [0.5, 2.5, 0.5, 2.5], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(quarters[1], [0.5, 0.5, 2.5, 2.5], rtol=0, atol=TOLERANCE)


def test_gradients_are_those_of_a_linear_map():
    images = feature_map(6, 6, batch=2)
    boxes = tiny.random_boxes(np.random.default_rng(0), (2, 3))
    boxes[1, 2] = 0  # padding
    total = lambda images: jnp.sum(jnp.sin(pool(images, boxes, 2)))  # noqa: E731
    direction = feature_map(6, 6, batch=2, seed=1)
    gradient = np.asarray(jax.grad(total)(images))
    slope = functools.partial(jax.jvp, total, (images,), (direction,))()[1]
    step = 1e-2
    measured = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
    assert np.isfinite(gradient).all()
    assert slope == pytest.approx(np.sum(gradient * direction), rel=1e-4)
    assert measured == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize("grid", [1, 3])
def test_the_gradient_is_that_of_roi_align(grid):
    """A linear map's gradient: what each cell of the map adds to the bins, by the plain loops."""
    boxes = tiny.random_boxes(np.random.default_rng(grid), (1, 6))
    images = feature_map(6, 6, depth=1)
    wanted = np.random.default_rng(1).standard_normal((6, grid * grid))
    total = lambda images: jnp.sum(pool(images, boxes, grid)[0, :, :, 0] * wanted)  # noqa: E731
    found = np.asarray(jax.grad(total)(images))[0, :, :, 0]
    expected = np.zeros((6, 6))
    for cell in np.ndindex(6, 6):
        one = np.zeros((6, 6, 1))
        one[cell] = 1
        bins = [roi_align(one, box, grid)[:, 0] for box in boxes[0]]
        expected[cell] = np.sum(np.stack(bins) * wanted)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7)])
def test_boxes_of_one_cell_give_the_map_back(height, width):
    images = feature_map(height, width)
    boxes = boxes_around_cells(height, width, 1)
    assert boxes.shape == (height, width, 4)
    found = pool(images, boxes.reshape(1, -1, 4), 1)[0, :, 0]
    np.testing.assert_allclose(found, images.reshape(-1, 3), rtol=0, atol=TOLERANCE)


def test_boxes_of_a_window_are_about_their_cells():
    boxes = boxes_around_cells(6, 6, 3)
    np.testing.assert_allclose(boxes[2, 3], [2 / 6, 1 / 6, 5 / 6, 4 / 6], atol=1e-6)
    np.testing.assert_allclose(boxes[0, 5], [4 / 6, 0, 1, 2 / 6], atol=1e-6)  # cut at the edge
    check_boxes(boxes)
    check_boxes(boxes_around_cells(6, 6, 100))
    check_boxes(boxes_around_cells(33, 17, 1))


def test_padding_boxes_give_numbers():
    images = feature_map(6, 6)
    padding = np.array([[[0, 0, 0, 0], [1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5], [0.7, 0, 0.2, 1]]])
    for grid in (1, 3):
        value, gradient = jax.value_and_grad(
            lambda images, grid=grid: pool(images, jnp.asarray(padding, jnp.float32), grid).sum()
        )(images)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_bfloat16_map_is_pooled_in_bfloat16():
    images = feature_map(6, 6)
    rough = pool(images.astype(jnp.bfloat16), WHOLE, 2)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), pool(images, WHOLE, 2), rtol=0, atol=0.03)


def test_good_boxes_pass_the_check():
    check_boxes(tiny.random_boxes(np.random.default_rng(0), (2, 3)))
    check_boxes(WHOLE)


@pytest.mark.parametrize(
    "box",
    [
        (0.2, 0.2, 0.2, 0.5),
        (0.2, 0.5, 0.4, 0.5),
        (0.6, 0.2, 0.4, 0.5),
        (0.2, 0.6, 0.4, 0.5),
        (-0.1, 0.2, 0.4, 0.5),
        (0.2, -0.1, 0.4, 0.5),
        (0.2, 0.2, 1.1, 0.5),
        (0.2, 0.2, 0.4, 1.1),
        (math.nan, 0.2, 0.4, 0.5),
    ],
)
def test_a_bad_box_is_an_error_that_says_where(box):
    boxes = np.tile(WHOLE, (2, 3, 1))
    boxes[1, 2] = box
    with pytest.raises(ValueError, match=r"box \(1, 2\) is .*; expected 0 <= x0 < x1 <= 1 and"):
        check_boxes(boxes)
    check_boxes(boxes, mask=[[True] * 3, [True, True, False]])
