"""Encoded images to pixels: the evaluation's resize and crop, and the training augmentation."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from mmgem_jax.data.image_files import NO_LIMITS, as_rgb, load, open_image
from mmgem_jax.errors import UserError

WHITE = (255, 255, 255)
TRIES = 10  # at a random crop that lies within the image


def decode(encoded, background=WHITE):
    """Bytes of an image file as an RGB PIL image, transparency set on the background colour.

    Pixel for pixel what OpenAI's pipeline for CLIP gets from Pillow's `convert("RGB")`, but for two
    kinds of files that it loses: there transparency is dropped, which shows colours never meant to
    be seen, and 16-bit grey is clipped to white above 255. As there, an orientation in the file's
    EXIF is not applied. Raises Pillow's exceptions for bytes that are no whole image.
    """
    return as_rgb(Image.open(io.BytesIO(encoded)), background)


def resize_and_crop(image, size):
    """Short side to `size` (bicubic, antialiased), then the central square: OpenAI's for CLIP.

    Returns:
      uint8 [size, size, 3].
    """
    return resize_and_cut(image, size, *middle(image.size, size))


def squash(image, size):
    """The whole image resized to the square, its aspect not kept: no region falls outside.

    Returns:
      uint8 [size, size, 3].
    """
    return resize_and_cut(image, size, (size, size), (0, 0))


def middle(sides, size):
    """What an image of these sides is resized to, and where the central square then begins.

    Rounding is torchvision's: the long side is cut down to an integer, the square's corner rounded.
    """
    scaled = tuple(int(size * side / min(sides)) for side in sides)
    return scaled, tuple(round((side - size) / 2) for side in scaled)


def resize_and_cut(image, size, scaled, corner):
    """The square of `size` pixels a side that begins at a corner of the image resized."""
    left, top = corner
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a random view may be; every field is explained in configs/base.py."""

    min_area: float
    max_ratio: float
    flip: float
    draft: bool
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
        ranges = {
            "min_area": (0 < self.min_area <= 1, "above 0, at most 1"),
            "max_ratio": (1 <= self.max_ratio < math.inf, "at least 1"),
            "flip": (0 <= self.flip <= 1, "from 0 to 1"),
        }
        for name, (within, expected) in ranges.items():
            if not within:
                found = getattr(self, name)
                raise UserError(f"data.augment.{name}: {found:g}; expected {expected}")
        if self.min_area < 1 and self.turns:
            name = self.turns[0]
            raise UserError(
                f"data.augment.{name}: {getattr(self, name):g} with min_area {self.min_area:g}; "
                "expected one of the two to be off"
            )

    @property
    def turns(self):
        """Names of what is on of scale, shift, stretch and rotation."""
        off = {"min_scale": 1, "max_scale": 1, "shift": 0, "stretch": 0, "rotate": 0}
        return [name for name, value in off.items() if getattr(self, name) != value]


def augment(encoded, size, options, rng, squashed=False, limits=NO_LIMITS):
    """A random view of an image: its place, size, shape, turn, side, colours and background.

    Args:
      encoded: bytes of the image file.
      size: pixels a side of the result.
      options: an Augmentation.
      rng: numpy Generator; the same state gives the same view.
      squashed: whether the view is of the image resized to a square, and not of its middle.
      limits: the Limits of what the file's header may say.

    Returns:
      uint8 [size, size, 3], and the affine map [2, 3] from places in the view to places in the
      image, both as shares of width and height; see `boxes_in_view`.

    Raises:
      Broken: training cannot take the image.
    """
    random_background = rng.random() < options.background
    colour = tuple(int(c) for c in rng.integers(0, 256, 3)) if random_background else WHITE
    image = open_image(encoded, limits)
    if options.min_area < 1:
        pixels, view = crop_view(image, size, options, rng, squashed, colour)
    elif options.turns:
        pixels, view = turned_view(image, size, options, rng, squashed, colour)
    else:
        pixels, view = still_view(image, size, options, squashed, colour)
    if options.flip and rng.random() < options.flip:
        pixels = pixels[:, ::-1]
        view = view @ [[-1, 0, 1], [0, 1, 0], [0, 0, 1]]  # x is 1 - x
    return jitter_colours(pixels, options.colour, rng), view


def still_view(image, size, options, squashed, colour):
    """The evaluation's view, pixel for pixel: `squash` or `resize_and_crop`."""
    scaled, corner = ((size, size), (0, 0)) if squashed else middle(image.size, size)
    pixels = load(image, colour, scaled if options.draft else None)
    return resize_and_cut(pixels, size, scaled, corner), view_of_box(*corner, size, size, scaled)


def crop_view(image, size, options, rng, squashed, colour):
    """torchvision's RandomResizedCrop, bicubic and antialiased."""
    sides = image.size
    left, top, wide, high = draw_crop(sides, options, rng, squashed)
    view = view_of_box(left, top, wide, high, sides)
    enough = tuple(
        math.ceil(size * side / cut) for side, cut in zip(sides, (wide, high), strict=True)
    )
    image = load(image, colour, enough if options.draft else None)
    if image.size == sides:
        image = image.crop((left, top, left + wide, top + high))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)), view
    edges = zip((left, top, left + wide, top + high), image.size * 2, sides * 2, strict=True)
    box = tuple(edge * drafted / side for edge, drafted, side in edges)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)), view


def draw_crop(sides, options, rng, squashed):
    """Left, top, width and height in pixels of a random crop, as torchvision draws them.

    The area is a uniform share of the image's, the logarithm of the aspect ratio uniform too; of a
    squashed image the ratio is that of the square.
    """
    width, height = sides
    ratio_of_one = width / height if squashed else 1.0
    widest = math.log(options.max_ratio)
    for _ in range(TRIES):
        area = width * height * rng.uniform(options.min_area, 1)
        ratio = ratio_of_one * math.exp(rng.uniform(-widest, widest))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top = int(rng.integers(0, height - high + 1))
            return int(rng.integers(0, width - wide + 1)), top, wide, high
    # None lay within: the middle, as much of it as the ratio lets be.
    wide = min(width, round(height * ratio_of_one * options.max_ratio))
    high = min(height, round(width / ratio_of_one * options.max_ratio))
    return (width - wide) // 2, (height - high) // 2, wide, high


def view_of_box(left, top, wide, high, sides):
    """The map [2, 3], as of `augment`, of a view that is an upright box of an image."""
    width, height = sides
    return np.asarray([[wide / width, 0, left / width], [0, high / height, top / height]])


def turned_view(image, size, options, rng, squashed, colour):
    """A square of the image scaled, shifted, stretched and turned, with a margin of the colour."""
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
    image = load(image, colour, scaled if options.draft else None)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    step = 1 / max(zoom, 1)  # source pixels a result pixel
    cos, sin = math.cos(angle) * step, math.sin(angle) * step
    a, b, d, e = cos * stretch, -sin / stretch, sin * stretch, cos / stretch
    half = size / 2
    centre = (np.asarray(scaled) * (0.5 + shift)).tolist()
    matrix = (a, b, centre[0] - (a + b) * half, d, e, centre[1] - (d + e) * half)
    image = image.transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=colour
    )
    view = np.asarray(matrix).reshape(2, 3) / np.asarray(scaled)[:, None]
    view[:, :2] *= size
    return np.asarray(image), view


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
