"""Random crops against torchvision's RandomResizedCrop; mirrored views; where boxes are in them.

The checksums are of what torchvision 0.28.0 made with Pillow 13.0.0.
"""

import dataclasses
import io
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgem_jax.data import images
from mmgem_jax.errors import UserError

SIZE = 48
OFF = images.Augmentation(1.0, 4 / 3, 0.0, False, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


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


# ---- crops ---------------------------------------------------------------------------------------

# Left, top, width and height that torchvision drew from the numbers of numpy's default_rng(0) to
# (4), of which the first was left out, for scale=(0.3, 1) and ratio=(3 / 4, 4 / 3).
CROPS = {
    (101, 67): ((0, 0, 50, 66), 3182517561),
    (67, 101): ((0, 3, 64, 62), 2694391676),
    (640, 48): ((288, 0, 64, 48), 1428382544),  # after ten tries, the middle
    (20, 31): ((1, 13, 19, 16), 2892459942),
    (333, 500): ((31, 75, 251, 236), 3200961350),
}


@pytest.mark.parametrize(("seed", "shape"), list(enumerate(CROPS)))
def test_a_random_crop_is_torchvisions(seed, shape):
    options = dataclasses.replace(OFF, min_area=0.3)
    (left, top, wide, high), expected = CROPS[shape]
    ours, view = images.augment(encode(pattern(*shape)), SIZE, options, np.random.default_rng(seed))
    assert checksum(ours) == expected
    width, height = shape
    corners = np.asarray([[0, 0, 1], [1, 1, 1]]) @ view.T * [width, height]
    np.testing.assert_allclose(corners, [[left, top], [left + wide, top + high]], atol=1e-9)


def test_ten_tries_are_made():
    options = dataclasses.replace(OFF, min_area=0.3)
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    assert images.draw_crop((900, 30), options, rng, False) == (430, 0, 40, 30)
    other.random(2 * 10)  # areas and ratios
    assert rng.random() == other.random()


@settings(max_examples=200)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.floats(0.05, 0.99),
    st.floats(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_crop_lies_in_the_image_and_keeps_to_its_area_and_ratio(
    shape, area, ratio, squashed, seed
):
    options = dataclasses.replace(OFF, min_area=area, max_ratio=ratio)
    box = images.draw_crop(shape, options, np.random.default_rng(seed), squashed)
    left, top, wide, high = box
    width, height = shape
    assert 0 <= left < left + wide <= width and 0 <= top < top + high <= height
    squeeze = height / width if squashed else 1
    # Sides are whole pixels: each is half a pixel off at most.
    narrowest, widest = (wide - 0.5) / (high + 0.5), (wide + 0.5) / (high - 0.5)
    assert narrowest * squeeze <= ratio * (1 + 1e-9) and widest * squeeze >= 1 / ratio - 1e-9
    centre = (width - wide) // 2, (height - high) // 2
    if (left, top) != centre:  # else it can be the one after ten tries
        assert (wide + 0.5) * (high + 0.5) >= area * width * height * (1 - 1e-9)


def test_areas_and_logarithms_of_ratios_are_even_and_every_place_is_seen():
    options = dataclasses.replace(OFF, min_area=0.2, max_ratio=4 / 3)
    rng = np.random.default_rng(0)
    for shape, squashed in (((1000, 1000), False), ((2000, 500), True)):
        crops = [images.draw_crop(shape, options, rng, squashed) for _ in range(2000)]
        shares = np.asarray(crops) / [*shape, *shape]
        # Even, but for crops that did not fit: of the largest areas, those of extreme ratios.
        left, top, wide, high = shares[shares[:, 2] * shares[:, 3] < 0.6].T
        assert np.mean(wide * high) == pytest.approx(0.4, abs=0.02)
        ratios = np.log(wide / high) / math.log(4 / 3)
        assert np.std(ratios) == pytest.approx(2 / math.sqrt(12), rel=0.05)
        for place in (left / (1 - wide), top / (1 - high)):
            assert np.histogram(place, 4, (0, 1))[0] == pytest.approx(len(place) / 4, rel=0.15)


@pytest.mark.parametrize("options", [{}, {"min_area": 0.3}, {"min_scale": 0.8, "shift": 0.1}])
@pytest.mark.parametrize("squashed", [False, True])
def test_a_jpeg_decoded_at_part_of_its_size_shows_nearly_the_same(options, squashed, monkeypatch):
    x, y = np.meshgrid(np.linspace(0, 9, 901), np.linspace(0, 6, 603))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    photo = encode(Image.fromarray((127 + 120 * waves).astype(np.uint8)), "JPEG", quality=95)
    loaded, sizes = images.load, []

    def load(*arguments):
        image = loaded(*arguments)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(images, "load", load)
    for seed in range(6):
        views = [
            images.augment(
                photo,
                SIZE,
                dataclasses.replace(OFF, draft=draft, **options),
                np.random.default_rng(seed),
                squashed,
            )
            for draft in (False, True)
        ]
        (exact, view), (drafted, same_view) = views
        np.testing.assert_array_equal(view, same_view)
        assert np.abs(exact.astype(int) - drafted).mean() < 2.5
    assert sizes[::2] == [(901, 603)] * 6
    for width, height in sizes[1::2]:
        assert width <= 451 and width * view[0, 0] >= SIZE - 1 and height * view[1, 1] >= SIZE - 1


# ---- mirrored views, and boxes -------------------------------------------------------------------

FORMS = {
    "still": OFF,
    "crop": dataclasses.replace(OFF, min_area=0.4),
    "turned": dataclasses.replace(OFF, min_scale=0.7, max_scale=1.2, shift=0.1, rotate=20.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mirrored_view_is_the_view_with_left_and_right_exchanged(form):
    encoded = encode(pattern(101, 67))
    mirrored = dataclasses.replace(FORMS[form], flip=1.0)
    for seed in range(4):
        pixels, view = images.augment(encoded, SIZE, FORMS[form], np.random.default_rng(seed))
        other, other_view = images.augment(encoded, SIZE, mirrored, np.random.default_rng(seed))
        np.testing.assert_array_equal(other, pixels[:, ::-1])
        places = np.random.default_rng(seed).random((5, 2))
        across = places * [-1, 1] + [1, 0]
        np.testing.assert_allclose(
            across @ other_view[:, :2].T + other_view[:, 2],
            places @ view[:, :2].T + view[:, 2],
            atol=1e-12,
        )


def test_a_view_is_mirrored_as_often_as_asked():
    encoded = encode(pattern(20, 20))
    half = dataclasses.replace(OFF, flip=0.3)
    straight, _ = images.augment(encoded, 20, OFF, np.random.default_rng(0))
    views = [images.augment(encoded, 20, half, np.random.default_rng(s))[0] for s in range(400)]
    mirrored = [(pixels != straight).any() for pixels in views]
    assert np.mean(mirrored) == pytest.approx(0.3, abs=0.07)


@settings(max_examples=150)
@given(
    st.sampled_from(list(FORMS)[:2]),
    st.tuples(st.integers(40, 160), st.integers(40, 160)),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 99),
)
def test_what_was_in_a_box_is_where_the_view_says(form, shape, box, squashed, flip, seed):
    """A box painted red, found again by its colour."""
    width, height = shape
    left, right = sorted(int(v * (width - 6)) for v in box[:2])
    top, bottom = sorted(int(v * (height - 6)) for v in box[2:])
    right, bottom = right + 6, bottom + 6
    painted = Image.new("RGB", shape)
    painted.paste((255, 0, 0), (left, top, right, bottom))
    options = dataclasses.replace(FORMS[form], flip=flip)
    pixels, view = images.augment(
        encode(painted), 64, options, np.random.default_rng(seed), squashed
    )
    shares = [[left / width, top / height, right / width, bottom / height]]
    (found,), (visible,) = images.boxes_in_view(view, shares)
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    if not len(rows):  # out of the view, or less than a pixel of it
        assert visible == 0 or np.min(found[2:] - found[:2]) * 64 < 1
        return
    seen = np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    np.testing.assert_allclose(found * 64, seen, atol=1)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_area": 0.0}, r"min_area: 0; expected above 0, at most 1"),
        ({"min_area": 1.5}, r"min_area: 1\.5; expected above 0, at most 1"),
        ({"max_ratio": 0.75}, r"max_ratio: 0\.75; expected at least 1"),
        ({"flip": -0.5}, r"flip: -0\.5; expected from 0 to 1"),
        ({"flip": math.nan}, r"flip: nan; expected from 0 to 1"),
        ({"min_area": 0.5, "shift": 0.1}, r"shift: 0\.1 with min_area 0\.5; expected one"),
        ({"min_area": 0.5, "min_scale": 0.8}, r"min_scale: 0\.8 with min_area 0\.5"),
        ({"min_area": 0.5, "max_scale": 1.2}, r"max_scale: 1\.2 with min_area 0\.5"),
        ({"min_area": 0.5, "stretch": 0.1}, r"stretch: 0\.1 with min_area 0\.5"),
        ({"min_area": 0.5, "rotate": 5.0}, r"rotate: 5 with min_area 0\.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=rf"^data\.augment\.{message}"):
        dataclasses.replace(OFF, **options)
