"""The picture of samples: what is on it, read back from its pixels."""

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import samples
from mmgem_jax.evaluation.samples import Sample, draw_samples


def sample(name="cat", caption="cat", first="cat", shade=0, shape=(20, 20, 3)):
    neighbours = [(first, 0.9), ("dog", 0.5), ("hen", -0.1)]
    return Sample(np.full(shape, shade, np.uint8), name, caption, neighbours)


def drawn(tmp_path, rows, title="Title"):
    draw_samples(tmp_path / "samples.png", rows, title)
    return np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).astype(int)


def has(pixels, colour):
    return bool((pixels == colour).all(axis=-1).any())


def cards(pixels):
    """The grid below the header, where only cards are."""
    return pixels[samples.HEADER_HEIGHT :]


@pytest.mark.parametrize("caption", ["cat", "dog"])
@pytest.mark.parametrize("first", ["cat", "dog"])
def test_right_is_blue_and_wrong_is_vermillion(tmp_path, caption, first):
    row = sample(caption=caption, first=first)
    assert (row.caption_right, row.nearest_right) == (caption == "cat", first == "cat")
    grid = cards(drawn(tmp_path, [row]))
    assert has(grid, samples.BLUE) == ("cat" in (caption, first))
    assert has(grid, samples.VERMILLION) == ("dog" in (caption, first))


def test_case_and_white_space_do_not_make_a_caption_wrong():
    assert sample(caption=" Cat\n").caption_right
    assert not sample(caption="cats").caption_right
    assert not Sample(np.zeros((1, 1, 3), np.uint8), "cat", "", []).nearest_right


def test_the_bars_show_the_share_that_is_right(tmp_path):
    rows = [sample()] * 3 + [sample(caption="dog")]
    header = drawn(tmp_path, rows)[: samples.HEADER_HEIGHT]
    middle = header.shape[1] // 2
    blue = (header == samples.BLUE).all(axis=-1)
    captions, nearest = blue[-15:, :middle].sum(), blue[-15:, middle:].sum()
    assert captions / nearest == pytest.approx(3 / 4, abs=0.01)


def test_every_drawing_stands_on_its_card_in_reading_order(tmp_path):
    shades = [0, 50, 100, 150, 200, 25, 75, 125, 175]
    pixels = drawn(tmp_path, [sample(shade=shade) for shade in shades])
    for place, shade in enumerate(shades):
        line, column = divmod(place, samples.COLUMNS)
        left = samples.MARGIN + column * (samples.CARD_WIDTH + samples.GAP)
        top = samples.HEADER_HEIGHT + line * (samples.CARD_HEIGHT + samples.GAP)
        centre = pixels[top + samples.CARD_HEIGHT // 2, left + 8 + samples.DRAWING // 2]
        assert centre == pytest.approx([shade] * 3, abs=4)


def test_long_text_ends_in_an_ellipsis_inside_its_card(tmp_path):
    long = sample(name="W" * 200, caption="W " * 200, first="M" * 200)
    grid = cards(drawn(tmp_path, [long], title="W" * 300))
    right = samples.MARGIN + samples.CARD_WIDTH
    assert (grid[:, right:] == 255).all()


@pytest.mark.parametrize("text", ["piñata", "Åre \u2013 漢", "two\nlines", "nul\x00", "\U0001f600"])
def test_letters_the_font_lacks_are_no_mistake(tmp_path, text):
    draw_samples(tmp_path / "samples.png", [sample(name=text, caption=text, first=text)], text)


def test_a_sheet_of_drawings_is_a_small_file(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        image = np.full((64, 64, 3), 255, np.uint8)
        for _ in range(6):  # shaded discs, much as drawings have
            centre, radius = rng.integers(16, 48, size=2), rng.integers(6, 26)
            rows_, columns = np.mgrid[:64, :64] - centre[:, None, None]
            shade = 1 - rows_[..., None] / 90
            disc = np.hypot(rows_, columns) < radius
            image[disc] = (shade * rng.integers(20, 180, size=3))[disc]
        neighbours = [(f"a longer name {other}", 0.5) for other in range(3)]
        rows.append(Sample(image, f"the true name {number}", "a caption", neighbours))
    draw_samples(tmp_path / "samples.png", rows)
    assert (tmp_path / "samples.png").stat().st_size < 200_000


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    with pytest.raises(UserError, match="rows: found no samples"):
        draw_samples(tmp_path / "samples.png", [])
    grey = Sample(np.zeros((4, 4), np.uint8), "cat", "cat", [])
    with pytest.raises(UserError, match=r"image: found uint8 \(4, 4\)"):
        draw_samples(tmp_path / "samples.png", [grey])
