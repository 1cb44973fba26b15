"""The picture of a scene: a textured canvas, plain shapes on it, and drawings on top.

Places and sizes are drawn before it is known what stands there, and the canvas for itself, so that
neither tells what an object is. Lengths are pixels; a slot is a square that one drawing fills.
"""

import dataclasses
import io
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
SIZES = (28, 60)  # longer side of an object, the last included
SLOT_OVERLAP = 0.12  # of the smaller slot
SOLID = 32  # alpha from which a pixel belongs to a drawing, of 255
QUALITY = 90

COLOURS = {
    "red": (206, 48, 48),
    "orange": (240, 140, 40),
    "yellow": (242, 214, 72),
    "green": (66, 150, 74),
    "blue": (58, 104, 204),
    "purple": (132, 72, 170),
    "pink": (242, 152, 184),
    "brown": (124, 82, 50),
    "black": (30, 30, 34),
    "gray": (138, 140, 144),
    "white": (240, 240, 238),
}
TEXTURES = ("gradient", "stripes", "blotches", "checks")


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What is behind the objects: one of TEXTURES in two of COLOURS, with shapes on it, RGB."""

    texture: str
    colours: tuple[str, str]
    image: Image.Image


@dataclasses.dataclass(frozen=True)
class Slot:
    """A square: its upper left corner and its side, in pixels."""

    left: int
    top: int
    side: int


def draw_canvas(rng) -> Canvas:
    """A texture of two colours with uneven light, and two to six plain shapes on it."""
    texture = str(rng.choice(TEXTURES))
    colours = tuple(str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
    first, second = (np.asarray(COLOURS[name]) + rng.uniform(-12, 12, 3) for name in colours)
    share = _texture(texture, rng)[..., None]
    light = rng.uniform(4, 14) * _smooth_noise(int(rng.integers(3, 12)), rng)[..., None]
    pixels = (1 - share) * first + share * second + light
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    for _ in range(rng.integers(2, 7)):
        _draw_shape(image, rng)
    return Canvas(texture, colours, image)


def _texture(texture, rng):
    """The second colour's share of every pixel, [SIDE, SIDE]."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if texture == "gradient":
        return (along - along.min()) / np.ptp(along)
    if texture == "blotches":
        wave = 1.5 * _smooth_noise(int(rng.integers(5, 12)), rng)
    else:
        pitch, phase = rng.uniform(12, 40), rng.uniform(0, 2 * math.pi, 2)
        wave = np.sin(2 * math.pi / pitch * along + phase[0])
        if texture == "checks":
            wave = wave * np.sin(2 * math.pi / pitch * across + phase[1])
    return 0.5 + 0.5 * np.tanh(rng.uniform(1.5, 8) * wave)


def _smooth_noise(cells, rng):
    """Noise of `cells` hills a side, of mean 0 and spread 1, [SIDE, SIDE]."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    noise = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (noise - noise.mean()) / noise.std()


def _draw_shape(image, rng):
    """An ellipse, a polygon or a line of one colour, set on the image."""
    fine = 2  # drawn larger and shrunk: Pillow's edges are jagged
    layer = Image.new("L", (fine * SIDE, fine * SIDE))
    pen = ImageDraw.Draw(layer)
    centre, radii = rng.uniform(0, SIDE, 2), rng.uniform(6, 26, 2)
    kind, opacity = rng.choice(["ellipse", "polygon", "line"]), int(rng.integers(110, 256))
    if kind == "ellipse":
        pen.ellipse([*(fine * (centre - radii)), *(fine * (centre + radii))], fill=opacity)
    else:
        count = 2 if kind == "line" else int(rng.integers(3, 7))
        angles = np.sort(rng.uniform(0, 2 * math.pi, count))
        reach = (3 if kind == "line" else 1) * radii
        corners = fine * (centre + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1))
        corners = [tuple(corner) for corner in corners.tolist()]
        if kind == "line":
            pen.line(corners, fill=opacity, width=fine * int(rng.integers(2, 6)))
        else:
            pen.polygon(corners, fill=opacity)
    colour = np.asarray(COLOURS[rng.choice(list(COLOURS))]) + rng.uniform(-20, 20, 3)
    colour = tuple(np.clip(colour, 0, 255).astype(int).tolist())
    image.paste(colour, mask=layer.reduce(fine))


def place_slots(sides, rng) -> list[Slot] | None:
    """Slots of these sides anywhere within the scene, hardly overlapping; None where none fit."""
    slots = []
    for side in sides:
        for _ in range(40):
            left, top = (int(place) for place in rng.integers(0, SIDE - side + 1, 2))
            slot = Slot(left, top, int(side))
            if all(_overlap(slot, other) <= SLOT_OVERLAP for other in slots):
                slots.append(slot)
                break
        else:
            return None
    return slots


def _overlap(a, b):
    """The part of the smaller slot that the other one covers."""
    width = min(a.left + a.side, b.left + b.side) - max(a.left, b.left)
    height = min(a.top + a.side, b.top + b.side) - max(a.top, b.top)
    return max(0, width) * max(0, height) / min(a.side, b.side) ** 2


def trim(encoded: bytes) -> Image.Image:
    """The drawing of an image file without its transparent margins, RGBA."""
    image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    return image.crop(_extent(image))


def _extent(image):
    """Left, top, right and bottom of what is solid."""
    return image.getchannel("A").point(lambda alpha: 255 * (alpha >= SOLID)).getbbox()


def compose(canvas: Canvas, drawings, slots):
    """Sets trimmed drawings on the canvas, later ones over earlier ones.

    Args:
      canvas: from `draw_canvas`; left as it is.
      drawings: RGBA images without margins.
      slots: a Slot for each; the drawing's longer side is the slot's, its middle the slot's.

    Returns:
      The RGB image; boxes fp64 [n, 4] as (ymin, xmin, ymax, xmax) in shares of the scene, tight
      round what is solid; the share of every drawing's solid pixels that no later one covers [n].
    """
    image = canvas.image.convert("RGBA")
    boxes, solid = [], []
    for drawing, slot in zip(drawings, slots, strict=True):
        scale = slot.side / max(drawing.size)
        width, height = (max(1, round(scale * side)) for side in drawing.size)
        layer = Image.new("RGBA", image.size)
        corner = (slot.left + (slot.side - width) // 2, slot.top + (slot.side - height) // 2)
        layer.paste(drawing.resize((width, height), Image.Resampling.BICUBIC), corner)
        image.alpha_composite(layer)
        left, top, right, bottom = _extent(layer)
        boxes.append((top, left, bottom, right))
        solid.append(np.asarray(layer.getchannel("A")) >= SOLID)
    visible, covered = [], np.zeros((SIDE, SIDE), bool)
    for mask in reversed(solid):
        visible.append(1 - np.sum(mask & covered) / np.sum(mask))
        covered |= mask
    return image.convert("RGB"), np.asarray(boxes) / SIDE, np.asarray(visible[::-1])


def largest_iou(boxes) -> float:
    """The largest intersection over union of any two boxes [n, 4]."""
    found = [0.0]
    for a, b in itertools.combinations(np.asarray(boxes), 2):
        shared = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
        found.append(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))
    return float(max(found))


def encode(image) -> bytes:
    """The bytes of a JPEG file with full colour resolution."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
