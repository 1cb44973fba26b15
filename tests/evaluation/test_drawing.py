"""Text, colours, boxes and marks of the pictures, read back from pixels."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import drawing
from mmgem_jax.evaluation.drawing import BADGE, BOX_COLOURS, WHITE, font, wrapped


def pixels(sheet):
    return np.asarray(sheet).astype(int)


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("piñata", "pinata"),
        ("Åre \u2013 漢", "Are - ?"),
        ("woman\u2019s", "woman\u2019s"),
        ("two\nlines", "two lines"),
        ("nul\x00", "nul?"),
        ("\U0001f600", "?"),
    ],
)
def test_letters_the_font_lacks_are_replaced(text, printed):
    assert drawing.printable(text) == printed


def test_a_shortened_text_fits_and_says_that_it_is():
    short = drawing.shortened("W" * 200, 15, 100)
    assert short.endswith("W…") and font(15).getlength(short) <= 100
    assert drawing.shortened("cat", 15, 100) == "cat"


@pytest.mark.parametrize(
    "text", ["", "cat", "a red apple on the left of a blue cup", "W" * 50, "a " + "W" * 30 + " b c"]
)
def test_wrapped_lines_fit_and_nothing_is_lost(text):
    lines = wrapped(text, 15, 100)
    assert all(font(15).getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    for line, following in itertools.pairwise(lines):  # none is shorter than it has to be
        assert font(15).getlength(f"{line} {following.split()[0]}") > 100
    assert wrapped("W", 15, 1) == ["W"]


# ---- colours -------------------------------------------------------------------------------------


def test_contrasts_are_those_of_wcag():
    assert drawing.contrast_with_white((0, 0, 0)) == pytest.approx(21)
    assert drawing.contrast_with_white(WHITE) == pytest.approx(1)
    assert drawing.contrast_with_white((118, 118, 118)) == pytest.approx(4.54, abs=0.01)  # known


def test_text_can_be_read_and_keeps_the_colour_of_its_box():
    for colour in BOX_COLOURS:
        dark = np.array(drawing.text_colour(colour))
        assert drawing.contrast_with_white(tuple(dark)) >= drawing.LEAST_CONTRAST
        share = dark.max() / max(colour)
        assert share > 0.8 and dark == pytest.approx(share * np.array(colour), abs=1)
    assert drawing.text_colour(drawing.BLUE) == drawing.BLUE
    assert len({drawing.text_colour(colour) for colour in BOX_COLOURS}) == len(BOX_COLOURS)


# ---- marks, boxes --------------------------------------------------------------------------------


def test_right_and_wrong_differ_in_shape_too():
    # Whoever sees no colours still tells the marks apart.
    marks = []
    for right in (True, False):
        sheet = Image.new("RGB", (16, 16), "white")
        drawing.draw_mark(sheet, (0, 0), 16, right)
        marks.append(pixels(sheet).sum(axis=-1) < 600)
    tick, cross = marks
    assert (tick & cross).sum() < 0.6 * min(tick.sum(), cross.sum())


def test_a_box_is_drawn_on_its_edge_and_not_beyond():
    sheet = Image.new("RGB", (100, 50), "black")
    place = drawing.place_of((0.1, 0.2, 0.6, 1.0), sheet.size)
    assert place == (10, 10, 60, 50)
    drawing.draw_box(ImageDraw.Draw(sheet), place, (10, 200, 30))
    found = pixels(sheet)
    assert (found[12:48, 11:15] == (10, 200, 30)).all() and (found[12:48, 55:59, 1] == 200).all()
    assert (found[11:15, 12:58, 1] == 200).all() and (found[45:49, 12:58, 1] == 200).all()
    assert (found[10, 10:60] == 255).all() and (found[10:50, 59] == 255).all()  # the casing
    inside = found[16:44, 16:54]
    assert (inside == 0).all()
    found[10:50, 10:60] = 0
    assert (found == 0).all()


def test_a_box_of_next_to_no_size_is_seen():
    sheet = Image.new("RGB", (100, 50), "black")
    drawing.draw_box(ImageDraw.Draw(sheet), drawing.place_of((0.5, 0.5, 0.5001, 0.9), (100, 50)), 1)
    assert (pixels(sheet) == 255).any()


def test_badges_stay_on_the_picture_touch_their_box_and_keep_off_each_other():
    random = np.random.default_rng(0)
    for _ in range(50):
        size = tuple(random.integers(60, 300, 2).tolist())
        low, high = np.sort(random.random((2, 2)), axis=0)
        place = drawing.place_of((*low, *high), size)
        left, top, right, bottom = drawing.badge_place(place, size)
        assert left >= 0 and right <= size[0] and top >= 0 and bottom <= size[1]
        assert (right - left, bottom - top) == (BADGE, BADGE)
        assert left <= place[2] and right >= place[0] and top <= place[3] and bottom >= place[1]
    place, badges = (50, 50, 150, 150), []
    for _ in range(6):
        badges.append(drawing.badge_place(place, (200, 200), badges, [place] * 6))
    for one, other in itertools.combinations(badges, 2):
        assert drawing._shared(one, other) == 0
    above = (45, 20, 160, 49)  # another box, where the badge would stand
    found = drawing.badge_place(place, (200, 200), boxes=[above])
    assert drawing._shared(found, above) == 0
    small = (0, 0, 30, 10)  # which a badge on it would hide
    assert drawing._shared(drawing.badge_place(small, (200, 200)), small) == 0


def test_a_badges_number_can_be_read_on_its_colour():
    for colour in BOX_COLOURS:
        sheet = Image.new("RGB", (BADGE, BADGE))
        drawing.draw_badge(ImageDraw.Draw(sheet), (0, 0), 8, colour)
        assert (pixels(sheet)[2, 2] == colour).all()
        extreme = pixels(sheet)[4:-4, 4:-4].sum(axis=-1)
        light = drawing.contrast_with_white(colour) >= 3
        assert extreme.max() > 700 if light else extreme.min() < 100


# ---- images and files ----------------------------------------------------------------------------


def test_an_image_keeps_its_aspect_whether_larger_or_smaller():
    assert drawing.fitted(np.zeros((10, 20, 3), np.uint8), 100, 80).size == (100, 50)
    assert drawing.fitted(np.zeros((400, 100, 3), np.uint8), 100, 80).size == (20, 80)
    assert drawing.fitted(np.zeros((1, 900, 3), np.uint8), 90, 80).size == (90, 1)
    with pytest.raises(UserError, match=r"image: found uint8 \(4, 4\)"):
        drawing.fitted(np.zeros((4, 4), np.uint8), 10, 10)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no/a.png: No such file or directory; expected a file"):
        drawing.save_sheet(Image.new("RGB", (2, 2)), tmp_path / "no" / "a.png")
