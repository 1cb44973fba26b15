"""The picture of regions and their captions, read back from its pixels."""

import dataclasses

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import region_pictures
from mmgem_jax.evaluation.drawing import BLUE, BOX_COLOURS, GREEN, VERMILLION, text_colour
from mmgem_jax.evaluation.region_pictures import (
    CARD_WIDTHS,
    GAP,
    MARGIN,
    RegionExample,
    draw_regions,
    image_with_boxes,
)

BOXES = np.array([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.9]], np.float32)


def example(*captions, boxes=BOXES, shape=(50, 50, 3), **fields):
    captions = captions or (["a red cup", "a hat"],)
    return RegionExample(np.full(shape, 128, np.uint8), boxes, [*map(list, captions)], **fields)


def drawn(*examples, names=("one",)):
    return np.asarray(draw_regions(examples, names)).astype(int)


def has(pixels, colour):
    return bool((pixels == colour).all(axis=-1).any())


def changed(one, other):
    """The columns and the rows in which two pictures differ, first and last."""
    height = min(len(one), len(other))
    rows, columns = np.nonzero((one[:height] != other[:height]).any(axis=-1))
    return (columns.min(), columns.max()), (rows.min(), rows.max())


# ---- the image -----------------------------------------------------------------------------------


def test_each_box_is_outlined_in_its_colour_where_it_is():
    picture = np.asarray(image_with_boxes(example(), 400, 400)).astype(int)
    assert picture.shape == (400, 400, 3)
    for box, colour in zip(BOXES, BOX_COLOURS, strict=False):
        x0, y0, x1, y1 = (box * 400).round().astype(int)
        x, y = (x0 + x1) // 2, (y0 + y1) // 2
        for row, column in ((y0 + 2, x), (y1 - 3, x), (y, x0 + 2), (y, x1 - 3)):
            assert (picture[row, column] == colour).all()
        assert (picture[y, x] == 128).all()


def test_a_box_is_a_share_of_the_images_own_width_and_height():
    wide = example(boxes=np.array([[0.5, 0.5, 1, 1]], np.float32), shape=(20, 80, 3))
    picture = np.asarray(image_with_boxes(wide, 400, 400)).astype(int)
    assert picture.shape == (100, 400, 3)
    assert (picture[75, 202] == BLUE).all() and (picture[75, 397] == BLUE).all()
    assert (picture[52, 300] == BLUE).all() and (picture[:25] == 128).all()


def test_there_are_more_boxes_than_colours_and_numbers_tell_them_apart():
    boxes = np.tile(np.float32([0.2, 0.2, 0.8, 0.8]), (len(BOX_COLOURS) + 1, 1))
    several = example(["a"] * len(boxes), boxes=boxes)
    assert several.colour(0) == several.colour(len(BOX_COLOURS)) == BLUE
    picture = np.asarray(image_with_boxes(several, 400, 400))
    assert all(has(picture, colour) for colour in BOX_COLOURS)


# ---- the captions --------------------------------------------------------------------------------


def test_a_caption_stands_below_the_image_in_its_boxs_colour():
    before = drawn(example(["a cup", ""]))
    after = drawn(example(["a cup", "a hat"]))
    _, (first, last) = changed(before, after)
    image_ends = MARGIN + region_pictures.PADDING + 400
    assert first > image_ends and last - first < region_pictures.LINE_HEIGHT
    columns = slice(MARGIN + 46, MARGIN + CARD_WIDTHS[1] - 14)  # past the number
    line = after[first : last + 1, columns]
    assert has(line, VERMILLION) and not has(line, BLUE)
    assert has(after[image_ends:first, columns], text_colour(BLUE))


def test_two_models_have_two_columns():
    both = [["a cup", "a hat"], ["a cup", "a hat"]]
    names = ("stage one", "stage two")
    before = drawn(example(*both), names=names)
    middle = MARGIN + CARD_WIDTHS[2] // 2
    left = drawn(example(["a mug", "a hat"], both[1]), names=names)
    right = drawn(example(both[0], ["a mug", "a hat"]), names=names)
    (_, end), rows = changed(before, left)
    (start, _), rows_right = changed(before, right)
    assert end < middle < start and rows == rows_right
    named = drawn(example(*both), names=("stage one", "another"))
    assert changed(before, named)[0][0] > middle - 20


def test_right_and_wrong_captions_are_marked_where_the_truth_is_known():
    green = BOXES[[0, 0, 0]]  # captions and boxes of other colours than the marks
    fields = {"boxes": green, "truths": ["x", "x", "A  red cup"]}
    marks = slice(MARGIN + 46, MARGIN + 64)
    right = drawn(example(["x", "x", "a red cup"], **fields))
    wrong = drawn(example(["x", "x", "a red hat"], **fields))
    below = MARGIN + 14 + 400
    last = slice(-140, -60)
    assert has(right[last, marks], BLUE) and not has(right[last, marks], VERMILLION)
    assert has(wrong[last, marks], VERMILLION) and not has(wrong[last, marks], BLUE)
    assert has(wrong[below:, 64:], GREEN)
    unknown = drawn(example(["x", "x", "a red cup"], boxes=green))
    assert not has(unknown[-60:, marks], BLUE) and not has(unknown[-60:, marks], VERMILLION)


def test_long_captions_are_wrapped_within_their_column():
    long = " ".join(["a long caption"] * 12)
    sides = ([long, long], ["W" * 60, long])
    truths = [long, "short"]
    pixels = drawn(example(*sides, truths=truths), names=("N" * 90, "M" * 90))
    frame = MARGIN + CARD_WIDTHS[2]
    assert (pixels[:, frame:] == 255).all()
    inside = pixels[MARGIN + 420 :, frame - region_pictures.PADDING + 1 : frame - 1]
    blank = (inside[:-60] == 255).all(axis=(1, 2)).mean()
    assert blank > 0.95  # but for the frame
    gutter = MARGIN + 46 + (CARD_WIDTHS[2] - 14 - 46 + GAP) // 2
    text = pixels[-200:-60, gutter - GAP : gutter - 2]
    assert not has(text, VERMILLION)
    assert len(pixels) > len(drawn(example(["a", "b"], ["a", "b"]), names="ab")) + 200


def test_every_example_has_a_card_and_its_own_image():
    shades = [10, 90, 170]
    cards = [
        dataclasses.replace(example(title=f"no. {s}"), image=np.full((9, 9, 3), s, np.uint8))
        for s in shades
    ]
    pixels = drawn(*cards)
    assert pixels.shape[1] == 2 * MARGIN + 2 * CARD_WIDTHS[1] + GAP
    second = MARGIN + CARD_WIDTHS[1] + GAP + CARD_WIDTHS[1] // 2
    first = MARGIN + CARD_WIDTHS[1] // 2
    assert (pixels[80, first] == 10).all() and (pixels[80, second] == 90).all()
    assert (pixels[len(pixels) // 2 + 60, first] == 170).all()


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(UserError, match="examples: found none"):
        drawn()
    with pytest.raises(UserError, match="one without a box"):
        drawn(example([], boxes=BOXES[:0]))
    with pytest.raises(UserError, match="names: found 3 models, expected one or two"):
        drawn(example(), names="abc")
