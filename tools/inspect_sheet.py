"""A contact sheet of a batch: images with boxes, texts and captions, and how long these are."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmgem_jax.evaluation.drawing import (
    BADGE,
    BLUE,
    BOX_COLOURS,
    FADED,
    INK,
    LINE,
    VERMILLION,
    WHITE,
    badge_place,
    draw_badge,
    draw_box,
    fitted,
    font,
    place_of,
    printable,
    shortened,
    text_colour,
    wrapped,
    write,
)
from mmgem_jax.models.pooling import WHOLE_IMAGE

COLUMNS = 3  # cards side by side
MARGIN, GAP, PADDING = 20, 16, 12
CARD_WIDTH, PICTURE = 560, 224  # pixels; of a picture both sides
LETTERS, SMALL, TITLE = 16, 14, 24  # sizes of the font
LINE_HEIGHT, SMALL_HEIGHT = 21, 19
MOST_LINES, ALONE_LINES = 3, 5  # of a text, and where an image has one pair
BARS = 84  # height of the tallest
BETWEEN = 10  # pixels between two pairs


@dataclasses.dataclass(frozen=True)
class Words:
    """A text as the model gets it, with its special tokens, and what is to be said of it."""

    text: str
    note: str
    warning: str = ""


@dataclasses.dataclass(frozen=True)
class PairCard:
    """A region: box fp32 [4], what is said of it; `group`, if any, colours the pairs like it."""

    box: np.ndarray
    words: list[Words]
    alike: str = ""
    group: int = 0


@dataclasses.dataclass(frozen=True)
class Card:
    """An image uint8 [H, W, 3] and its pairs; notes stand below it."""

    title: str
    image: np.ndarray
    pairs: list[PairCard]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often each value, or range of values, came: counts by its name, in order."""

    title: str
    bars: dict[str, int]


def draw_sheet(
    title: str, facts: Sequence[str], histograms: Sequence[Histogram], cards: Sequence[Card]
) -> Image.Image:
    """The title, a line for each fact, the histograms in a row, the cards in a grid."""
    drawn = [draw_card(card) for card in cards]
    lines = [drawn[start : start + COLUMNS] for start in range(0, len(drawn), COLUMNS)]
    heights = [max(card.height for card in line) for line in lines]
    facts_top = MARGIN + TITLE + 14
    bars_top = facts_top + SMALL_HEIGHT * len(facts) + GAP
    top = bars_top + SMALL_HEIGHT + 2 * SMALL_HEIGHT + BARS + GAP
    width = 2 * MARGIN + COLUMNS * (CARD_WIDTH + GAP) - GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * len(lines) + MARGIN), WHITE)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN), title, TITLE, width - 2 * MARGIN, bold=True)
    for place, fact in enumerate(facts):
        corner = (MARGIN, facts_top + SMALL_HEIGHT * place)
        write(draw, corner, fact, SMALL, width - 2 * MARGIN, colour=FADED)
    each = (width - 2 * MARGIN + GAP) // max(len(histograms), 1)
    for place, histogram in enumerate(histograms):
        draw_histogram(draw, (MARGIN + place * each, bars_top), each - 2 * GAP, histogram)
    for line, height in zip(lines, heights, strict=True):
        for column, card in enumerate(line):
            left = MARGIN + column * (CARD_WIDTH + GAP)
            sheet.paste(card, (left, top))
            frame = (left, top, left + CARD_WIDTH - 1, top + height - 1)
            draw.rectangle(frame, outline=LINE)
        top += height + GAP
    return sheet


def draw_histogram(draw, corner, width, histogram):
    """Bars with their counts above them and the lengths below."""
    left, top = corner
    write(draw, corner, histogram.title, SMALL, width, bold=True)
    top += 2 * SMALL_HEIGHT
    base, each = top + BARS, width / max(len(histogram.bars), 1)
    most = max(histogram.bars.values(), default=0) or 1
    for place, (name, count) in enumerate(histogram.bars.items()):
        start, end = round(left + place * each), round(left + (place + 1) * each) - 3
        height = round(BARS * count / most)
        if height:
            draw.rectangle((start, base - height, end, base - 1), fill=BLUE)
        middle = (start + end) / 2
        if count:
            where = (middle, base - height - 2)
            draw.text(where, short_number(count), INK, font(12), anchor="mb")
        draw.text((middle, base + 4), name, FADED, font(12), anchor="mt")
    draw.line((left, base, left + width - 4, base), FADED)


def short_number(count):
    """A count in at most four letters."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.0f}{letter}"
    return str(count)


# ---- a card --------------------------------------------------------------------------------------


def draw_card(card):
    """A card on a sheet of its own: the image and its notes on the left, pairs on the right."""
    left = PADDING + PICTURE + PADDING
    room = CARD_WIDTH - left - BADGE - 8 - PADDING
    top = PADDING + LINE_HEIGHT + 6
    most = ALONE_LINES if len(card.pairs) == 1 else MOST_LINES
    blocks = [pair_lines(pair, room, most) for pair in card.pairs]
    tall = sum(block_height(block) + BETWEEN for block in blocks)
    picture = draw_picture(card)
    notes = [line for note in card.notes for line in wrapped(note, SMALL, PICTURE)]
    below = picture.height + 8 + SMALL_HEIGHT * len(notes)
    drawn = Image.new("RGB", (CARD_WIDTH, top + max(tall, below) + PADDING), WHITE)
    draw = ImageDraw.Draw(drawn)
    write(draw, (PADDING, PADDING), card.title, LETTERS, CARD_WIDTH - 2 * PADDING, bold=True)
    drawn.paste(picture, (PADDING, top))
    for place, note in enumerate(notes):
        corner = (PADDING, top + picture.height + 8 + SMALL_HEIGHT * place)
        write(draw, corner, note, SMALL, PICTURE + 4, colour=FADED)
    for number, block in enumerate(blocks):
        draw_badge(draw, (left, top), number + 1, colour_of(number))
        draw_block(draw, (left + BADGE + 8, top), block, room)
        top += block_height(block) + BETWEEN
    return drawn


def draw_picture(card):
    """The image as large as it may be, with the boxes that are not all of it."""
    picture = fitted(card.image, PICTURE, PICTURE)
    draw = ImageDraw.Draw(picture)
    places = {
        number: place_of(pair.box, picture.size)
        for number, pair in enumerate(card.pairs)
        if tuple(pair.box.tolist()) != tuple(WHOLE_IMAGE)
    }
    for number, place in places.items():
        draw_box(draw, place, colour_of(number), width=2)
    badges = []  # they come last: no box covers one
    for number, place in places.items():
        others = [other for key, other in places.items() if key != number]
        badges.append(badge_place(place, picture.size, badges, others))
        draw_badge(draw, badges[-1][:2], number + 1, colour_of(number))
    return picture


def colour_of(number):
    """The colour of the pair at that place."""
    return BOX_COLOURS[number % len(BOX_COLOURS)]


def pair_lines(pair, room, most):
    """What is written of a pair, as lines: kind (`note`, `text` or `alike`), words, and more."""
    lines = []
    for words in pair.words:
        lines.append(("note", words.note, words.warning))
        lines += [("text", line, place) for line, place in text_lines(words.text, room, most)]
    if pair.alike:
        colour = text_colour(BOX_COLOURS[pair.group % len(BOX_COLOURS)])
        lines += [("alike", line, colour) for line in wrapped(pair.alike, SMALL, room)]
    return lines


def text_lines(text, room, most):
    """A text in at most so many lines of (words, whether it begins here, whether it ends here).

    Of a long one the middle is left out: its special tokens are always seen.
    """
    lines = wrapped(text, LETTERS, room)
    if len(lines) > most:
        last = printable(text).split()[-1]
        rest = " ".join(lines[most - 1 : most + 1])  # more than a line takes
        space = font(LETTERS).getlength(f" {last}")
        lines[most - 1 :] = [f"{shortened(rest, LETTERS, room - space)} {last}"]
    end = len(lines) - 1
    return [(line, (place == 0, place == end)) for place, line in enumerate(lines)]


def block_height(lines):
    """Pixels that they take."""
    return sum(LINE_HEIGHT if kind == "text" else SMALL_HEIGHT for kind, *_ in lines)


def draw_block(draw, corner, lines, room):
    """Writes the lines of a pair."""
    left, top = corner
    for kind, words, more in lines:
        if kind == "text":
            draw_text_line(draw, (left, top), words, *more)
        elif kind == "alike":
            write(draw, (left, top), words, SMALL, room + 4, colour=more)
        else:
            write(draw, (left, top), words, SMALL, room, colour=FADED)
            start = left + round(font(SMALL).getlength(f"{words} "))
            write(draw, (start, top), more, SMALL, room, colour=text_colour(VERMILLION), bold=True)
        top += LINE_HEIGHT if kind == "text" else SMALL_HEIGHT


def draw_text_line(draw, corner, line, begins, ends):
    """A line of a text, its first and its last token in a colour of their own."""
    left, top = corner
    words = line.split(" ")
    for place, word in enumerate(words):
        special = (begins and place == 0) or (ends and place == len(words) - 1)
        colour = text_colour(BLUE) if special else INK
        draw.text((left, top), word, colour, font(LETTERS), stroke_width=0.5 if special else 0)
        left += font(LETTERS).getlength(f"{word} ")
