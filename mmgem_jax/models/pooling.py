"""PoolAggregator: average of the feature map over a grid of bins in a box; no parameters.

By the rule of RoIAlign (He et al. 2017) with `aligned=True` and adaptive sampling, average
pooling: bilinear samples at ceil(box size / grid) regular points a bin and axis. That is
separable, so a box is two small matrices, [grid, H] and [grid, W], and pooling is one einsum on
the matrix unit, without a gather; one ViT pass serves any number of boxes.
"""

import jax.numpy as jnp
import numpy as np

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def bin_weights(start, end, grid, size):
    """Weights by which `size` cells of one axis make up `grid` bins of the span start..end.

    Args:
      start: [...] where the box starts, as a share of the axis.
      end: [...] where it ends.
      grid: number of bins.
      size: number of cells of the map on this axis.

    Returns:
      fp32 [..., grid, size]; a bin inside the map sums to 1.
    """
    start, end = start[..., None, None, None] * size, end[..., None, None, None] * size
    length = end - start
    # Rounding must not add a sample: cell 2 of 21 is 1.0000001 long. At least one sample, so that
    # a padding box of no size gives numbers and not NaN.
    samples = jnp.maximum(jnp.ceil(length / grid - 1e-4), 1.0)
    most_samples = -(-size // grid)

    lead = (1,) * (start.ndim - 3)
    bins = jnp.arange(grid, dtype=jnp.float32).reshape(*lead, grid, 1, 1)
    sample = jnp.arange(most_samples, dtype=jnp.float32).reshape(*lead, 1, most_samples, 1)
    cells = jnp.arange(size, dtype=jnp.float32).reshape(*lead, 1, 1, size)

    # Cell i's centre is at i + 0.5 (`aligned=True`); beyond the last centre the edge cell holds.
    point = start + (bins + (sample + 0.5) / samples) * (length / grid) - 0.5
    inside = (point >= -1) & (point <= size) & (sample < samples)
    point = jnp.clip(point, 0, size - 1)
    hat = jnp.maximum(1 - jnp.abs(point - cells), 0) * inside
    return hat.sum(axis=-2) / samples[..., 0]


def pool(feature_map, boxes, grid):
    """Average of the map over grid x grid bins of each box.

    Args:
      feature_map: [B, H, W, D].
      boxes: [B, R, 4] as x0, y0, x1, y1, shares of the image's width and height.
      grid: bins on each side of a box.

    Returns:
      [B, R, grid * grid, D], bins row by row, in the map's dtype.
    """
    B, H, W, D = feature_map.shape
    boxes = boxes.astype(jnp.float32)
    rows = bin_weights(boxes[..., 1], boxes[..., 3], grid, H).astype(feature_map.dtype)
    columns = bin_weights(boxes[..., 0], boxes[..., 2], grid, W).astype(feature_map.dtype)
    pooled = jnp.einsum("BHWD,BRgH,BRhW->BRghD", feature_map, rows, columns)
    return pooled.reshape(B, boxes.shape[1], grid * grid, D)


def boxes_around_cells(height, width, window):
    """A box of `window` x `window` cells about each cell of a map, cut at the map's edge.

    The embeddings of these boxes compared with a text's are the paper's similarity map (Figure 3).

    Returns:
      fp32 numpy [height, width, 4], as for `pool`.
    """
    y, x = np.mgrid[:height, :width] + 0.5
    half = window / 2
    corners = ((x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height)
    return np.stack(corners, axis=-1).clip(0, 1).astype(np.float32)


def good_boxes(boxes):
    """Which boxes, numpy [..., 4], are within the image and neither empty nor inverted: [...]."""
    x0, y0, x1, y1 = np.moveaxis(np.asarray(boxes), -1, 0)
    return (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1)


def check_boxes(boxes, mask=None):
    """Raises ValueError for a box that is empty, inverted or not within the image.

    Args:
      boxes: numpy [..., 4], as for `pool`.
      mask: bool [...], False where a box is padding and is not looked at.
    """
    boxes = np.asarray(boxes)
    good = good_boxes(boxes)
    if mask is not None:
        good = good | ~np.asarray(mask)
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(
            f"box {where} is {boxes[where].tolist()}; expected 0 <= x0 < x1 <= 1 and "
            "0 <= y0 < y1 <= 1"
        )
