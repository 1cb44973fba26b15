"""Files of images to RGB, where some of them may be broken: limits, causes, and no warnings."""

import contextlib
import dataclasses
import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmgem_jax.data.broken import Broken
from mmgem_jax.errors import UserError, first_line

# Not all that Pillow reads: for an EPS, say, it starts Ghostscript.
TRUSTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Of 32-bit integers and floating-point numbers nothing says which of them is white; of LAB Pillow
# makes no RGB.
MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
WIDEST = 1000  # long side to short one; resized by the short one, more would fill the memory
PILLOWS_LIMIT = 2 * Image.MAX_IMAGE_PIXELS  # of more pixels Pillow opens no image


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the header of an image may say; explained in configs/base.py."""

    max_pixels: int = PILLOWS_LIMIT
    max_aspect: float = WIDEST

    def __post_init__(self):
        if not 0 < self.max_pixels <= PILLOWS_LIMIT:
            raise UserError(
                f"data.max_pixels: {self.max_pixels}; expected above 0, and at most Pillow's own "
                f"limit of {PILLOWS_LIMIT}"
            )
        if not 1 <= self.max_aspect <= WIDEST:
            raise UserError(f"data.max_aspect: {self.max_aspect:g}; expected from 1 to {WIDEST}")


NO_LIMITS = Limits()  # but Pillow's own, and that of the memory


def formats():
    """Those of TRUSTED that this Pillow has: of a name that it does not know, it would fail."""
    Image.init()
    return tuple(name for name in TRUSTED if name in Image.OPEN)


FORMATS = formats()


def open_image(encoded, limits=NO_LIMITS):
    """A PIL image of which only the header has been read; Broken where training cannot take it.

    Of several images in a file it is the first.
    """
    if not encoded:
        raise Broken("no_image")
    with broken_images():
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    long, short = max(image.size), min(image.size)
    found = f"{image.width}x{image.height} pixels"
    if long * short > limits.max_pixels:
        raise Broken("pixels", found)
    if long > limits.max_aspect * short:
        raise Broken("aspect", found)
    if image.mode not in MODES and not image.mode.startswith("I;16"):
        raise Broken("channels", f"Pillow's mode {image.mode}")
    return image


def load(image, background, least=None):
    """An image of `open_image` in RGB; Broken where its bytes are not whole.

    Args:
      image: from `open_image`.
      background: colour behind what is transparent.
      least: (width, height) that are enough, where a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
        size; None: all of it.
    """
    with broken_images():
        if least:
            image.draft(None, least)
        return as_rgb(image, background)


def as_rgb(image, background):
    """A PIL image of any mode in RGB, transparency set on the background colour."""
    if image.mode.startswith("I;16"):  # Pillow would make white of all above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


@contextlib.contextmanager
def broken_images():
    """Makes one Broken of all that Pillow raises on a file, and lets none of its warnings out."""
    try:
        # Python has one list of filters a process: a warning of another thread may go unheard.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise Broken("pixels", first_line(error)) from None
    except UnidentifiedImageError:  # its words are the address of a buffer
        raise Broken("image", "the bytes of no image") from None
    except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
        raise Broken("image", first_line(error)) from None
