"""Heat maps: their colours, their maximum, their numbers, read back from pixels."""

import itertools

import numpy as np
import pytest
import tiny_dataset
from PIL import Image

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import similarity_pictures
from mmgem_jax.evaluation.similarity_pictures import (
    GAP,
    LINE_HEIGHT,
    MARGIN,
    PANEL,
    SimilarityExample,
    draw_similarity,
    heat_colours,
    heat_panel,
    numbers,
)
from mmgem_jax.models.pooling import boxes_around_cells

HEAD = MARGIN + LINE_HEIGHT + 4
ROW = PANEL + 2 * similarity_pictures.SMALL_LINE + GAP


def peak(row, column, shape=(6, 6)):
    """A map with its maximum, 0.9, at that cell."""
    values = np.full(shape, 0.1, np.float32)
    values[row, column] = 0.9
    return values


def example(maps, texts=("hat",), boxes=None, windows=None, shade=128, **fields):
    image = np.full((40, 40, 3), shade, np.uint8)
    boxes = boxes or [np.zeros((0, 4), np.float32)] * len(texts)
    return SimilarityExample(image, [*texts], maps, windows or [1] * len(maps), boxes, **fields)


def drawn(*examples, names=("one",)):
    return np.asarray(draw_similarity(examples, names)).astype(int)


def panel(pixels, column, row=0):
    """One of the pictures: 0 is the image, 1 and on are the texts'."""
    left, top = MARGIN + column * (PANEL + GAP), HEAD + row * ROW
    return pixels[top : top + PANEL, left : left + PANEL]


def lightness(colours):
    """CIE L* of colours [..., 3] up to 255."""
    channels = np.asarray(colours) / 255
    linear = np.where(channels > 0.04045, ((channels + 0.055) / 1.055) ** 2.4, channels / 12.92)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return 116 * np.cbrt(luminance) - 16


# ---- what the model is asked ---------------------------------------------------------------------


class Made:
    """A Predictor in batches of two with embeddings of noise."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.cells = random.normal(size=(6, 3, 4, 8)).astype(np.float32)  # the last only fills up
        self.phrases = {}
        self.noise = random

    def embed_texts(self, params, texts):
        assert len(set(texts)) == len(texts)
        for text in texts:
            self.phrases[text] = self.noise.normal(size=8).astype(np.float32)
        return np.stack([self.phrases[text] for text in texts]), np.char.count(texts, "long") > 0

    def read_images(self, params, dataset):
        for start in range(0, len(dataset.images), 2):
            places = np.arange(start, min(start + 2, len(dataset.images)))
            yield places, np.zeros((2, 3, 4, 1)) + start

    def embed_cells(self, params, feature_map, window):
        start = int(feature_map[0, 0, 0, 0])
        return self.cells[start : start + 2] + window


def test_each_images_own_texts_are_compared_with_its_own_cells():
    texts = [["a"], ["b", "a", "a long one"], ["c"], ["b"], ["c", "d"]]
    made = Made()
    dataset = tiny_dataset.dataset(5)
    maps, cut = similarity_pictures.similarity_maps(made, {}, dataset, texts, 2)
    assert cut == ["a long one"] and len(maps) == 5
    for place, own in enumerate(texts):
        for text, values in zip(own, maps[place], strict=True):
            assert values.shape == (3, 4) and values.dtype == np.float32
            for cell in np.ndindex(3, 4):
                expected = np.dot(made.phrases[text], made.cells[place][cell] + 2)
                assert values[cell] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="window: found 5 cells, expected 1 to 4, the map's side"):
        similarity_pictures.similarity_maps(made, {}, dataset, texts, 5)


# ---- colours -------------------------------------------------------------------------------------


def test_the_scale_gets_lighter_evenly_so_that_it_needs_no_colours():
    levels = lightness(heat_colours(np.linspace(0, 1, 21)))
    steps = np.diff(levels)
    assert levels[0] < 15 and levels[-1] > 88
    assert steps.min() > 0.6 * steps.mean() and steps.max() < 1.4 * steps.mean()
    # Without red cones (Vienot et al., 1999) neighbours on the scale still differ as much.
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    linear = (heat_colours(np.linspace(0, 1, 11)) / 255) ** 2.2
    seen = 255 * np.clip(linear @ protan.T, 0, 1) ** (1 / 2.2)
    assert np.diff(lightness(seen)).min() > 3


def test_a_plain_image_shows_the_maps_own_colours():
    image = Image.new("RGB", (120, 60), (77, 77, 77))
    values = np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]])
    found = np.asarray(heat_panel(image, values, 0.0, 1.0)).astype(int)
    for (row, column), value in np.ndenumerate(values):  # at the centre of each cell
        here = found[15 + 30 * row, 20 + 40 * column]
        assert here == pytest.approx(heat_colours(np.array(value)), abs=8)
    low = np.asarray(heat_panel(image, values, -1.0, 1.0))
    assert low[15, 20] == pytest.approx(heat_colours(np.array(0.5)), abs=8)
    flat = np.asarray(heat_panel(image, np.full((2, 2), 0.3), 0.3, 0.3))
    assert (flat == similarity_pictures.ANCHORS[0]).all()


def test_the_image_is_seen_beneath():
    image = np.full((120, 120, 3), 200, np.uint8)
    image[40:80, 40:80] = (180, 30, 30)
    found = heat_panel(Image.fromarray(image), np.full((6, 6), 0.5), 0.0, 1.0)
    found = np.asarray(found).astype(int).sum(axis=-1)
    assert found[60, 36] - found[60, 43] > 60  # its edge
    assert abs(found[5, 5] - found[115, 100]) < 3


# ---- the sheet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [(0, 0), (4, 1), (2, 5)])
def test_the_ring_is_about_the_maximum(cell):
    flat = np.full((6, 6), 0.5, np.float32)  # its own maximum is the first cell
    pixels = panel(drawn(example([np.stack([peak(*cell), flat])], ["a", "b"])), 1)
    white = np.argwhere((pixels == 255).all(axis=-1))
    assert white.mean(axis=0) == pytest.approx((np.array(cell) + 0.5) / 6 * PANEL, abs=1.5)
    centre = pixels[tuple(white.mean(axis=0).round().astype(int))]
    assert centre == pytest.approx(heat_colours(np.array(1.0)), abs=20)


def test_texts_are_columns_and_models_are_rows_of_a_scale_each():
    first = np.stack([peak(1, 1), peak(4, 4) - 0.5])
    second = np.stack([peak(1, 4, (8, 8)), peak(6, 1, (8, 8))]) * 0.1
    pixels = drawn(example([first, second], ["a", "b"]), names=("one", "two"))
    assert (panel(pixels, 0) == 128).all() and (panel(pixels, 0, 1) == 128).all()
    for row, column, place in ((0, 1, 1.5 / 6), (1, 2, 6.5 / 8)):
        found = panel(pixels, column, row)
        white = np.argwhere((found == 255).all(axis=-1)).mean(axis=0)
        assert white[0] == pytest.approx(place * PANEL, abs=1.5)
    corner = panel(pixels, 1)[-3, -3], panel(pixels, 2)[3, 3]  # 0.1 and -0.4, of -0.4 to 0.9
    assert corner[0] == pytest.approx(heat_colours(np.array(0.5 / 1.3)), abs=2)
    assert corner[1] == pytest.approx(heat_colours(np.array(0.0)), abs=2)
    scale = pixels[HEAD + 1 : HEAD + PANEL - 1, MARGIN + 3 * (PANEL + GAP) + 8]
    assert scale[0] == pytest.approx(heat_colours(np.array(1.0)), abs=3)
    assert scale[-1] == pytest.approx(heat_colours(np.array(0.0)), abs=3)


def test_the_regions_of_a_text_are_outlined_on_its_panel_alone():
    box = np.array([[0.25, 0.5, 0.75, 1.0]], np.float32)
    boxes = [np.zeros((0, 4), np.float32), box]
    maps = [np.stack([peak(0, 0), peak(0, 0)])]
    pixels = drawn(example(maps, ["a", "b"], boxes))
    for column, there in ((1, False), (2, True)):
        found = panel(pixels, column)
        for row, place in ((121, 120), (237, 120), (180, 61), (180, 177)):
            assert (found[row, place] == 255).all() == there
    without = drawn(example(maps, ["a", "b"]))
    assert (without[-40:] == 255).all(axis=-1).sum() > (pixels[-40:] == 255).all(axis=-1).sum()


def test_many_and_long_texts_take_more_lines_and_none_is_clipped():
    texts = [f"a long text about the hat no. {i} on a table" for i in range(6)]
    maps = [np.stack([peak(i, i) for i in range(6)])]
    pixels = drawn(example(maps, texts))
    assert pixels.shape[1] == 2 * MARGIN + 4 * (PANEL + GAP) + similarity_pictures.BAR_ROOM
    assert len(pixels) > 2 * ROW
    for column in range(1, 4):
        gutter = MARGIN + column * (PANEL + GAP)
        assert (pixels[:-60, gutter - GAP + 4 : gutter] == 255).all()  # the legend is below
    assert (pixels[:MARGIN] == 255).all() and (pixels[:, -MARGIN:] == 255).all()
    lines = [similarity_pictures._text_lines(example([], ["a"] * n)) for n in range(1, 14)]
    for count, ranges in enumerate(lines, 1):
        assert [*itertools.chain(*ranges)] == [*range(count)]
        assert max(map(len, ranges)) <= 4 and max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("shape", [(10, 300, 3), (300, 10, 3), (3, 3, 3)])
def test_images_of_any_shape_are_drawn(shape):
    tall = example([peak(1, 1)[None]])
    tall = SimilarityExample(np.zeros(shape, np.uint8), ["a"], tall.maps, [1], tall.boxes, "x" * 99)
    assert drawn(tall).shape[1] >= 2 * MARGIN + 2 * (PANEL + GAP)


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(UserError, match="examples: found none"):
        drawn()
    with pytest.raises(UserError, match="one without a text"):
        drawn(example([], []))


# ---- numbers -------------------------------------------------------------------------------------


def test_the_numbers_are_those_that_are_drawn():
    maps = [
        np.stack([peak(4, 1), np.ones((6, 6), np.float32)]),
        peak(2, 3, (4, 4))[None].repeat(2, 0),
    ]
    box = np.array([[0.25, 0.5, 0.75, 1.0]], np.float32)
    shown = example(maps, ["a", "b"], [box, box[:0]], [3, 1], title="key")
    found = numbers(shown, ["one", "two"])
    assert (found["image"], found["texts"]) == ("key", ["a", "b"])
    assert found["regions"] == [[[0.25, 0.5, 0.75, 1.0]], []]
    for model, name, values, window in zip(
        found["models"], ("one", "two"), maps, (3, 1), strict=True
    ):
        assert (model["name"], model["window"]) == (name, window)
        np.testing.assert_array_equal(np.array(model["maps"], np.float32), values)
        for text in range(2):
            highest = model["maxima"][text]
            assert highest["value"] == values[text].max()
            assert values[text, highest["row"], highest["column"]] == highest["value"]
    highest = found["models"][0]["maxima"]
    assert (highest[0]["row"], highest[0]["column"]) == (4, 1)
    assert highest[0]["box"] == pytest.approx([0, 0.5, 0.5, 1.0])
    assert (highest[1]["row"], highest[1]["column"]) == (0, 0)  # the first of equals
    second = boxes_around_cells(4, 4, 1)[2, 3].tolist()
    assert found["models"][1]["maxima"][0]["box"] == second
