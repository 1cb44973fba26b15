"""Files that are no images: one cause each, whatever is in them, and never another exception."""

import collections
import io
import pickle
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgem_jax.data import image_files, images
from mmgem_jax.data.broken import CAUSES, Broken
from mmgem_jax.errors import UserError

OPTIONS = images.Augmentation(0.5, 4 / 3, 0.5, True, 1.0, 1.0, 0.0, 0.0, 0.0, 0.2, 0.5)
LIMITS = image_files.Limits(max_pixels=1 << 20, max_aspect=50.0)


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def view(encoded, limits=LIMITS):
    return images.augment(encoded, 16, OPTIONS, np.random.default_rng(0), limits=limits)[0]


def cause_of(encoded, limits=LIMITS):
    with pytest.raises(Broken) as error:
        view(encoded, limits)
    return error.value.cause


def noise(width, height, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels))
    return Image.fromarray(pixels.astype(np.uint8))


def png(width, height):
    """A PNG that says it has that size, and ends where its pixels should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 99) + b"IDAT"


# ---- causes --------------------------------------------------------------------------------------


def test_causes_are_names_of_metrics_and_differ():
    assert len(set(CAUSES)) == len(CAUSES)
    assert all(re.fullmatch("[a-z_]+", cause) for cause in CAUSES)


@pytest.mark.parametrize("arguments", [("image",), ("pixels", "9x9 pixels")])
def test_an_error_comes_whole_out_of_a_worker_process(arguments):
    error = Broken(*arguments)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.cause, again.detail) == (Broken, error.cause, error.detail)
    assert str(again) == ": ".join(arguments)


def test_a_cause_that_there_is_not_is_a_mistake():
    with pytest.raises(ValueError, match="'pixel' is no cause"):
        Broken("pixel")


PHOTO = noise(40, 30)
FILES = {
    "JPEG": encode(PHOTO, "JPEG"),
    "progressive JPEG": encode(PHOTO, "JPEG", progressive=True),
    "grey JPEG": encode(PHOTO.convert("L"), "JPEG"),
    "CMYK JPEG": encode(PHOTO.convert("CMYK"), "JPEG"),
    "PNG": encode(PHOTO),
    "RGBA PNG": encode(noise(30, 40, 4)),
    "palette PNG": encode(PHOTO.quantize(16), transparency=3),
    "16-bit PNG": encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 99)),
    "WebP": encode(PHOTO, "WEBP"),
    "lossless WebP": encode(PHOTO, "WEBP", lossless=True),
    "GIF": encode(PHOTO, "GIF", save_all=True, append_images=[noise(40, 30), noise(40, 30)]),
    "BMP": encode(PHOTO, "BMP"),
    "TIFF": encode(PHOTO, "TIFF"),
    "LZW TIFF": encode(PHOTO, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_cut_off_is_no_image(kind):
    encoded = FILES[kind]
    assert view(encoded).shape == (16, 16, 3)
    for kept in (1, 8, 20, len(encoded) // 2):
        assert cause_of(encoded[:kept]) == "image"


def test_what_is_no_image_at_all_is_none():
    for encoded in (b"\0", b"not an image" * 99, b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert cause_of(encoded) == "image"
    assert cause_of(png(0, 5)) == cause_of(png(5, 0)) == "image"
    assert cause_of(b"") == cause_of(None) == "no_image"


@pytest.mark.parametrize("file_format", ["EPS", "PCX"])
def test_a_format_that_is_not_one_of_the_few_is_none(file_format):
    """Pillow knows them; for an EPS it would start Ghostscript."""
    encoded = encode(PHOTO, file_format)
    assert Image.open(io.BytesIO(encoded)).size == (40, 30)
    assert cause_of(encoded) == "image"


def test_a_size_is_refused_by_the_header_before_anything_is_decoded(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "load", None)
        patch.setattr(images, "load", None)
        assert cause_of(png(1025, 1024)) == "pixels"
        assert cause_of(png(510, 10)) == "aspect"
        assert cause_of(png(10, 510)) == "aspect"
        # Pillow warns of the first and refuses the others.
        no_limits = image_files.NO_LIMITS
        assert cause_of(png(10_000, 10_000)) == "pixels"
        assert cause_of(png(20_000, 20_000), no_limits) == "pixels"
        assert cause_of(png(1 << 30, 1 << 30), no_limits) == "pixels"
    assert cause_of(png(1024, 1024)) == "image"  # within the limits, and not whole
    assert cause_of(png(500, 10)) == "image"
    assert view(encode(Image.new("RGB", (500, 10)))).shape == (16, 16, 3)


def test_what_is_wider_than_memory_has_room_for_is_refused_without_limits_too():
    assert cause_of(encode(Image.new("L", (1001, 1))), image_files.NO_LIMITS) == "aspect"
    assert view(encode(Image.new("L", (1000, 1))), image_files.NO_LIMITS).shape == (16, 16, 3)


def test_a_format_that_this_pillow_has_not_is_not_asked_for(monkeypatch):
    """It would fail of the name, for every file whose format is none of those before it."""
    assert {"JPEG", "PNG", "WEBP"} <= set(image_files.FORMATS)
    monkeypatch.delitem(Image.OPEN, "PPM")
    assert image_files.formats() == tuple(f for f in image_files.FORMATS if f != "PPM")


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_a_known_white_have_the_wrong_channels(mode):
    assert cause_of(encode(Image.new(mode, (9, 9)), "TIFF")) == "channels"


def test_of_several_images_in_a_file_it_is_the_first():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for file_format in ("GIF", "WEBP", "TIFF", "PNG"):
        encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
        pixel = np.asarray(images.decode(encoded))[4, 4].tolist()
        assert pixel == pytest.approx([250, 0, 0], abs=6)


def test_a_warning_of_pillow_is_no_cause():
    """An EXIF block that is nonsense; of a JPEG that says it holds several images, but does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(PHOTO, "JPEG", exif=exif.tobytes())
    place = jpeg.index(b"Exif\0\0") + 6
    broken = jpeg[:place] + b"MM\0*\0\0\0\x08\xff\xff" + jpeg[place + 10 :]
    several = jpeg[:2] + b"\xff\xe2\0\x0aMPF\0abcd" + jpeg[2:]
    warned = 0
    for encoded in (broken, several):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            Image.open(io.BytesIO(encoded)).getexif()
        warned += len(heard)
        assert view(encoded).shape == (16, 16, 3)
    assert warned


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 0}, r"data\.max_pixels: 0; expected above 0"),
        ({"max_pixels": 10**9}, r"data\.max_pixels: 1000000000; .* limit of 178956970"),
        ({"max_aspect": 1e9}, r"data\.max_aspect: 1e\+09; expected from 1 to 1000"),
        ({"max_aspect": 0.5}, r"data\.max_aspect: 0\.5; expected from 1 to 1000"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, message):
    with pytest.raises(UserError, match=message):
        image_files.Limits(**limits)


# ---- files that were damaged ---------------------------------------------------------------------

ALL = list(FILES.values())
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def damaged(encoded, random):
    """The file with one to three of the accidents and tricks that files meet with."""
    data = bytearray(encoded)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(0, max(1, len(data))))
        near = int(random.integers(0, max(1, min(64, len(data)))))
        other = ALL[random.integers(len(ALL))]
        match random.integers(6):
            case 0:  # bits
                for at in random.integers(0, max(1, len(data)), 4):
                    data[at : at + 1] = bytes([int(random.integers(256))])
            case 1:
                del data[place:]
            case 2:  # a field of the header
                width = int(random.choice([1, 2, 4]))
                data[near : near + width] = bytes([int(random.choice(EDGES))]) * width
            case 3:  # a part of another file
                start = int(random.integers(len(other)))
                data[place : place + 40] = other[start : start + int(random.integers(80))]
            case 4:
                del data[place : place + int(random.integers(1, 30))]
            case _:  # a part twice
                data[place:place] = data[near : near + int(random.integers(1, 200))]
    return bytes(data)


def outcome(encoded):
    """The cause, or "read"; every other exception is the test's."""
    try:
        pixels = view(encoded)
    except Broken as error:
        assert error.cause in CAUSES
        return error.cause
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    return "read"


def test_damaged_files_are_read_or_broken_and_nothing_else():
    random = np.random.default_rng(0)
    outcomes = collections.Counter(
        outcome(damaged(encoded, random)) for encoded in ALL for _ in range(3000 // len(ALL) + 1)
    )
    assert outcomes.total() > 3000
    assert outcomes["read"] > 300 and outcomes["image"] > 1000, outcomes
    assert {"pixels", "aspect"} <= set(outcomes), outcomes


@settings(max_examples=300)
@given(st.sampled_from(ALL), st.integers(0, 60), st.binary(max_size=12), st.integers(0, 12))
def test_any_bytes_in_a_header_are_read_or_broken(encoded, place, inserted, removed):
    outcome(encoded[:place] + inserted + encoded[place + removed :])
