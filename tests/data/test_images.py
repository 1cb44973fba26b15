import io
import zlib

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.data import images
from mmgem_jax.errors import UserError

OFF = {
    "min_area": 1.0,
    "max_ratio": 4 / 3,
    "flip": 0.0,
    "draft": False,
    "min_scale": 1.0,
    "max_scale": 1.0,
    "shift": 0.0,
    "stretch": 0.0,
    "rotate": 0.0,
    "colour": 0.0,
    "background": 0.0,
}
ALL_ON = images.Augmentation(1.0, 4 / 3, 0.5, False, 0.5, 1.5, 0.2, 0.3, 30.0, 0.4, 0.5)


def encode(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def view(encoded, size=48, seed=0, **options):
    augmentation = images.Augmentation(**OFF | options)
    return images.augment(encoded, size, augmentation, np.random.default_rng(seed))[0]


def picture(width, height, seed=0):
    """Noise over waves: a crop that is off by one pixel shows."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 9)], axis=-1)
    noise = np.random.default_rng(seed).uniform(-40, 40, (height, width, 3))
    return Image.fromarray((127 + 80 * waves + noise).clip(0, 255).astype(np.uint8))


def square(side=32, size=64, colour=(0, 0, 0, 255)):
    """A square in the middle of a transparent image."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    low = (size - side) // 2
    image.paste(colour, (low, low, low + side, low + side))
    return encode(image)


# ---- decoding ------------------------------------------------------------------------------------


def over(colour, alpha, background=(255, 255, 255)):
    share = alpha / 255
    return share * np.asarray(colour) + (1 - share) * np.asarray(background)


def palette(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 30, 10, 20, 60, 220])
    image.putdata([0, 1])
    return encode(image, transparency=transparency)


CASES = {
    "RGB": (encode(Image.new("RGB", (2, 1), (9, 99, 199))), [(9, 99, 199)] * 2),
    "RGBA": (encode(Image.new("RGBA", (2, 1), (9, 99, 199, 77))), [over((9, 99, 199), 77)] * 2),
    "L": (encode(Image.new("L", (2, 1), 50)), [(50, 50, 50)] * 2),
    "1": (encode(Image.new("1", (2, 1), 1)), [(255, 255, 255)] * 2),
    "LA": (encode(Image.new("LA", (2, 1), (50, 128))), [over((50, 50, 50), 128)] * 2),
    "palette": (palette(None), [(200, 30, 10), (20, 60, 220)]),
    "palette, one clear": (palette(1), [(200, 30, 10), (255, 255, 255)]),
    "palette, alphas": (
        palette(bytes([100, 255])),
        [over((200, 30, 10), 100), (20, 60, 220)],
    ),
    "RGB, one clear": (
        encode(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)),
        [(255, 255, 255)] * 2,
    ),
    "CMYK": (encode(Image.new("CMYK", (2, 1), (255, 0, 0, 0)), "TIFF"), [(0, 255, 255)] * 2),
    "CMYK, JPEG": (encode(Image.new("CMYK", (2, 1), (0, 0, 0, 255)), "JPEG"), [(0, 0, 0)] * 2),
    "16 bits": (
        encode(Image.fromarray(np.asarray([[0, 128 * 257]], np.uint16))),
        [(0, 0, 0), (128, 128, 128)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_file_becomes_rgb_on_white(case):
    encoded, expected = CASES[case]
    image = images.decode(encoded)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[0] - np.asarray(expected, float)).max() <= 1


def test_the_background_shows_where_the_image_is_clear():
    image = Image.fromarray(np.asarray([[[10, 20, 30, 0], [10, 20, 30, 102]]], np.uint8))
    clear, half = np.asarray(images.decode(encode(image), (0, 250, 100)))[0]
    assert clear.tolist() == [0, 250, 100]
    assert np.abs(half - over((10, 20, 30), 102, (0, 250, 100))).max() <= 1


# ---- augmentation --------------------------------------------------------------------------------


def test_the_views_of_earlier_runs_are_drawn_again():
    """configs/emoji.py's, but for the colours, whose last bits are the CPU's."""
    options = {"min_scale": 0.8, "max_scale": 1.2, "shift": 0.07, "stretch": 0.15, "rotate": 10.0}
    options |= {"background": 0.3}
    found, after = 0, []
    for seed, (width, height) in enumerate([(72, 72), (160, 160), (101, 67), (40, 90), (20, 31)]):
        y, x, channel = np.indices((height, width, 3))
        waves = (3 * x * x + 5 * y * y + 7 * x * y + 50 * channel) // 16 % 256
        image = Image.fromarray(waves.astype(np.uint8)).convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 9, 9))
        for squashed in (False, True):
            rng = np.random.default_rng(seed)
            augmentation = images.Augmentation(**OFF | options)
            pixels, _ = images.augment(encode(image), 48, augmentation, rng, squashed)
            found = zlib.crc32(np.ascontiguousarray(pixels).tobytes(), found)
        coloured = images.Augmentation(**OFF | options | {"colour": 0.2})
        rng = np.random.default_rng(seed)
        images.augment(encode(image), 48, coloured, rng)
        after.append(int(rng.integers(1 << 30)))  # as many numbers were drawn as then
    assert found == 1920900992
    assert after == [601206779, 92061848, 874268231, 860361905, 235852165]


def test_a_seed_gives_one_view_and_another_seed_another():
    encoded = encode(picture(80, 60))

    def draw(seed):
        return images.augment(encoded, 48, ALL_ON, np.random.default_rng(seed))[0]

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).mean() > 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (1800, 2), (2, 3), (48, 48), (700, 500)])
@pytest.mark.parametrize("options", [images.Augmentation(**OFF), ALL_ON])
def test_a_view_has_its_shape_whatever_the_image_has(shape, options):
    encoded = encode(Image.new("RGBA", shape, (200, 0, 0, 128)))
    for seed in range(5):
        pixels, _ = images.augment(encoded, 24, options, np.random.default_rng(seed))
        assert (pixels.shape, pixels.dtype) == ((24, 24, 3), np.uint8)


def darkness(pixels):
    """The area that is black, in pixels, and where its centre is."""
    dark = 1 - pixels[..., 0] / 255.0
    places = np.arange(len(pixels)) + 0.5
    area = dark.sum()
    return area, (dark.sum(axis=0) @ places / area, dark.sum(axis=1) @ places / area)


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_scale_is_that_of_the_crop(scale, size):
    area, centre = darkness(view(square(), size, min_scale=scale, max_scale=scale))
    expected = 32 / 64 * size / scale
    assert np.sqrt(area) == pytest.approx(expected, abs=0.25)  # it is shrunk to whole pixels first
    assert centre == pytest.approx((size / 2, size / 2), abs=0.1)


def test_scales_fill_their_range_evenly_in_the_logarithm():
    areas = [darkness(view(square(), 64, s, min_scale=0.5, max_scale=2.0))[0] for s in range(300)]
    logs = np.log2(32 / np.sqrt(areas))
    assert -1.03 < logs.min() < -0.9 and 0.9 < logs.max() < 1.03
    assert np.mean(logs) == pytest.approx(0, abs=0.12)


def test_the_shift_moves_the_view_by_a_share_of_the_image():
    views = [darkness(view(square(), 96, seed, shift=0.1)) for seed in range(100)]
    moved = np.abs(np.asarray([centre for _, centre in views]) - 48)
    assert 8 < moved.max() < 9.7
    assert [area for area, _ in views] == pytest.approx([48**2] * 100, rel=0.02)


def test_the_stretch_is_of_the_aspect_ratio_and_keeps_the_area():
    ratios = []
    for seed in range(100):
        pixels = view(square(), 128, seed, stretch=0.2)
        dark = 1 - pixels[..., 0] / 255.0
        assert dark.sum() == pytest.approx(64**2, rel=0.02)
        ratios.append(dark[64].sum() / dark[:, 64].sum())
    assert 1.15 < max(ratios) < 1.22 and 1 / 1.22 < min(ratios) < 1 / 1.15


def test_a_turn_keeps_the_area_and_stays_within_its_degrees():
    angles = []
    for seed in range(100):
        pixels = view(square(), 128, seed, rotate=20.0)
        dark = 1 - pixels[..., 0] / 255.0
        assert dark.sum() == pytest.approx(64**2, rel=0.02)
        # Rows 20 above and below the middle: the left edge leans by the angle.
        edge = [np.argmax(dark[row] > 0.5) for row in (44, 84)]
        angles.append(np.degrees(np.arctan2(edge[1] - edge[0], 40)))
    assert 17 < max(angles) < 21.5 and -21.5 < min(angles) < -17


def test_beyond_the_edge_is_the_colour_behind_the_drawing():
    drawing = square(colour=(0, 0, 0, 255))
    colours = set()
    for seed in range(20):
        pixels = view(drawing, 48, seed, min_scale=2.0, max_scale=2.0, background=1.0)
        behind = pixels[0, 0]  # beyond the edge
        outside = np.ones((48, 48), bool)
        outside[16:32, 16:32] = False  # the square and its blurred edge
        assert (pixels[outside] == behind).all()
        assert (pixels[20:28, 20:28] == 0).all()
        colours.add(tuple(behind))
    assert len(colours) == 20
    white = view(drawing, 48, min_scale=2.0, max_scale=2.0, rotate=10.0)
    assert (white[:12] == 255).all()


def test_the_background_is_random_as_often_as_asked():
    corners = [view(square(), 8, seed, background=0.3)[0, 0] for seed in range(400)]
    share = np.mean([(corner != 255).any() for corner in corners])
    assert share == pytest.approx(0.3, abs=0.07)


def test_colour_is_brightness_saturation_and_contrast_one_after_another():
    pixels = np.asarray(picture(24, 24)) // 2 + 60
    for seed in range(20):
        brightness, contrast, saturation = 1 + 0.3 * np.random.default_rng(seed).uniform(-1, 1, 3)
        expected = pixels * brightness
        grey = expected.mean(axis=-1, keepdims=True)
        expected = grey + saturation * (expected - grey)
        expected = expected.mean() + contrast * (expected - expected.mean())
        ours = images.jitter_colours(pixels, 0.3, np.random.default_rng(seed))
        assert ours.dtype == np.uint8
        assert np.abs(ours - expected.clip(0, 255)).max() <= 0.51
    assert images.jitter_colours(pixels, 0.0, np.random.default_rng(0)) is pixels


@pytest.mark.parametrize("scales", [(0.0, 1.0), (-1.0, 1.0), (1.2, 1.0)])
def test_scales_that_cannot_be_are_refused(scales):
    with pytest.raises(UserError, match=r"data\.augment: min_scale"):
        images.Augmentation(**OFF | {"min_scale": scales[0], "max_scale": scales[1]})


# ---- boxes in a view -----------------------------------------------------------------------------


@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize("shape", [(90, 90), (120, 70), (50, 80)])
def test_a_box_is_where_the_view_shows_what_was_in_it(shape, squashed):
    """A painted box, found again by its colour in the augmented view."""
    options = images.Augmentation(
        **OFF | {"min_scale": 0.5, "max_scale": 1.5, "shift": 0.2, "stretch": 0.3}
    )
    random = np.random.default_rng(0)
    width, height = shape
    seen = 0
    for seed in range(20):
        x0, x1 = sorted(random.choice(np.arange(width // 5, width * 4 // 5), 2, False).tolist())
        y0, y1 = sorted(random.choice(np.arange(height // 5, height * 4 // 5), 2, False).tolist())
        x1, y1 = x1 + 4, y1 + 4
        painted = np.zeros((height, width, 3), np.uint8)
        painted[y0:y1, x0:x1] = 255
        painted[:, :, 2] = 255  # blue, where the white of the margin and of the box is not
        rng = np.random.default_rng(seed)
        pixels, affine = images.augment(
            encode(Image.fromarray(painted)), 64, options, rng, squashed
        )
        box = np.asarray([[x0 / width, y0 / height, x1 / width, y1 / height]])
        (found,), (visible,) = images.boxes_in_view(affine, box)
        # What is outside of the picture is white as well, and outside of this map.
        xy = np.stack(np.meshgrid(*2 * [(np.arange(64) + 0.5) / 64]), axis=-1)
        xy = xy @ affine[:, :2].T + affine[:, 2]
        inside = ((xy > 0.01) & (xy < 0.99)).all(axis=-1)
        rows, columns = np.nonzero((pixels[..., 0] > 127) & inside)
        if len(rows) < 4:
            continue
        seen += 1
        expected = np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        np.testing.assert_allclose(found, expected, atol=1.6 / 64)
        assert visible == pytest.approx(1, abs=1e-6) or (found == 0).any() or (found == 1).any()
    assert seen > 12


@pytest.mark.parametrize("squashed", [False, True])
def test_a_turned_view_turns_its_boxes_the_same_way(squashed):
    """A small blob off the centre, found again in views that are turned by up to 60 degrees."""
    options = images.Augmentation(**OFF | {"rotate": 60.0, "stretch": 0.2})
    painted = np.zeros((80, 120, 3), np.uint8)
    painted[46:54, 66:74] = 255
    painted[:, :, 2] = 255
    turned = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        encoded = encode(Image.fromarray(painted))
        pixels, affine = images.augment(encoded, 96, options, rng, squashed)
        box = [[66 / 120, 46 / 80, 74 / 120, 54 / 80]]
        centre = np.reshape(images.boxes_in_view(affine, box)[0], (2, 2)).mean(axis=0) * 96
        xy = np.stack(np.meshgrid(*2 * [(np.arange(96) + 0.5) / 96]), axis=-1)
        xy = xy @ affine[:, :2].T + affine[:, 2]
        inside = ((xy > 0.02) & (xy < 0.98)).all(axis=-1)
        rows, columns = np.nonzero((pixels[..., 0] > 127) & inside)
        found = [columns.mean() + 0.5, rows.mean() + 0.5]
        np.testing.assert_allclose(centre, found, rtol=0, atol=0.6)
        turned += abs(affine[0, 1]) > 0.2
    assert turned > 4


def test_a_turned_box_is_the_upright_one_about_it():
    quarter = np.asarray([[0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])  # x = v, y = 1 - u
    boxes, visible = images.boxes_in_view(quarter, [[0.1, 0.2, 0.4, 0.9]])
    np.testing.assert_allclose(boxes, [[0.1, 0.1, 0.8, 0.4]], atol=1e-6)
    half = np.asarray([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])  # the view is the right half
    boxes, visible = images.boxes_in_view(half, [[0.4, 0, 0.9, 1], [0, 0, 0.4, 1]])
    np.testing.assert_allclose(boxes[0], [0, 0, 0.8, 1], atol=1e-6)
    np.testing.assert_allclose(visible, [0.8, 0], atol=1e-6)


def test_a_squashed_image_is_all_there():
    halves = np.zeros((40, 100, 3), np.uint8)
    halves[:, 50:] = 255
    found = images.squash(Image.fromarray(halves), 20)
    assert found.shape == (20, 20, 3) and (found[:, :8] == 0).all() and (found[:, 12:] == 255).all()
