"""What the PyTorch model takes: pixels, texts, boxes, precisions and devices; what it refuses."""

import copy
import io
import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image
from torch_mmgem import BOXES, TEXTS, B, R, close, loading, ours, pictures, rows, setup, tokenizer
from transformers import masking_utils

from mmgem_jax.convert import modeling_mmgem
from mmgem_jax.data import images as our_images
from mmgem_jax.models.vision import normalize_images


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(variant or folder, **options)`: the model of an exported folder."""
    with loading(tmp_path_factory.mktemp("exported")) as load:
        yield load


def test_rows_of_texts_equal_ours(load):
    """A special token written in a text is text; what is too long is cut, never [EMB]."""
    found = load("tied").tokenize(TEXTS)
    expected = ours("tied")["text_rows"]
    used = found.shape[1]
    np.testing.assert_array_equal(found, expected[:, :used])
    assert (expected[:, used:] == tokenizer().pad_token_id).all()
    assert found.dtype == torch.int64 and found[2, -1] == load("tied").config.emb_token_id
    rows = load("tied").tokenize(TEXTS[0])
    assert rows.shape == (1, len(tokenizer()(TEXTS[0])["input_ids"]) + 2)
    close(load("tied").encode_text(found), ours("tied")["texts"], 1e-5)


def encoded(mode, size):
    """A PNG of noise in one of Pillow's modes."""
    width, height = size
    random = np.random.default_rng(width)
    colours = Image.fromarray(random.integers(0, 256, (height, width, 4)).astype(np.uint8))
    options = {}
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 2**16, (height, width)).astype(np.uint16))
    elif mode == "P with transparency":
        image, options = colours.convert("RGB").convert("P"), {"transparency": 3}
    else:
        image = colours if mode == "RGBA" else colours.convert(mode)
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "P", "P with transparency", "1", "I;16"]
)
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (23, 40), (40, 19), (9, 5), (3, 64)])
def test_pixels_equal_ours(mode, size, load):
    data = encoded(mode, size)
    pixels = our_images.resize_and_crop(our_images.decode(data), 16)
    image = Image.open(io.BytesIO(data))
    found = modeling_mmgem.resize_and_crop(modeling_mmgem.to_rgb(image), 16)
    np.testing.assert_array_equal(found, pixels)
    config = setup("tied")[0].config
    expected = normalize_images(pixels[None], config.image_mean, config.image_std, "float32")
    found = load("tied").preprocess(Image.open(io.BytesIO(data))).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_lists_of_boxes_may_differ_in_length(load):
    model, images = load("untied"), pictures()[:3]
    boxes = [BOXES[0].tolist(), [], [BOXES[2, 1].tolist()]]
    found = model.encode_regions(images, boxes)
    expected = ours("untied")["regions"]
    close(found[0], expected[0], 1e-5)
    close(found[2, 0], expected[2, 1], 1e-5)
    assert (found[1] == 0).all() and (found[2, 1] == 0).all()
    captions = model.generate_caption(images, boxes)
    full = model.generate_caption(images, BOXES[:3])
    assert captions == [full[0], [], [full[2][1]]]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float64", 1e-5)]
)
def test_weights_of_other_precisions(dtype, tolerance, load):
    model, expected = load("grids", dtype=getattr(torch, dtype)), ours("grids")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    regions, texts = model.encode_regions(pictures(), BOXES), model.encode_text(TEXTS)
    assert regions.dtype == texts.dtype == torch.float32
    close(regions, expected["regions"], tolerance)
    close(texts, expected["texts"], tolerance)
    assert len(model.generate_caption(pictures(), num_beams=2)) == B
    assert model.similarity_map(pictures(), "sun").isfinite().all()


def test_autocast(load):
    model, expected = load("grids"), ours("grids")
    with torch.autocast("cpu", torch.bfloat16):
        close(model.encode_regions(pictures(), BOXES), expected["regions"], 0.1)
        close(model.encode_text(TEXTS), expected["texts"], 0.1)
        assert len(model.generate_caption(pictures(), num_beams=2)) == B


def test_nothing_stays_on_the_cpu(load, monkeypatch):
    """On a device without numbers: an array of another device in a computation is an error."""
    # This one of transformers reads numbers: does a row hold several texts?
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    model = copy.deepcopy(load("grids")).to("meta")
    assert model.encode_image(pictures()).is_meta
    assert model.encode_regions(pictures(), BOXES).shape == (B, R, 16)
    assert model.encode_text(TEXTS).is_meta
    assert model.similarity_map(pictures(), TEXTS).is_meta
    logits = model.caption_logits(pictures(), BOXES, torch.from_numpy(rows()).long())
    assert logits.is_meta


def test_towers_on_devices_of_their_own(load, monkeypatch):
    """As of device_map="auto": each module gets its inputs moved, what is between them does not."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    model = load("grids")

    def moved(*names):
        split = copy.deepcopy(model)
        for name in names:
            module = split.get_submodule(name).to("meta")
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.to("meta") for x in inputs))
        return split

    other = moved("vision_model", "region_projection")
    assert other(pictures(), TEXTS).logits_per_image.is_meta
    assert other.similarity_map(pictures(), TEXTS).is_meta
    other = moved("language_model", "language_model.model.embed_tokens", "text_projection")
    assert other.encode_text(TEXTS).is_meta
    tokens = torch.from_numpy(rows()).long()
    assert other.caption_logits(pictures(), BOXES, tokens).is_meta


def test_a_default_device_is_not_where_pixels_are_made(load):
    model = load("tied")
    with torch.device("meta"):
        assert model.preprocess(pictures()).device.type == "cpu"


@pytest.mark.parametrize(
    ("size", "whole", "square"),
    [
        ((48, 16), (1 / 3, 0, 2 / 3, 1), (0, 0, 1, 1)),  # the middle third is the square
        ((48, 16), (0, 0.25, 0.5, 0.75), (0, 0.25, 0.5, 0.75)),  # cut at its left edge
        ((48, 16), (0.5, 0, 1, 1), (0.5, 0, 1, 1)),
        ((160, 480), (0.25, 1 / 3, 0.5, 0.5), (0.25, 0, 0.5, 0.5)),
        ((160, 480), (0, 0, 1, 0.5), (0, 0, 1, 0.5)),
        ((32, 32), (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_a_box_of_the_whole_image_in_the_square(size, whole, square, load):
    ((found,),) = load("tied").crop_boxes(Image.new("RGB", size), [[whole]])
    np.testing.assert_allclose(found, square, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(480, 320), (320, 960), (320, 320)])
def test_a_cropped_box_holds_the_same_pixels(size, load):
    """A red rectangle of an image is where its box is in the square."""
    whole = np.array([0.375, 0.4, 0.75, 0.55])
    image = Image.new("RGB", size)
    image.paste("red", tuple((whole * np.tile(size, 2)).astype(int).tolist()))
    own, other = load("tied").crop_boxes([image] * 2, [[whole], [(0, 0, 1, 1), whole]])
    assert other == [[0, 0, 1, 1], *own]
    red = np.argwhere(modeling_mmgem.resize_and_crop(image, 800)[..., 0] > 127)
    edges = np.concatenate([red.min(axis=0)[::-1], red.max(axis=0)[::-1] + 1]) / 800
    np.testing.assert_allclose(own[0], edges, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[(0, 0, 0.3, 1)]], "found [0.  0.  0.3 1. ], outside the square"),
        ([[(0.2, 0, 0.8, 1), (0.7, 0, 1, 1)]], "outside the square"),
        ([[(0, 0, 48, 16)]], "expected shares 0 <= x0 < x1 <= 1"),  # pixels
        ([[(0, 0, 1, 1)], [(0, 0, 1, 1)]], "expected some, for 1 images"),
    ],
)
def test_a_box_that_is_not_in_the_square_says_so(boxes, message, load):
    with pytest.raises(ValueError, match=re.escape(message)):
        load("tied").crop_boxes([Image.new("RGB", (48, 16))], boxes)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[(0, 0, 1, 1)]], "found [1] an image; expected some, for 2 images"),
        ([[], []], "found [0 0] an image"),
        ([[(0, 0, 1)], [(0, 0, 1, 1)]], "expected for each image a list of boxes x0, y0, x1, y1"),
        ([(0, 0, 1, 1), (0, 0, 1, 1)], "expected for each image a list of boxes"),
        (7, "boxes: found 7"),
        ([], "expected for each image a list of boxes"),
        ([[(0.6, 0, 0.4, 1)], [(0, 0, 1, 1)]], "expected shares 0 <= x0 < x1 <= 1"),
        ([[(0, 0, 1, 1)], [(0, 0, 16, 16)]], "found [ 0.  0. 16. 16.]"),
        ([[(0, 0, 1, 1)], [(0, float("nan"), 1, 1)]], "expected shares 0 <= x0"),
        (torch.tensor([[[0.1, 0.5, 0.9, 0.5]]] * 2), "and 0 <= y0 < y1 <= 1"),
    ],
    ids=str,
)
def test_boxes_that_are_none_say_so(boxes, message, load):
    for method in ("encode_regions", "visual_tokens", "generate_caption"):
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(load("tied"), method)(pictures()[:2], boxes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "uint8"),
        (lambda model: model.encode_text(torch.ones(2, 3, dtype=int)), "a row without [EMB]"),
        (
            lambda model: model.similarity_map(pictures(), TEXTS[:2]),
            "expected at least 1, and 1 or",
        ),
        (lambda model: model.similarity_map(pictures(), "", window=0), "expected at least 1"),
        (lambda model: model.encode_text([]), "texts: found none, or others than strings"),
        (lambda model: model.encode_text([7]), "texts: found none, or others than strings"),
        (lambda model: model.generate_caption(pictures(), max_new_tokens=0), "max_new_tokens"),
        (lambda model: model.caption_logits(pictures(), None, torch.ones(B, 2, 3)), "[5, 1, T]"),
    ],
)
def test_bad_input_says_so(call, message, load):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(load("tied"))


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.22.0", "6.0.0", "6.1.0.dev0"])
def test_another_transformers_says_so(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    message = f"transformers: found {version}; MM-GEM expects >=5.23,<6"
    with pytest.raises(ImportError, match=re.escape(message)):
        runpy.run_path(modeling_mmgem.__file__)


@pytest.mark.parametrize("version", ["5.23.0", "5.24.0.dev0", "5.100.1"])
def test_a_transformers_that_it_knows(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    runpy.run_path(modeling_mmgem.__file__)
