"""What the pictures share: colours that colour-blind readers tell apart, text that fits, marks.

Colours are those of Okabe and Ito's palette (2008), and none is the only sign of what it means.
Pillow's own font holds ASCII and little more: accents are left out, and other letters become a
question mark.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmgem_jax.errors import UserError

BLUE = (0, 114, 178)
VERMILLION = (213, 94, 0)
GREEN = (0, 158, 115)
PURPLE = (204, 121, 167)
ORANGE = (230, 159, 0)
SKY_BLUE = (86, 180, 233)
BOX_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE)

INK = (20, 20, 20)
FADED = (110, 110, 110)
LINE = (205, 205, 205)
WHITE = (255, 255, 255)

FORMATS = (".png", ".webp", ".jpg")  # of the files that are written
LEAST_CONTRAST = 3.0  # of text on white: what WCAG 2 asks for large or bold letters
BADGE = 22  # pixels a side
STROKE = 4  # width of a box's line

Colour = tuple[int, int, int]
Place = tuple[int, int, int, int]  # pixels left, top, right, bottom; the last two are outside


def fitted(image: np.ndarray, width: int, height: int) -> Image.Image:
    """The image, uint8 [H, W, 3], as large as it fits into width x height, its aspect kept.

    Raises UserError where it is not uint8 RGB.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image: found {image.dtype} {image.shape}, expected uint8 [H, W, 3]")
    scale = min(height / image.shape[0], width / image.shape[1])
    sides = [max(1, round(scale * side)) for side in image.shape[1::-1]]
    return Image.fromarray(image).resize(sides, Image.Resampling.LANCZOS)


# ---- text ----------------------------------------------------------------------------------------


def write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    *,
    colour: Colour = INK,
    bold: bool = False,
) -> None:
    """Writes one line from its top left corner; what does not fit gives way to an ellipsis."""
    text = shortened(printable(text), size, width)
    # The font has one weight; a stroke of its own colour makes the bold one.
    draw.text(corner, text, colour, font(size), stroke_width=0.5 if bold else 0)


def shortened(text: str, size: int, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels, with an ellipsis."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most `width` pixels: nothing is lost, a longer word is broken."""
    lines = [""]
    for word in printable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while font(size).getlength(lines[-1]) > width and len(lines[-1]) > 1:
            word = lines[-1]
            fits = sum(font(size).getlength(word[: n + 1]) <= width for n in range(len(word)))
            lines[-1:] = [word[: max(1, fits)], word[max(1, fits) :]]
    return lines


def printable(text: str) -> str:
    """The text in one line, as far as the font has its letters."""
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(_lookalike(letter) for letter in letters if not unicodedata.combining(letter))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


@cache
def _lookalike(letter: str) -> str:
    # U+FFFF is no character: what is drawn for it is the font's box for "missing".
    if bytes(font(16).getmask(letter)) != bytes(font(16).getmask("\uffff")):
        return letter
    return "-" if unicodedata.category(letter) == "Pd" else "?"


# ---- colours -------------------------------------------------------------------------------------


def contrast_with_white(colour: Colour) -> float:
    """The contrast ratio by WCAG 2, from 1 (white) to 21 (black)."""
    channels = np.asarray(colour) / 255
    linear = np.where(channels > 0.04045, ((channels + 0.055) / 1.055) ** 2.4, channels / 12.92)
    return 1.05 / (float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)


def text_colour(colour: Colour) -> Colour:
    """The colour as text on white has it: so much darker that it can be read."""
    share = next(s for s in range(100, -1, -1) if _dark_enough(_darker(colour, s)))
    return _darker(colour, share)


def _darker(colour: Colour, percent: int) -> Colour:
    return tuple(round(channel * percent / 100) for channel in colour)


def _dark_enough(colour: Colour) -> bool:
    return contrast_with_white(colour) >= LEAST_CONTRAST


# ---- marks, boxes --------------------------------------------------------------------------------


def draw_mark(sheet: Image.Image, corner: tuple[int, int], size: int, right: bool) -> None:
    """A blue tick or a vermillion cross in a square of `size` pixels: the font has neither."""
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


def place_of(box: Sequence[float], size: tuple[int, int]) -> Place:
    """Where a box, shares x0, y0, x1, y1 of an image, lies on its picture of this size."""
    shares = zip(box, (*size, *size), strict=True)
    left, top, right, bottom = (round(float(share) * side) for share, side in shares)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def draw_box(
    draw: ImageDraw.ImageDraw,
    place: Place,
    colour: Colour,
    *,
    casing: Colour = WHITE,
    width: int = STROKE,
) -> None:
    """A box's outline, within it, between two thin lines that set it off from any ground."""
    left, top, right, bottom = place
    draw.rectangle((left, top, right - 1, bottom - 1), outline=casing, width=width + 2)
    if min(right - left, bottom - top) > 2:
        edge = (left + 1, top + 1, right - 2, bottom - 2)
        draw.rectangle(edge, outline=colour, width=width)


def draw_badge(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], number: int, colour: Colour
) -> None:
    """A number on a square of its colour, of BADGE pixels a side."""
    left, top = corner
    ink = WHITE if _dark_enough(colour) else INK
    draw.rectangle((left, top, left + BADGE - 1, top + BADGE - 1), fill=colour, outline=WHITE)
    size = 16 if number < 100 else 12
    middle = (left + BADGE / 2, top + BADGE / 2)
    draw.text(middle, str(number), ink, font(size), anchor="mm", stroke_width=0.5)


def badge_place(
    place: Place, size: tuple[int, int], badges: Sequence[Place] = (), boxes: Sequence[Place] = ()
) -> Place:
    """Where a box's badge goes on a picture of this size.

    It touches its own box: stands above it, in one of its corners, below or beside it. As far as
    can be it is off the other badges, and then off the other boxes and its own where that is small.
    """
    left, top, right, bottom = place
    if min(right - left, bottom - top) < 3 * BADGE:
        boxes = [*boxes, place]
    tops = (top - BADGE, top, bottom - BADGE, bottom)
    corners = [(x, y) for y in tops for x in (left, right - BADGE)]
    corners += [(left - BADGE, top), (right, top)]
    corners = [tuple(np.clip(c, 0, np.subtract(size, BADGE)).tolist()) for c in corners]
    places = [(x, y, x + BADGE, y + BADGE) for x, y in corners]

    def hidden(badge):
        return [sum(_shared(badge, other) for other in others) for others in (badges, boxes)]

    return min(places, key=hidden)


def _shared(one: Place, other: Place) -> int:
    """Pixels that two places have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def save_sheet(sheet: Image.Image, path: str | Path) -> None:
    """Writes the sheet in the format that the file's name ends in, one of FORMATS; UserError."""
    try:
        sheet.save(path, optimize=True, quality=90)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a file to write") from None
