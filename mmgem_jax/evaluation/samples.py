"""A picture to look at: what the model says about some drawings, and whether it is right.

Every card holds a drawing, its true name, the generated caption and the nearest names. Right is a
blue tick and wrong a vermillion cross: two colours of Okabe and Ito's palette, which colour-blind
readers tell apart, and two shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import normalise_caption
from mmgem_jax.evaluation.drawing import (
    BLUE,
    FADED,
    INK,
    LINE,
    VERMILLION,
    WHITE,
    draw_mark,
    fitted,
    font,
    printable,
    save_sheet,
    shortened,
    write,
)

COLUMNS = 4
NEIGHBOURS = 3
MARGIN = 16
GAP = 8
CARD_WIDTH, CARD_HEIGHT = 344, 128
DRAWING = 112  # pixels a side
HEADER_HEIGHT = 118

PALE_BLUE = (222, 239, 249)
PALE_VERMILLION = (253, 231, 216)


@dataclass(frozen=True)
class Sample:
    """A drawing, uint8 [H, W, 3], and what was said about it; neighbours are best first."""

    image: np.ndarray
    name: str
    caption: str
    neighbours: list[tuple[str, float]]

    @property
    def caption_right(self) -> bool:
        """Whether the caption is the name, normalised as for `exact_match`."""
        return self.is_name(self.caption)

    @property
    def nearest_right(self) -> bool:
        """Whether the best neighbour is the name."""
        return bool(self.neighbours) and self.is_name(self.neighbours[0][0])

    def is_name(self, text: str) -> bool:
        """Whether the text is the true name, apart from case and white space."""
        return normalise_caption(text) == normalise_caption(self.name)


def draw_samples(path: str | Path, rows: Sequence[Sample], title: str = "Samples") -> None:
    """Write the samples as one PNG: a title, how many are right, and a grid of cards.

    Raises UserError where there are no samples or an image is not uint8 RGB.
    """
    if not rows:
        raise UserError("rows: found no samples, expected one or more")
    columns = min(COLUMNS, max(2, len(rows)))
    lines = -(-len(rows) // columns)
    width = 2 * MARGIN + columns * (CARD_WIDTH + GAP) - GAP
    height = HEADER_HEIGHT + lines * (CARD_HEIGHT + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(sheet)
    _draw_header(sheet, draw, rows, title)
    for place, sample in enumerate(rows):
        line, column = divmod(place, columns)
        left = MARGIN + column * (CARD_WIDTH + GAP)
        top = HEADER_HEIGHT + line * (CARD_HEIGHT + GAP)
        _draw_card(sheet, draw, sample, left, top)
    # A palette takes a third of the bytes, and no eye sees the difference.
    save_sheet(sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), path)


def _draw_header(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, rows: Sequence[Sample], title: str
) -> None:
    width = sheet.width
    legend = 'Each card: the true name, the generated "caption", the nearest names and similarities'
    write(draw, (MARGIN, 10), title, 24, width - 2 * MARGIN - 190, bold=True)
    for right, label, left in ((True, "right", 172), (False, "wrong", 80)):
        draw_mark(sheet, (width - MARGIN - left, 15), 20, right)
        write(draw, (width - MARGIN - left + 27, 15), label, 17, 60)
    write(draw, (MARGIN, 44), legend, 14, width - 2 * MARGIN, colour=FADED)
    counts = (
        ("Captions", sum(sample.caption_right for sample in rows)),
        ("Nearest names", sum(sample.nearest_right for sample in rows)),
    )
    half = (width - 2 * MARGIN + GAP) // 2
    for place, (label, right) in enumerate(counts):
        left = MARGIN + place * half
        write(draw, (left, 73), f"{label}: {right} of {len(rows)} right", 18, half, bold=True)
        _draw_bar(draw, (left, 98), half - GAP, right / len(rows))


def _draw_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, share: float) -> None:
    left, top = corner
    middle, right, bottom = left + round(share * width), left + width - 1, top + 9
    if share < 1:
        draw.rectangle((middle, top, right, bottom), outline=VERMILLION, fill=WHITE)
    if share > 0:
        draw.rectangle((left, top, middle - 1, bottom), fill=BLUE)


def _draw_card(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, sample: Sample, left: int, top: int
) -> None:
    draw.rectangle((left, top, left + CARD_WIDTH - 1, top + CARD_HEIGHT - 1), outline=LINE)
    inset = (CARD_HEIGHT - DRAWING) // 2
    sheet.paste(_scaled(sample.image), (left + inset, top + inset))
    left, right = left + 2 * inset + DRAWING, left + CARD_WIDTH - inset
    write(draw, (left + 3, top + 5), sample.name, 17, right - left - 6, bold=True)

    width = right - left - 30
    caption = shortened(printable(sample.caption), 15, width - 12)
    _draw_verdict(sheet, (left, top + 29), right - left, sample.caption_right)
    write(draw, (left + 26, top + 31), f'"{caption}"', 15, width)
    if sample.neighbours:
        _draw_verdict(sheet, (left, top + 57), right - left, sample.nearest_right)
    for place, (name, score) in enumerate(sample.neighbours[:NEIGHBOURS]):
        line = top + 59 + 21 * place + 2 * (place > 0)
        if place and sample.is_name(name):
            draw_mark(sheet, (left + 6, line + 4), 13, True)
        number = f"{score:.2f}"
        start = right - 4 - round(font(14).getlength(number))
        colour = FADED if place else INK
        draw.text((start, line), number, colour, font(14))
        write(draw, (left + 26, line), name, 15, start - left - 30, colour=colour)


def _draw_verdict(sheet: Image.Image, corner: tuple[int, int], width: int, right: bool) -> None:
    """A mark on a pale band of its colour, to write on."""
    band = Image.new("RGB", (width, 23), PALE_BLUE if right else PALE_VERMILLION)
    sheet.paste(band, corner)
    draw_mark(sheet, (corner[0] + 4, corner[1] + 3), 17, right)


def _scaled(image: np.ndarray) -> Image.Image:
    """The drawing on a white square, its longer side as long as the square's."""
    square = Image.new("RGB", (DRAWING, DRAWING), WHITE)
    drawing = fitted(image, DRAWING, DRAWING)
    width, height = drawing.size
    square.paste(drawing, ((DRAWING - width) // 2, (DRAWING - height) // 2))
    return square
