"""Encoded images that tests tell apart by their colour."""

import hashlib
import io

from PIL import Image


def encoded(number, file_format="PNG"):
    """The file of an image, 12 x 10, whose colour says its number."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour(number)).save(file, file_format)
    return file.getvalue()


def colour(number):
    """(red, green, blue) of the image with this number."""
    return (number % 256, 40 * number % 256, 255 - number % 256)


def write(path, content):
    """Writes bytes or a text, and the folders above it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def assert_images(dataset, numbers):
    """The images of a data set are those with these numbers."""
    assert [dataset.pixels(i, 4)[2, 2].tolist() for i in range(len(dataset.images))] == [
        list(colour(number)) for number in numbers
    ]


def sha256(*files):
    """The hash of the files' bytes, one after another."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
