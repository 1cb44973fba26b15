"""A picture to look at: what the model says about some drawings, and whether it is right.

Every card holds a drawing, its true name, the generated caption and the nearest names. Right is a
blue tick and wrong a vermillion cross: two colours of Okabe and Ito's palette, which colour-blind
readers tell apart, and two shapes.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import normalise_caption

COLUMNS = 4
NEIGHBOURS = 3
MARGIN = 16
GAP = 8
CARD_WIDTH, CARD_HEIGHT = 344, 128
DRAWING = 112  # pixels a side
HEADER_HEIGHT = 118

BLUE = (0, 114, 178)
VERMILLION = (213, 94, 0)
INK = (20, 20, 20)
FADED = (110, 110, 110)
LINE = (205, 205, 205)
WHITE = (255, 255, 255)
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

    Pillow's own font holds ASCII and little more: accents are left out, and other letters become
    a question mark. Raises UserError where there are no samples or an image is not uint8 RGB.
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
    palette = sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(path, format="PNG", optimize=True)


def _draw_header(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, rows: Sequence[Sample], title: str
) -> None:
    width = sheet.width
    legend = 'Each card: the true name, the generated "caption", the nearest names and similarities'
    _write(draw, (MARGIN, 10), title, 24, width - 2 * MARGIN - 190, bold=True)
    for right, label, left in ((True, "right", 172), (False, "wrong", 80)):
        _draw_mark(sheet, (width - MARGIN - left, 15), 20, right)
        _write(draw, (width - MARGIN - left + 27, 15), label, 17, 60)
    _write(draw, (MARGIN, 44), legend, 14, width - 2 * MARGIN, colour=FADED)
    counts = (
        ("Captions", sum(sample.caption_right for sample in rows)),
        ("Nearest names", sum(sample.nearest_right for sample in rows)),
    )
    half = (width - 2 * MARGIN + GAP) // 2
    for place, (label, right) in enumerate(counts):
        left = MARGIN + place * half
        _write(draw, (left, 73), f"{label}: {right} of {len(rows)} right", 18, half, bold=True)
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
    _write(draw, (left + 3, top + 5), sample.name, 17, right - left - 6, bold=True)

    width = right - left - 30
    caption = _shortened(_printable(sample.caption), 15, width - 12)
    _draw_verdict(sheet, (left, top + 29), right - left, sample.caption_right)
    _write(draw, (left + 26, top + 31), f'"{caption}"', 15, width)
    if sample.neighbours:
        _draw_verdict(sheet, (left, top + 57), right - left, sample.nearest_right)
    for place, (name, score) in enumerate(sample.neighbours[:NEIGHBOURS]):
        line = top + 59 + 21 * place + 2 * (place > 0)
        if place and sample.is_name(name):
            _draw_mark(sheet, (left + 6, line + 4), 13, True)
        number = f"{score:.2f}"
        start = right - 4 - round(_font(14).getlength(number))
        colour = FADED if place else INK
        draw.text((start, line), number, colour, _font(14))
        _write(draw, (left + 26, line), name, 15, start - left - 30, colour=colour)


def _draw_verdict(sheet: Image.Image, corner: tuple[int, int], width: int, right: bool) -> None:
    """A mark on a pale band of its colour, to write on."""
    band = Image.new("RGB", (width, 23), PALE_BLUE if right else PALE_VERMILLION)
    sheet.paste(band, corner)
    _draw_mark(sheet, (corner[0] + 4, corner[1] + 3), 17, right)


def _draw_mark(sheet: Image.Image, corner: tuple[int, int], size: int, right: bool) -> None:
    """A tick or a cross in a square of `size` pixels: drawn, for the font has neither."""
    strokes = (
        [[(0.08, 0.56), (0.38, 0.86), (0.94, 0.16)]]
        if right
        else [[(0.14, 0.14), (0.86, 0.86)], [(0.14, 0.86), (0.86, 0.14)]]
    )
    # Drawn four times as large and shrunk, for Pillow's lines have hard edges.
    large = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(large)
    for stroke in strokes:
        points = [(4 * size * x, 4 * size * y) for x, y in stroke]
        draw.line(points, 255, round(0.7 * size), joint="curve")
    shape = large.resize((size, size), Image.Resampling.BOX)
    sheet.paste(BLUE if right else VERMILLION, corner, shape)


def _scaled(image: np.ndarray) -> Image.Image:
    """The drawing on a white square, its longer side as long as the square's."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image: found {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    scale = DRAWING / max(image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    square = Image.new("RGB", (DRAWING, DRAWING), WHITE)
    drawing = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    square.paste(drawing, ((DRAWING - width) // 2, (DRAWING - height) // 2))
    return square


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    *,
    colour: tuple[int, int, int] = INK,
    bold: bool = False,
) -> None:
    text = _shortened(_printable(text), size, width)
    # The font has one weight; a stroke of its own colour makes the bold one.
    draw.text(corner, text, colour, _font(size), stroke_width=0.5 if bold else 0)


def _shortened(text: str, size: int, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels, with an ellipsis."""
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _printable(text: str) -> str:
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(_lookalike(letter) for letter in letters if not unicodedata.combining(letter))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@cache
def _lookalike(letter: str) -> str:
    # U+FFFF is no character: what is drawn for it is the font's box for "missing".
    if bytes(_font(16).getmask(letter)) != bytes(_font(16).getmask("\uffff")):
        return letter
    return "-" if unicodedata.category(letter) == "Pd" else "?"
