"""The evaluation's preprocessing against OpenAI's for CLIP: not a pixel apart.

That is `Image.open(file).convert("RGB")`, then torchvision's Resize (bicubic, antialiased) and
CenterCrop. The checksums are of what torchvision 0.28.0 made with Pillow 13.0.0.
"""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.data import images

SIZE = 48
ONE = 1 << 22  # a weight of 1 in Pillow's fixed-point arithmetic


def pattern(width, height):
    """Waves of whole numbers, the same on every machine; a crop off by one pixel shows."""
    y, x, channel = np.indices((height, width, 3))
    return Image.fromarray(
        ((3 * x * x + 5 * y * y + 7 * x * y + 50 * channel) // 16 % 256).astype(np.uint8)
    )


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def checksum(pixels):
    return zlib.crc32(np.ascontiguousarray(pixels).tobytes())


# ---- resize and crop -----------------------------------------------------------------------------


def bicubic_weights(source, target):
    """[target, source]: Keys' cubic with a = -0.5, widened where it shrinks (antialiasing)."""
    scale = source / target
    wide = max(scale, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * scale
    x = np.abs((np.arange(source)[None] + 0.5 - centres) / wide)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.trunc(weights * ONE + np.copysign(0.5, weights)).astype(np.int64)


def along(rows, weights):
    """Pixels [A, W, C] weighted along W, by whole numbers as in Pillow: bytes [target, A, C]."""
    total = np.einsum("tw,awc->tac", weights, rows.astype(np.int64)) + ONE // 2
    return (total // ONE).clip(0, 255).astype(np.uint8)


def reference_resize_and_crop(pixels, size, height_first=False):
    """torchvision's Resize(size) and CenterCrop(size), written from their documentation."""
    height, width = pixels.shape[:2]
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    if height_first:
        down = along(pixels.transpose(1, 0, 2), bicubic_weights(height, new_height))
        resized = along(down, bicubic_weights(width, new_width)).transpose(1, 0, 2)
    else:
        across = along(pixels, bicubic_weights(width, new_width))  # [new_width, height, 3]
        resized = along(across, bicubic_weights(height, new_height))
    top = int(round((new_height - size) / 2.0))  # noqa: RUF046  (torchvision's own words)
    left = int(round((new_width - size) / 2.0))  # noqa: RUF046
    return resized[top : top + size, left : left + size]


GOLDEN = {
    (101, 67): 266260301,  # landscape; 48 * 101 / 67 = 72.4, cut down to 72
    (67, 101): 1459912601,  # portrait
    (77, 77): 1604884664,
    (31, 20): 3006897466,  # enlarged; the margin of (74 - 48) / 2
    (49, 48): 2451741667,  # not scaled, a margin of 0.5: rounded to 0
    (51, 48): 2455344761,  # a margin of 1.5: rounded to 2
    (48, 53): 3170595554,  # a margin of 2.5: rounded to 2
    (48, 48): 2451741667,
    (500, 7): 1196219725,
    (7, 500): 1129335887,
    (1, 1): 1681368239,
    (641, 480): 97064623,
    (333, 500): 2820644126,
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_resize_and_crop_is_torchvisions(shape):
    image = pattern(*shape)
    ours = images.resize_and_crop(image, SIZE)
    assert (ours.shape, ours.dtype) == ((SIZE, SIZE, 3), np.uint8)
    np.testing.assert_array_equal(ours, reference_resize_and_crop(np.asarray(image), SIZE))
    assert checksum(ours) == GOLDEN[shape]


def test_noise_of_any_size_is_resized_as_by_the_reference():
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width, size = (int(n) for n in random.integers([5, 5, 4], [90, 90, 60]))
        pixels = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        ours = images.resize_and_crop(Image.fromarray(pixels), size)
        expected = reference_resize_and_crop(pixels, size)
        # From version 13 on Pillow starts with the height of a tall image: other bytes in between.
        if height > 2 * width and (ours != expected).any():
            expected = reference_resize_and_crop(pixels, size, height_first=True)
        np.testing.assert_array_equal(ours, expected)


# ---- training images -----------------------------------------------------------------------------

OFF = images.Augmentation(1.0, 4 / 3, 0.0, False, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", GOLDEN)
def test_a_training_image_that_is_not_augmented_is_the_evaluations(shape):
    encoded = encode(pattern(*shape))
    rng = np.random.default_rng(0)
    ours, view = images.augment(encoded, SIZE, OFF, rng)
    assert checksum(ours) == GOLDEN[shape]
    # The view's corners are those of the central square; the long side was cut down, see above.
    (scaled_width, scaled_height), (left, top) = images.middle(shape, SIZE)
    corners = np.asarray([[0, 0, 1], [1, 1, 1]]) @ view.T * [scaled_width, scaled_height]
    np.testing.assert_allclose(corners, [[left, top], [left + SIZE, top + SIZE]], atol=1e-9)

    ours, view = images.augment(encoded, SIZE, OFF, rng, squashed=True)
    np.testing.assert_array_equal(ours, images.squash(pattern(*shape), SIZE))
    np.testing.assert_array_equal(view, [[1, 0, 0], [0, 1, 0]])


# ---- kinds of files ------------------------------------------------------------------------------

PICTURE = pattern(101, 67)
PALETTE = PICTURE.quantize(64)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned by a quarter

AS_OPENAI = {
    "grey": encode(PICTURE.convert("L")),
    "bilevel": encode(PICTURE.convert("1")),
    "palette": encode(PALETTE),
    "opaque RGBA": encode(PICTURE.convert("RGBA")),
    "opaque grey with alpha": encode(PICTURE.convert("LA")),
    "CMYK TIFF": encode(PICTURE.convert("CMYK"), "TIFF"),
    "CMYK JPEG": encode(PICTURE.convert("CMYK"), "JPEG"),
    "JPEG": encode(PICTURE, "JPEG"),
    "JPEG, EXIF": encode(PICTURE, "JPEG", exif=TURNED.tobytes()),
    "PNG, EXIF": encode(PICTURE, exif=TURNED.tobytes()),
    "WebP": encode(PICTURE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", AS_OPENAI)
def test_these_kinds_of_files_are_read_as_in_openais_pipeline(kind):
    encoded = AS_OPENAI[kind]
    theirs = Image.open(io.BytesIO(encoded)).convert("RGB")
    np.testing.assert_array_equal(images.decode(encoded), theirs)
    ours = images.resize_and_crop(images.decode(encoded), SIZE)
    np.testing.assert_array_equal(ours, reference_resize_and_crop(np.asarray(theirs), SIZE))


def test_grey_and_black_and_white_are_torchvisions():
    found = {
        kind: checksum(images.resize_and_crop(images.decode(AS_OPENAI[kind]), SIZE))
        for kind in ("grey", "bilevel", "PNG, EXIF")
    }
    assert found == {"grey": 3920810248, "bilevel": 3203334800, "PNG, EXIF": GOLDEN[101, 67]}


def test_an_orientation_in_the_exif_is_not_applied():
    assert Image.open(io.BytesIO(AS_OPENAI["JPEG, EXIF"])).getexif()[0x0112] == 6
    assert images.decode(AS_OPENAI["JPEG, EXIF"]).size == (101, 67)
    plain = images.decode(AS_OPENAI["JPEG"])
    np.testing.assert_array_equal(images.decode(AS_OPENAI["JPEG, EXIF"]), plain)


def test_a_clear_palette_entry_is_white_where_openais_pipeline_shows_its_colour():
    encoded = encode(PALETTE, transparency=3)
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    clear = np.asarray(PALETTE) == 3
    assert 0 < clear.sum() < clear.size and (theirs[clear] != 255).any()
    expected = np.where(clear[..., None], 255, theirs)
    np.testing.assert_array_equal(images.decode(encoded), expected)


def test_16_bits_are_scaled_where_openais_pipeline_clips_them():
    grey = np.asarray(PICTURE)[..., 0]
    encoded = encode(Image.fromarray(grey.astype(np.uint16) * 257))
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert (theirs[grey > 0] == 255).all()
    np.testing.assert_array_equal(images.decode(encoded), np.stack([grey] * 3, axis=-1))
    between = encode(Image.fromarray(np.array([[256, 257, 65534, 65535]], np.uint16)))
    assert np.asarray(images.decode(between))[0, :, 0].tolist() == [0, 1, 254, 255]


@pytest.mark.parametrize("kind", ["JPEG", "grey", "palette", "WebP", "CMYK TIFF"])
def test_a_truncated_file_is_no_image(kind):
    with pytest.raises(OSError):
        images.decode(AS_OPENAI[kind][:-200])
