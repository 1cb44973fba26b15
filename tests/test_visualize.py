"""tools/visualize.py on a small run: what it draws, its numbers, and every mistake in one line."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny_dataset
from PIL import Image

from mmgem_jax import trained_run
from mmgem_jax.data import images
from mmgem_jax.data.tokenizer import embedding_row
from mmgem_jax.evaluation import datasets, region_pictures, similarity_pictures
from mmgem_jax.evaluation.examples import Regions
from mmgem_jax.models.mmgem import MMGem

BOXES = ("0.1,0.2,0.5,0.9", "0.5,0,1,0.6", "0,0,1,1")


@pytest.fixture
def visualize(call_tool):
    """`visualize(*arguments)` calls the tool."""
    return functools.partial(call_tool, "visualize.py")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A file of an image that is wider than high, of another colour everywhere."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = np.random.default_rng(3).integers(0, 256, (5, 9, 3), np.uint8)
    Image.fromarray(noise).resize((90, 50), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """What the tool draws, in the plain data that it hands to the drawing functions."""
    calls = []

    def noted(real):
        def draw(examples, names):
            calls.append((examples, names))
            return real(examples, names)

        return draw

    for room, name in ((region_pictures, "draw_regions"), (similarity_pictures, "draw_similarity")):
        monkeypatch.setattr(room, name, noted(getattr(room, name)))
    return calls


@pytest.fixture
def made(monkeypatch):
    """The data set `made`: five images, of which four have regions."""
    regions = Regions(
        images=np.array([0, 0, 0, 1, 3, 4]),
        boxes=np.tile(np.float32([0.25, 0, 1, 0.5]), (6, 1)) * np.linspace(0.5, 1, 6)[:, None],
        texts=["red hat", "blue cup", "red hat", "grey shoe", "hat", "cup"],
        keys=[f"r{row}" for row in range(6)],
    )
    dataset = dataclasses.replace(tiny_dataset.dataset(5), regions=regions)
    monkeypatch.setattr(datasets, "open_dataset", lambda name, path, split: dataset)
    return dataset


def steps(trained, *numbers):
    """The --checkpoint of some steps of the run."""
    folders = [trained[0] / "checkpoints" / str(number) for number in numbers]
    return [part for folder in folders for part in ("--checkpoint", folder)]


def boxes_of(*texts):
    return [part for text in texts for part in ("--box", text)]


@functools.cache
def loaded(workdir, step):
    return trained_run.load(workdir / "checkpoints" / str(step))


@functools.cache
def compiled(model, method):
    return jax.jit(functools.partial(model.apply, method=method))


def apply(run, method, *arrays):
    """A function of the model on one device, with nothing around it."""
    params = jax.device_get(run.params)
    return np.array(compiled(run.model, method)({"params": params}, *arrays))


def squashed(path, size=32):
    picture = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)[None]


# ---- numbers -------------------------------------------------------------------------------------


def box_about(row, column, window, side):
    """Of `window` x `window` cells about the cell of a side x side map, cut at its edge."""
    x, y, half = (column + 0.5) / side, (row + 0.5) / side, window / 2 / side
    return max(0, x - half), max(0, y - half), min(1, x + half), min(1, y + half)


@pytest.mark.parametrize(("window", "numbered"), [(0, (2, 3)), (3, (3,))])
def test_the_numbers_are_the_models_for_each_box(
    trained, visualize, photo, tmp_path, window, numbered
):
    texts = ["a red hat", "dog"]
    out, numbers = tmp_path / "heat.png", tmp_path / "heat.json"
    arguments = ["similarity", *steps(trained, *numbered), "--image", photo, "--out", out]
    arguments += ["--json", numbers, "--window", window, "--text", texts[0], "--text", texts[1]]
    status, printed, err = visualize(*arguments)
    assert (status, printed, err) == (0, "", "")
    result = json.loads(numbers.read_text())
    (example,) = result["examples"]
    assert (example["image"], example["texts"]) == ("photo.png", texts)
    boxes = [box_about(row, column, window or 2, 4) for row in range(4) for column in range(4)]
    for model, stamp, step in zip(example["models"], result["models"], numbered, strict=True):
        run = loaded(trained[0], step)
        rows = [embedding_row(run.tokenizer, text, run.config.data.text_length) for text in texts]
        tokens, index, _ = (np.asarray(column) for column in zip(*rows, strict=True))
        embedded = apply(run, MMGem.encode_text, tokens, index.astype(np.int32))
        regions = apply(run, MMGem.encode_regions, squashed(photo), np.float32([boxes]))[0]
        expected = (embedded @ regions.T).reshape(2, 4, 4)
        np.testing.assert_allclose(model["maps"], expected, rtol=0, atol=1e-5)
        assert model["window"] == (window or 2)  # the bins of this model's embedding
        assert stamp["checkpoint"]["step"] == step and stamp["name"] == f"run, step {step}"
        for found, values in zip(model["maxima"], np.array(model["maps"]), strict=True):
            assert found["value"] == values.max() == values[found["row"], found["column"]]
            about = box_about(found["row"], found["column"], window or 2, 4)
            assert found["box"] == pytest.approx(about, abs=1e-6)
    assert np.ptp(example["models"][0]["maps"]) > 0.01  # else all of this says little
    with Image.open(out) as picture:
        assert picture.size[0] > 700


def next_logits(model, picture, box, row):
    visual = model.visual_tokens(model.feature_map(picture), box)[:, 0]
    return model.caption_logits(visual, row, (row >= 0).astype(np.int32))


def greedy(run, picture, box):
    """A caption by reading all of it anew for every token."""
    tokens = trained_run.caption_tokens(run.tokenizer)
    row = [tokens.bos]
    while row[-1] != tokens.eos and len(row) < run.config.data.caption_length:
        padded = np.array([row + [tokens.pad] * (run.config.data.caption_length - len(row))])
        found = apply(run, next_logits, picture, np.float32([[box]]), padded.astype(np.int32))
        scores = found[0, len(row) - 1, : tokens.vocabulary]
        scores[[tokens.pad, tokens.emb, tokens.bos]] = -np.inf
        row.append(int(scores.argmax()))
    return run.tokenizer.decode(row, skip_special_tokens=True)


def test_captions_are_those_of_each_box_by_each_checkpoint(
    trained, visualize, photo, tmp_path, drawn
):
    out = tmp_path / "regions.png"
    arguments = ["regions", *steps(trained, 2, 3), "--image", photo, "--out", out]
    status, printed, err = visualize(*arguments, *boxes_of(*BOXES), "--names", "before", "after")
    assert (status, printed, err) == (0, "", "")
    (((example,), names),) = drawn
    assert names == ["before", "after"] and example.truths == []
    assert example.image.shape == (50, 90, 3)  # in its own aspect
    boxes = [[float(part) for part in text.split(",")] for text in BOXES]
    np.testing.assert_allclose(example.boxes, boxes, atol=1e-7)
    for captions, step in zip(example.captions, (2, 3), strict=True):
        run = loaded(trained[0], step)
        assert captions == [greedy(run, squashed(photo), box) for box in boxes]
    assert len({caption for captions in example.captions for caption in captions}) > 1
    with Image.open(out) as picture:
        width = region_pictures.CARD_WIDTHS[2] + 2 * region_pictures.MARGIN
        assert picture.size[0] == width


# ---- examples of a data set ----------------------------------------------------------------------


ON_MADE = ("--dataset", "made", "--data", "anywhere")


def test_examples_of_a_data_set_with_their_true_texts(trained, visualize, made, tmp_path, drawn):
    arguments = ["regions", *steps(trained, 3), *ON_MADE, "--out", tmp_path / "regions.png"]
    assert visualize(*arguments, "--examples", 9)[0] == 0
    examples, names = drawn[0]
    assert names == ["run, step 3"]
    assert [example.title for example in examples] == ["0.png", "1.png", "3.png", "4.png"]
    first = examples[0]
    assert first.truths == ["red hat", "blue cup", "red hat"]
    np.testing.assert_array_equal(first.boxes, made.regions.boxes[:3])
    assert np.array_equal(first.image, np.asarray(images.decode(made.images[0])))
    assert [len(example.captions[0]) for example in examples] == [3, 1, 1, 1]
    all_of_them = [example.captions[0] for example in examples]

    done = visualize(*arguments, "--keys", "4.png", "0.png", "--most", 2)
    assert done[:2] == (0, "0.png: the first 2 of 3 regions\n")
    examples, _ = drawn[1]
    assert [example.title for example in examples] == ["4.png", "0.png"]
    assert [example.captions[0] for example in examples] == [all_of_them[3], all_of_them[0][:2]]


def test_the_texts_of_a_data_set_point_at_their_own_regions(
    trained, visualize, made, tmp_path, drawn
):
    arguments = ["similarity", *steps(trained, 3), *ON_MADE, "--out", tmp_path / "heat.png"]
    assert visualize(*arguments, "--examples", 2, "--json", tmp_path / "heat.json")[0] == 0
    first, last = drawn[0][0]
    assert (first.title, last.title) == ("0.png", "4.png")  # evenly spaced
    assert (first.texts, last.texts) == (["red hat", "blue cup"], ["cup"])
    np.testing.assert_array_equal(first.boxes[0], made.regions.boxes[[0, 2]])
    np.testing.assert_array_equal(first.boxes[1], made.regions.boxes[[1]])
    assert first.maps[0].shape == (2, 4, 4) and last.maps[0].shape == (1, 4, 4)
    shown = json.loads((tmp_path / "heat.json").read_text())["examples"]
    assert shown[1]["regions"] == [made.regions.boxes[[5]].tolist()]


def test_a_text_that_is_cut_is_told(trained, visualize, photo, tmp_path):
    arguments = ["similarity", *steps(trained, 3), "--image", photo, "--out", tmp_path / "a.png"]
    status, _, err = visualize(*arguments, "--text", "a hat " * 40)
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("warning: run, step 3: cut to fit: 'a hat a hat")


# ---- mistakes ------------------------------------------------------------------------------------


def assert_refused(done, *parts):
    status, out, err = done
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


FOUR = "expected four numbers x0,y0,x1,y1"
ORDERED = "expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
NO_FOUR = ("0,0,1", "0,0,1,1,1", "0,0,one,1", "")
DISORDER = ("0,0,1.1,1", "-0.1,0,1,1", "0.6,0,0.5,1", "0.1,0.5,0.9,0.5", "nan,0,1,1", "1,2,5,9")


@pytest.mark.parametrize(
    ("box", "expected"), [(b, FOUR) for b in NO_FOUR] + [(b, ORDERED) for b in DISORDER]
)
def test_a_box_that_is_none(trained, visualize, photo, tmp_path, box, expected):
    arguments = ["regions", *steps(trained, 3), "--image", photo, "--out", tmp_path / "a.png"]
    done = visualize(*arguments, "--box", "0,0,1,1", f"--box={box}")
    assert_refused(done, f"--box: found {box!r}, {expected}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["maps"], ["invalid choice: 'maps'"]),
        (["regions", "--out", "a.png"], ["--checkpoint"]),
        (["regions", "CHECKPOINT"], ["--out"]),
        (["regions", "GOOD"], ["--image, --dataset: found none; expected one of the two"]),
        (["regions", "GOOD", "IMAGE", *ON_MADE], ["--image, --dataset: found both"]),
        (["regions", "GOOD", "IMAGE"], ["--box: found none"]),
        (["similarity", "GOOD", "IMAGE"], ["--text: found none"]),
        (["similarity", "GOOD", "IMAGE", "--text", " "], ["--text: found an empty one"]),
        (["similarity", "GOOD", *ON_MADE, "--text", "a"], ["--text: is for an --image"]),
        (["regions", "GOOD", *ON_MADE, "--box", "0,0,1,1"], ["--box: is for an --image"]),
        (["regions", "GOOD", "--dataset", "made"], ["--data: found none"]),
        (["regions", "GOOD", *ON_MADE, "--keys", "3.png", "2.png"], ["--keys: found '2.png'"]),
        (["regions", "GOOD", *ON_MADE, "--examples", "0"], ["--examples: found 0, expected 1"]),
        (["regions", "GOOD", *ON_MADE, "--most", "0"], ["--most: found 0, expected 1 or more"]),
        (["regions", "GOOD", *ON_MADE, "--image_size", "0"], ["--image_size: found 0"]),
        (["regions", "GOOD", *ON_MADE, "--names", "a", "b"], ["--names: found 2, expected 1"]),
        (["regions", *["GOOD"] * 3, *ON_MADE], ["--checkpoint: found 3, expected one or two"]),
        (
            ["regions", "CHECKPOINT", *ON_MADE, "--out", "a.xyz"],
            ["--out: found a.xyz, expected a file"],
        ),
        (
            ["similarity", "GOOD", "IMAGE", "--text", "a", *boxes_of(*BOXES)],
            ["--box: found 3; expected 1, one a --text"],
        ),
        (
            ["similarity", "GOOD", "IMAGE", "--text", "a", "--data", "x"],
            ["--data: is for a --dataset"],
        ),
        (["regions", "GOOD", *ON_MADE, "--text", "a"], ["unrecognized arguments: --text a"]),
        (["regions", "GOOD", *ON_MADE, "--checkpoint", "/no"], ["checkpoint /no: no config.json"]),
        (["regions", "GOOD", *ON_MADE, "--out", "/no/a.png"], ["--out /no/a.png: No such file"]),
        (["similarity", "GOOD", *ON_MADE, "--json", "/no/a"], ["--json /no/a: No such file"]),
        (["similarity", "GOOD", *ON_MADE, "--window", "-1"], ["--window: found -1, expected 0"]),
        (["similarity", "GOOD", *ON_MADE, "--window", "5"], ["window: found 5 cells, expected 1"]),
        (["regions", "GOOD", "--image", "/no.png", "--box", "0,0,1,1"], ["no.png", "No such file"]),
        (["regions", "GOOD", "--image", __file__, "--box", "0,0,1,1"], ["bytes of no image"]),
    ],
)
def test_a_mistake_is_one_line(trained, visualize, made, photo, tmp_path, arguments, parts):
    checkpoint = steps(trained, 3)
    good = [*checkpoint, "--out", tmp_path / "a.png"]
    words = {"GOOD": good, "CHECKPOINT": checkpoint, "IMAGE": ["--image", photo]}
    given = [part for word in arguments for part in words.get(word, [word])]
    assert_refused(visualize(*given), *parts)
    assert not (tmp_path / "a.png").exists()


def test_a_data_set_without_regions(trained, visualize, tmp_path, monkeypatch):
    plain = tiny_dataset.dataset(2)
    monkeypatch.setattr(datasets, "open_dataset", lambda name, path, split: plain)
    arguments = ["regions", *steps(trained, 3), *ON_MADE, "--out", tmp_path / "a.png"]
    assert_refused(visualize(*arguments), "--dataset: made has no regions; expected one that has")
