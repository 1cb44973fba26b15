"""Heat maps over an image: how similar a text is to a box about every cell of the feature map.

The paper's Figure 3. Beside the image there is a panel for each text, and a row of them for each
model, whose scale of colours all its panels share. A ring marks the maximum; where the text is of
a region of the data set, that region is outlined.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.drawing import (
    FADED,
    INK,
    LINE,
    WHITE,
    draw_box,
    fitted,
    font,
    place_of,
    wrapped,
    write,
)
from mmgem_jax.evaluation.examples import Dataset
from mmgem_jax.evaluation.pointing import similarity_map
from mmgem_jax.models.pooling import boxes_around_cells

# From dark violet through teal to yellow: in Oklab (Ottosson, 2020) lightness rises evenly from
# 0.25 to 0.92, so that it reads the same without colours, while the hue turns evenly.
ANCHORS = (
    (41, 7, 85),
    (33, 44, 119),
    (0, 79, 133),
    (0, 110, 139),
    (3, 141, 147),
    (6, 173, 146),
    (89, 201, 128),
    (171, 220, 108),
    (244, 234, 98),
)

PANEL = 240  # pixels a side at most
TEXTS_A_LINE = 4
MARGIN, GAP = 20, 14
LETTERS, SMALL = 18, 15  # sizes of the font
LINE_HEIGHT, SMALL_LINE = 24, 22
BAR, BAR_ROOM = 16, 64  # the scale's width, and that with its numbers
FOOTER = 34


@dataclasses.dataclass(frozen=True)
class SimilarityExample:
    """An image, texts, and the similarity of each text with each cell of a model's map."""

    image: np.ndarray  # uint8 [H, W, 3]
    texts: list[str]  # T
    maps: list[np.ndarray]  # of each model, fp32 [T, rows, columns]
    windows: list[int]  # of each model, cells a side of the box about a cell
    boxes: list[np.ndarray]  # of each text, the regions that it is of, [n, 4]; n may be 0
    title: str = ""


def similarity_maps(
    predictor, params: dict, dataset: Dataset, texts: Sequence[list[str]], window: int = 0
) -> tuple[list[np.ndarray], list[str]]:
    """The similarity of each image's own texts with a box about every cell of its feature map.

    Args:
      predictor: a `Predictor`; within `sharding.use_mesh`.
      params: the model's parameters.
      dataset: the images, each of which passes once through the vision tower.
      texts: of each image, one or more.
      window: cells a side of the boxes; 0: the predictor's own.

    Returns:
      For each image fp32 [T, rows, columns], cosines; and the texts that were cut to fit.

    Raises:
      UserError: the window is larger than the map, or an image is none.
    """
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    embeddings, cut = predictor.embed_texts(params, distinct)
    row_of, maps = {text: row for row, text in enumerate(distinct)}, []
    for places, feature_map in predictor.read_images(params, dataset):
        most = max(feature_map.shape[1:3])
        if not 0 <= window <= most:
            raise UserError(f"window: found {window} cells, expected 1 to {most}, the map's side")
        cells = predictor.embed_cells(params, feature_map, window)
        for place, own in zip(places, cells, strict=False):  # not the rows that only fill up
            phrases = embeddings[[row_of[text] for text in texts[place]]]
            maps.append(similarity_map(own, phrases))
    return maps, [text for text, short in zip(distinct, cut, strict=True) if short]


def draw_similarity(examples: Sequence[SimilarityExample], names: Sequence[str]) -> Image.Image:
    """The examples on one sheet: a column for each text, a row for each model.

    Raises UserError where there are no examples or texts, or an image is not uint8 RGB.
    """
    if not examples or not all(example.texts for example in examples):
        raise UserError("examples: found none, or one without a text; expected texts of each")
    blocks = [
        _block(example, names, texts) for example in examples for texts in _text_lines(example)
    ]
    width = max(max(block.width for block in blocks) + 2 * MARGIN, 520)
    height = sum(block.height + GAP for block in blocks) - GAP + 2 * MARGIN + FOOTER
    sheet = Image.new("RGB", (width, height), WHITE)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + GAP
    _draw_footer(sheet, any(len(boxes) for example in examples for boxes in example.boxes))
    return sheet


def numbers(example: SimilarityExample, names: Sequence[str]) -> dict:
    """What the picture shows of an example, as JSON has it.

    Of each model the maps, row by row, and where each has its maximum (the first, where several
    cells have it): its cell, and the box about that, shares x0, y0, x1, y1 of the image.
    """
    models = []
    for name, maps, window in zip(names, example.maps, example.windows, strict=True):
        maxima = []
        boxes = boxes_around_cells(*maps.shape[1:], window)
        for values in maps:
            row, column = maximum(values)
            value, box = float(values[row, column]), boxes[row, column].tolist()
            maxima.append({"value": value, "row": row, "column": column, "box": box})
        models.append({"name": name, "window": window, "maps": maps.tolist(), "maxima": maxima})
    return {
        "image": example.title,
        "texts": example.texts,
        "regions": [np.asarray(boxes).tolist() for boxes in example.boxes],
        "models": models,
    }


def maximum(values: np.ndarray) -> tuple[int, int]:
    """Row and column of a map's largest value, the first where there are several."""
    row, column = np.unravel_index(np.argmax(values), values.shape)
    return int(row), int(column)


def heat_colours(shares: np.ndarray) -> np.ndarray:
    """The colours, fp32 [..., 3] up to 255, of shares from 0 to 1 of the scale."""
    places = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(shares, places, channel) for channel in np.transpose(ANCHORS)]
    return np.stack(channels, axis=-1).astype(np.float32)


def heat_panel(image: Image.Image, values: np.ndarray, low: float, high: float) -> Image.Image:
    """The map over the image: its colours, with the image's edges and shapes as light and shade.

    Args:
      image: the picture that the map is of.
      values: [rows, columns], one for each cell; between the cells' centres it is linear.
      low: the value of the scale's first colour.
      high: the value of its last.
    """
    shares = np.clip((values - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    smooth = Image.fromarray(shares).resize(image.size, Image.Resampling.BILINEAR)
    colours = heat_colours(np.asarray(smooth))
    # Of the image only what differs from its surroundings, and strong edges hardly more than weak
    # ones: large light and dark areas would be mistaken for values.
    grey = image.convert("L")
    around = grey.filter(ImageFilter.GaussianBlur(max(image.size) / 20))
    relief = np.asarray(grey, np.float32) - np.asarray(around, np.float32)
    shade = 28 * np.tanh(relief / 40)[..., None]
    return Image.fromarray(np.clip(colours + shade, 0, 255).astype(np.uint8))


def _text_lines(example: SimilarityExample) -> list[range]:
    """The places of the texts, in lines of about the same length."""
    count = len(example.texts)
    lines = -(-count // TEXTS_A_LINE)
    ends = [round(line * count / lines) for line in range(lines + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _block(example: SimilarityExample, names: Sequence[str], texts: range) -> Image.Image:
    """Some of an example's texts: their heads, and for each model a row of panels."""
    picture = fitted(example.image, PANEL, PANEL)
    heads = [wrapped(example.texts[place], LETTERS, PANEL) for place in texts]
    head = max(map(len, heads)) * LINE_HEIGHT + 4
    row = picture.height + 2 * SMALL_LINE + GAP
    lefts = [(PANEL + GAP) * (1 + column) for column in range(len(texts))]
    size = (lefts[-1] + PANEL + GAP + BAR_ROOM, head + len(names) * row)
    block = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(block)
    write(draw, (0, head - LINE_HEIGHT), example.title, SMALL, PANEL, colour=FADED)
    for left, lines in zip(lefts, heads, strict=True):
        for place, line in enumerate(lines):
            corner = (left, head - 4 + (place - len(lines)) * LINE_HEIGHT)
            write(draw, corner, line, LETTERS, PANEL + GAP, bold=True)
    for model, name in enumerate(names):
        _draw_row(block, head + model * row, example, model, name, picture, texts)
    return block


def _draw_row(block, top, example, model, name, picture, texts):
    """A model's panels, from this row of the block on, and below them what they are."""
    draw, maps, window = ImageDraw.Draw(block), example.maps[model], example.windows[model]
    low, high = float(maps.min()), float(maps.max())
    below, (rows, columns) = top + picture.height + 4, maps.shape[1:]
    block.paste(picture, (0, top))
    write(draw, (0, below), name, SMALL, PANEL, bold=True)
    cells = f"{rows} x {columns} cells, a box is {window} x {window}"
    write(draw, (0, below + SMALL_LINE - 2), cells, SMALL, PANEL, colour=FADED)
    left = 0
    for place in texts:
        left += PANEL + GAP
        panel = heat_panel(picture, maps[place], low, high)
        _draw_signs(panel, maps[place], example.boxes[place])
        block.paste(panel, (left, top))
        label = f"maximum {maps[place].max():.2f}"
        write(draw, (left, below), label, SMALL, PANEL, colour=FADED)
    _draw_scale(block, (left + PANEL + GAP, top), picture.height, low, high)


def _draw_signs(panel: Image.Image, values: np.ndarray, boxes: np.ndarray) -> None:
    """The outlines of the regions, and a ring about the maximum."""
    draw = ImageDraw.Draw(panel)
    for box in boxes:
        draw_box(draw, place_of(box, panel.size), WHITE, casing=INK, width=2)
    row, column = maximum(values)
    rows, columns = values.shape
    x, y = (column + 0.5) / columns * panel.width, (row + 0.5) / rows * panel.height
    _draw_ring(draw, x, y)


def _draw_ring(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for radius, colour, width in ((10, INK, 6), (9, WHITE, 3)):
        edge = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(edge, outline=colour, width=width)


def _draw_scale(
    block: Image.Image, corner: tuple[int, int], height: int, low: float, high: float
) -> None:
    left, top = corner
    shares = np.linspace(1, 0, height)[:, None].repeat(BAR, axis=1)
    block.paste(Image.fromarray(heat_colours(shares).round().astype(np.uint8)), corner)
    draw = ImageDraw.Draw(block)
    draw.rectangle((left, top, left + BAR - 1, top + height - 1), outline=LINE)
    for share in (0, 0.5, 1):
        y = top + round((1 - share) * (height - 1))
        draw.line((left + BAR, y, left + BAR + 4, y), INK)
        middle = min(max(y, top + 6), top + height - 7)
        label = f"{low + share * (high - low):.2f}"
        draw.text((left + BAR + 8, middle), label, INK, font(SMALL), anchor="lm")


def _draw_footer(sheet: Image.Image, regions: bool) -> None:
    draw, top = ImageDraw.Draw(sheet), sheet.height - MARGIN - SMALL - 3
    left = MARGIN
    labels = ["colour: cosine of the text and the box about each cell", "maximum"]
    for label in labels + ["the text's region"] * regions:
        if label == "maximum":
            _draw_ring(draw, left + 10, top + 9)
        elif label != labels[0]:
            draw_box(draw, (left, top, left + 20, top + 19), WHITE, casing=INK, width=2)
        left += 0 if label == labels[0] else 28
        write(draw, (left, top), label, SMALL, sheet.width - left, colour=FADED)
        left += round(font(SMALL).getlength(label)) + 24
