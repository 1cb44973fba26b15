import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.data import scene_canvas
from mmgem_jax.data.scene_canvas import SIDE, Canvas, Slot

HUES = {
    "red": (345, 15),
    "orange": (20, 42),
    "yellow": (44, 64),
    "green": (90, 160),
    "blue": (200, 240),
    "purple": (265, 295),
    "pink": (320, 350),
    "brown": (15, 35),
}


def drawing(width, height, colour=(255, 0, 0, 255), margin=5):
    """A filled ellipse amid transparency."""
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5) / width - 0.5) ** 2 + ((y + 0.5) / height - 0.5) ** 2 <= 0.25
    pixels = np.zeros((height + 2 * margin, width + 2 * margin, 4), np.uint8)
    pixels[margin:-margin, margin:-margin][inside] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return scene_canvas.trim(buffer.getvalue())


def white():
    return Canvas("stripes", ("red", "blue"), Image.new("RGB", (SIDE, SIDE), "white"))


def test_a_drawing_loses_its_margins():
    assert drawing(40, 20).size == (40, 20)


@pytest.mark.parametrize("size", [(40, 40), (50, 20), (13, 37)])
def test_the_box_is_tight_round_what_is_seen(size):
    slot = Slot(left=30, top=50, side=44)
    image, boxes, visible = scene_canvas.compose(white(), [drawing(*size)], [slot])
    rows, columns = np.nonzero(np.abs(np.asarray(image).astype(int) - 255).max(axis=2) >= 32)
    seen = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    np.testing.assert_array_equal(boxes * SIDE, [seen])
    np.testing.assert_array_equal(visible, [1])
    top, left, bottom, right = boxes[0] * SIDE
    assert max(bottom - top, right - left) == 44
    assert abs(min(bottom - top, right - left) - 44 * min(size) / max(size)) <= 1
    # The middle of the slot is the middle of the box: aspect and place are independent.
    np.testing.assert_allclose([(top + bottom) / 2, (left + right) / 2], [72, 52], atol=1)


def test_later_drawings_cover_earlier_ones():
    green = drawing(40, 40, (0, 255, 0, 255))
    slots = [Slot(20, 20, 40), Slot(40, 20, 40), Slot(90, 90, 30)]
    image, _, visible = scene_canvas.compose(white(), [drawing(40, 40), green, green], slots)
    # Two circles of radius r, r apart, share 2/3 pi - sqrt(3)/2 of r squared.
    shared = (2 / 3 * np.pi - np.sqrt(3) / 2) / np.pi
    np.testing.assert_allclose(visible, [1 - shared, 1, 1], atol=0.01)
    assert image.getpixel((50, 40)) == (0, 255, 0)


def test_the_largest_iou_is_that_of_the_worst_two():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.8, 0.8, 1, 1]])
    assert scene_canvas.largest_iou(boxes) == pytest.approx(1 / 3)
    assert scene_canvas.largest_iou(boxes[1:]) == 0
    assert scene_canvas.largest_iou(boxes[:1]) == 0


def test_slots_lie_within_the_scene_everywhere_and_hardly_overlap():
    rng = np.random.default_rng(0)
    drawn = [scene_canvas.place_slots([40, 30, 50], rng) for _ in range(300)]
    drawn = [slots for slots in drawn if slots]  # a few are too crowded for the third
    assert len(drawn) > 250
    for slots in drawn:
        assert [slot.side for slot in slots] == [40, 30, 50]
        shown = np.zeros((SIDE, SIDE), int)
        for slot in slots:
            assert min(slot.left, slot.top) >= 0
            assert max(slot.left, slot.top) + slot.side <= SIDE
            shown[slot.top : slot.top + slot.side, slot.left : slot.left + slot.side] += 1
        assert np.sum(shown > 1) <= 0.12 * (30**2 + 30**2 + 40**2)
    # The first is anywhere: each side's spread is that of equal shares.
    corners = [(slots[0].left, slots[0].top) for slots in drawn]
    np.testing.assert_allclose(np.std(corners, axis=0), (SIDE - 40) / np.sqrt(12), rtol=0.1)
    assert scene_canvas.place_slots([100, 100], rng) is None


def test_the_colours_are_what_they_are_called():
    for name, (red, green, blue) in scene_canvas.COLOURS.items():
        hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        if name in HUES:
            low, high = HUES[name]
            assert (360 * hue - low) % 360 <= (high - low) % 360, name
            assert saturation > 0.3
        else:
            assert saturation < 0.2
            low, high = {"black": (0, 0.2), "gray": (0.4, 0.7), "white": (0.9, 1)}[name]
            assert low <= value <= high
    assert scene_canvas.COLOURS["brown"] < scene_canvas.COLOURS["orange"]  # else one hue


def test_a_canvas_is_of_the_two_colours_that_it_names_and_never_flat():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(80):
        canvas = scene_canvas.draw_canvas(rng)
        seen |= {canvas.texture, *canvas.colours}
        first, second = (np.array(scene_canvas.COLOURS[name], float) for name in canvas.colours)
        pixels = np.asarray(canvas.image).reshape(-1, 3).astype(float)
        along = (pixels - first) @ (second - first) / np.sum((second - first) ** 2)
        aside = np.linalg.norm(pixels - first - along[:, None] * (second - first), axis=1)
        near = aside < 50  # uneven light, plain shapes and mixed colours leave most of it
        assert near.mean() > 0.5
        assert np.mean(along < 0.35) > 0.1
        assert np.mean(along > 0.65) > 0.1
        assert pixels.std(axis=0).max() > 8
    assert seen == {*scene_canvas.TEXTURES, *scene_canvas.COLOURS}


def test_textures_look_as_they_are_called():
    """Along the texture's own directions: where a scan changes from one colour to the other."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        gradient = scene_canvas._texture("gradient", rng)
        steps = np.stack([np.diff(gradient, axis=0)[:, :-1], np.diff(gradient, axis=1)[:-1]])
        assert np.ptp(steps, axis=(1, 2)).max() < 1e-9  # one slope everywhere
        stripes = scene_canvas._texture("stripes", rng) - 0.5
        checks = scene_canvas._texture("checks", rng) - 0.5
        # One wave has one pair of peaks in the plane of frequencies, checks have two.
        for texture, pairs in ((stripes, 1), (checks, 2)):
            power = np.abs(np.fft.fft2(texture * np.outer(np.hanning(SIDE), np.hanning(SIDE))))
            peaks = np.argwhere(power > 0.5 * power.max())
            directions = np.mod(np.degrees(np.arctan2(*centred(peaks).T)), 180)
            assert len(clusters(directions)) == pairs


def centred(peaks):
    return (peaks + SIDE // 2) % SIDE - SIDE // 2


def clusters(degrees):
    """Directions that are more than 25 degrees from those before, on a half circle."""
    found = []
    for angle in degrees:
        if all(min((angle - other) % 180, (other - angle) % 180) > 25 for other in found):
            found.append(angle)
    return found
