"""Encoded images to pixels: the evaluation's resize and crop, and the training augmentation."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from mmgem_jax.errors import UserError

WHITE = (255, 255, 255)


def decode(encoded, background=WHITE):
    """Bytes of an image file as an RGB PIL image, transparency set on the background colour.

    Pixel for pixel what OpenAI's pipeline for CLIP gets from Pillow's `convert("RGB")`, but for two
    kinds of files that it loses: there transparency is dropped, which shows colours never meant to
    be seen, and 16-bit grey is clipped to white above 255. As there, an orientation in the file's
    EXIF is not applied. Raises Pillow's exceptions for bytes that are no whole image.
    """
    image = Image.open(io.BytesIO(encoded))
    if image.mode.startswith("I;16"):  # Pillow would make white of all above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


def resize_and_crop(image, size):
    """Short side to `size` (bicubic, antialiased), then the central square: OpenAI's for CLIP.

    Rounding is torchvision's: the long side is cut down to an integer, the crop's corner rounded.

    Returns:
      uint8 [size, size, 3].
    """
    width, height = image.size
    short = min(width, height)
    if short != size or width != height:
        scaled = (int(size * width / short), int(size * height / short))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in scaled)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def squash(image, size):
    """The whole image resized to the square, its aspect not kept: no region falls outside.

    Returns:
      uint8 [size, size, 3].
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a random view may be; every field is explained in configs/base.py."""

    min_scale: float
    max_scale: float
    shift: float
    stretch: float
    rotate: float
    colour: float
    background: float

    def __post_init__(self):
        if not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                f"data.augment: min_scale {self.min_scale:g} and max_scale {self.max_scale:g}; "
                "expected 0 < min_scale <= max_scale"
            )


def augment(encoded, size, options, rng, squashed=False):
    """A random view of an image: crop or margin, shift, stretch, rotation, colour, background.

    Args:
      encoded: bytes of the image file.
      size: pixels a side of the result.
      options: an Augmentation.
      rng: numpy Generator; the same state gives the same view.
      squashed: whether the view is of the image resized to a square, and not of its middle.

    Returns:
      uint8 [size, size, 3], and the affine map [2, 3] from places in the view to places in the
      image, both as shares of width and height; see `boxes_in_view`.
    """
    random_background = rng.random() < options.background
    colour = tuple(int(c) for c in rng.integers(0, 256, 3)) if random_background else WHITE
    image = decode(encoded, colour)

    # The view is a square of `scale` times the short side, turned and stretched about its centre.
    scale = math.exp(rng.uniform(math.log(options.min_scale), math.log(options.max_scale)))
    stretch = math.exp(rng.uniform(-1, 1) * math.log1p(options.stretch) / 2)
    angle = math.radians(rng.uniform(-1, 1) * options.rotate)
    shift = rng.uniform(-1, 1, 2) * options.shift

    # Shrinking first, antialiased, leaves the turn below at about one pixel a pixel.
    short = min(image.size)
    zoom = size / (scale * short)
    sides = (short, short) if squashed else image.size
    scaled = tuple(max(1, round(side * min(zoom, 1))) for side in sides)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    step = 1 / max(zoom, 1)  # source pixels a result pixel
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    a, b, d, e = cos * stretch, -sin / stretch, sin * stretch, cos / stretch
    half = size / 2
    source = image.size
    centre = (np.asarray(source) * (0.5 + shift)).tolist()
    matrix = (a, b, centre[0] - (a + b) * half, d, e, centre[1] - (d + e) * half)
    image = image.transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=colour
    )
    view = np.asarray(matrix).reshape(2, 3) / np.asarray(source)[:, None]
    view[:, :2] *= size
    return jitter_colours(np.asarray(image), options.colour, rng), view


def boxes_in_view(view, boxes):
    """Boxes of an image as boxes of a view of it.

    Args:
      view: affine map [2, 3], of `augment`.
      boxes: [R, 4] as x0, y0, x1, y1, shares of the image.

    Returns:
      fp32 [R, 4], shares of the view: what it shows of the upright box about each turned one; and
      the share of that box that it shows, [R].
    """
    corners = np.asarray(boxes, np.float64)[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]  # [R, 4, 2]
    corners = (corners - view[:, 2]) @ np.linalg.inv(view[:, :2]).T
    whole = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    shown = whole.clip(0, 1)
    area = lambda boxes: np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)  # noqa: E731
    return shown.astype(np.float32), area(shown) / area(whole)


def jitter_colours(pixels, strength, rng):
    """Scales brightness, contrast and saturation, each by 1 +- strength at random."""
    if not strength:
        return pixels
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    pixels = pixels.astype(np.float32)
    grey = pixels @ np.full((3, 1), 1 / 3, np.float32)
    mean = grey.mean()
    # All three scale a distance: to black, to the mean grey of the view, to the pixel's own grey.
    scale = np.float32(brightness * contrast * saturation)
    grey = np.float32(brightness * contrast * (1 - saturation)) * grey
    pixels = pixels * scale + (grey + np.float32(brightness * (1 - contrast)) * mean)
    return np.clip(pixels + np.float32(0.5), 0, 255).astype(np.uint8)
