"""A picture of regions: images with their boxes, and below them what models say of each box.

The paper's Figure 2. A box, its number and its captions have one colour; where the true text is
known it stands above the captions, and a caption that equals it has a blue tick, another one a
vermillion cross.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.captioning import normalise_caption
from mmgem_jax.evaluation.drawing import (
    BADGE,
    BOX_COLOURS,
    FADED,
    INK,
    LINE,
    WHITE,
    badge_place,
    draw_badge,
    draw_box,
    draw_mark,
    fitted,
    font,
    place_of,
    text_colour,
    wrapped,
    write,
)

COLUMNS = 2  # cards side by side
MARGIN, GAP, PADDING = 20, 16, 14
CARD_WIDTHS = {1: 440, 2: 600}  # by the number of models
IMAGE_HEIGHT = 400
LETTERS, SMALL = 18, 15  # sizes of the font
LINE_HEIGHT = 24
FOOTER = 34


@dataclasses.dataclass(frozen=True)
class RegionExample:
    """An image and what was said of its boxes."""

    image: np.ndarray  # uint8 [H, W, 3]
    boxes: np.ndarray  # [N, 4] as x0, y0, x1, y1, shares of the image
    captions: list[list[str]]  # of each model, one a box
    truths: list[str] = dataclasses.field(default_factory=list)  # one a box, [] where not known
    title: str = ""

    def colour(self, place: int) -> tuple[int, int, int]:
        """The colour of the box at that place."""
        return BOX_COLOURS[place % len(BOX_COLOURS)]


def draw_regions(examples: Sequence[RegionExample], names: Sequence[str]) -> Image.Image:
    """The examples on one sheet, with the captions of one model or of two side by side.

    Args:
      examples: one or more, each with captions of every model.
      names: of the models, as headings of their captions.

    Raises:
      UserError: there are no examples or boxes, more than two models, or an image is not uint8 RGB.
    """
    if not examples or not all(len(example.boxes) for example in examples):
        raise UserError("examples: found none, or one without a box; expected boxes in each")
    if len(names) not in CARD_WIDTHS:
        raise UserError(f"names: found {len(names)} models, expected one or two")
    cards = [_card(example, names) for example in examples]
    lines = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    footer = FOOTER if any(example.truths for example in examples) else 0
    columns, card = min(COLUMNS, len(cards)), cards[0].width
    heights = [max(card.height for card in line) for line in lines]
    size = (
        2 * MARGIN + columns * (card + GAP) - GAP,
        2 * MARGIN + sum(heights) + GAP * (len(lines) - 1) + footer,
    )
    sheet = Image.new("RGB", size, WHITE)
    top = MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, drawn in enumerate(line):
            left = MARGIN + column * (card + GAP)
            sheet.paste(drawn, (left, top))
            frame = (left, top, left + card - 1, top + height - 1)
            ImageDraw.Draw(sheet).rectangle(frame, outline=LINE)
        top += height + GAP
    if footer:
        _draw_footer(sheet)
    return sheet


def image_with_boxes(example: RegionExample, width: int, height: int) -> Image.Image:
    """The image as large as it fits into width x height, with its boxes and their numbers."""
    picture = fitted(example.image, width, height)
    draw = ImageDraw.Draw(picture)
    places = [place_of(box, picture.size) for box in example.boxes]
    for number, place in enumerate(places):
        draw_box(draw, place, example.colour(number))
    badges = []  # they come last: no box covers one
    for number, place in enumerate(places):
        others = places[:number] + places[number + 1 :]
        badges.append(badge_place(place, picture.size, badges, others))
        draw_badge(draw, badges[-1][:2], number + 1, example.colour(number))
    return picture


def _card(example: RegionExample, names: Sequence[str]) -> Image.Image:
    """An example on a sheet of its own: title, image, a block of text for every box."""
    width = CARD_WIDTHS[len(names)]
    picture = image_with_boxes(example, width - 2 * PADDING, IMAGE_HEIGHT)
    blocks = [_Block(example, place, len(names), width) for place in range(len(example.boxes))]
    head = PADDING + (SMALL + 8 if example.title else 0)
    text = head + picture.height + PADDING
    height = text + LINE_HEIGHT + 8 + sum(block.height for block in blocks) + PADDING // 2
    card = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(card)
    inner = width - 2 * PADDING
    write(draw, (PADDING, PADDING - 5), example.title, SMALL, inner, colour=FADED)
    card.paste(picture, ((width - picture.width) // 2, head))
    lefts, room = _columns(len(names), width)
    for left, name in zip(lefts, names, strict=True):
        write(draw, (left, text), name, SMALL, room, colour=FADED, bold=True)
    top = text + LINE_HEIGHT + 2
    for block in blocks:
        draw.line((PADDING, top, width - PADDING - 1, top), LINE)
        block.draw(card, top + 8)
        top += block.height
    return card


class _Block:
    """What is written of one box: its number, its true text, the captions of each model."""

    def __init__(self, example: RegionExample, place: int, models: int, width: int):
        self.number, self.colour = place + 1, example.colour(place)
        self.lefts, room = _columns(models, width)
        self.captions = [captions[place] for captions in example.captions]
        self.truth = example.truths[place] if example.truths else None
        self.indent = 0 if self.truth is None else 24  # for a mark
        self.truth_lines = []
        if self.truth is not None:
            self.truth_lines = wrapped(self.truth, LETTERS, width - PADDING - self.lefts[0])
        said = [caption if caption.strip() else "(empty)" for caption in self.captions]
        self.caption_lines = [wrapped(text, LETTERS, room - self.indent) for text in said]
        count = len(self.truth_lines) + max(map(len, self.caption_lines))
        self.height = count * LINE_HEIGHT + 14

    def draw(self, card: Image.Image, top: int) -> None:
        """Draws the block from this row of the card on."""
        draw = ImageDraw.Draw(card)
        draw_badge(draw, (PADDING, top), self.number, self.colour)
        _write_lines(draw, (self.lefts[0], top), self.truth_lines, INK)
        top += len(self.truth_lines) * LINE_HEIGHT
        for left, caption, lines in zip(self.lefts, self.captions, self.caption_lines, strict=True):
            if self.truth is not None:
                right = normalise_caption(caption) == normalise_caption(self.truth)
                draw_mark(card, (left, top + 3), 16, right)
            corner = (left + self.indent, top)
            _write_lines(draw, corner, lines, text_colour(self.colour), bold=True)


def _columns(models: int, width: int) -> tuple[list[int], int]:
    """Where the columns of text start on a card, and how wide each is."""
    start = PADDING + BADGE + 10
    each = (width - PADDING - start + GAP) // models
    return [start + each * column for column in range(models)], each - GAP


def _write_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    left, top = corner
    for place, line in enumerate(lines):
        room = draw.im.size[0] - left
        corner = (left, top + place * LINE_HEIGHT)
        write(draw, corner, line, LETTERS, room, colour=colour, bold=bold)


def _draw_footer(sheet: Image.Image) -> None:
    draw, top = ImageDraw.Draw(sheet), sheet.height - MARGIN - SMALL - 3
    left = MARGIN
    for right, label in ((None, "black: the true text"), (True, "equal to it"), (False, "not")):
        if right is not None:
            draw_mark(sheet, (left, top), 15, right)
            left += 21
        write(draw, (left, top), label, SMALL, sheet.width - left, colour=FADED)
        left += round(font(SMALL).getlength(label)) + 24
