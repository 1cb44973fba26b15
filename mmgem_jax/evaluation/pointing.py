"""Pointing: is a phrase most similar to a place on what it names?

The similarity map of an image and a phrase holds, for every cell of the feature map, the similarity
of the phrase and a box about the cell (Ma et al., 2024, Figure 3). The phrase points at its
maximum; it is right where the centre of that cell is in its box (Zhang et al., 2016, arXiv
1608.00507, whose game this is, on the cells of a map instead of pixels).

Axes: N regions, n of them on one image, H x W cells, E joint embedding.
"""

import numpy as np

from mmgem_jax.evaluation.region_retrieval import Truth


def similarity_map(cells: np.ndarray, phrases: np.ndarray) -> np.ndarray:
    """Cosines, fp32 [n, H, W], of phrases [n, E] and the boxes about the cells of an image.

    `cells` [H, W, E] are of `Predictor.embed_cells`.
    """
    # As in `retrieval.score_blocks`: equal embeddings must tie.
    found = np.einsum("HWE,nE->nHW", cells.astype(np.float64), phrases.astype(np.float64))
    return found.astype(np.float32)


def pointed_cells(cells: np.ndarray, phrases: np.ndarray) -> np.ndarray:
    """The cell, int [n], counted row by row, that each phrase [n, E] is most similar to.

    `cells` [H, W, E] are of one image; of equally similar ones the first is taken.
    """
    return similarity_map(cells, phrases).reshape(len(phrases), -1).argmax(axis=1)


def cell_centres(height: int, width: int) -> np.ndarray:
    """The centre of each cell as x, y, shares of the image's width and height, [H * W, 2]."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([x / width, y / height], axis=-1).reshape(-1, 2)


def pointing_metrics(
    truth: Truth, boxes: np.ndarray, pointed: np.ndarray, map_shape: tuple[int, int]
) -> dict[str, float]:
    """How often the phrases of regions point into their boxes.

    A phrase that several regions of an image have may point into any of them. `accuracy` is the
    share of the regions whose phrase is right; `chance` the mean share of cells that are right;
    `reachable` the share of the regions with any such cell: a box can lie between the centres.

    Args:
      truth: of the regions.
      boxes: [N, 4] as x0, y0, x1, y1, shares of the image.
      pointed: int [N], from `pointed_cells`.
      map_shape: H and W.
    """
    x, y = cell_centres(*map_shape).T
    x0, y0, x1, y1 = np.asarray(boxes)[..., None].swapaxes(0, 1)  # each [N, 1]
    right, chance = np.zeros(len(pointed), bool), np.zeros(len(pointed))
    for own in truth.by_image():
        inside = (x >= x0[own]) & (x <= x1[own]) & (y >= y0[own]) & (y <= y1[own])  # [n, H * W]
        same = truth.text_of[own, None] == truth.text_of[own]
        answers = same @ inside  # of booleans: any
        right[own] = answers[np.arange(len(own)), pointed[own]]
        chance[own] = answers.mean(axis=1)
    return {
        "accuracy": float(right.mean()),
        "chance": float(chance.mean()),
        "reachable": float((chance > 0).mean()),
    }
