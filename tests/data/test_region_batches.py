"""Regions in batches: what a region's row holds, what is left out, and mixtures of sources."""

import io
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mmgem_jax import run
from mmgem_jax.data import images
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.sources import sources
from mmgem_jax.data.tfds_records import open_split
from mmgem_jax.data.training_example import TrainingExample
from mmgem_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(regions_config):
    return run.load_run_tokenizer(regions_config({"init_from": ""}))


def regions_alone(config, **changes):
    """The config with its scenes' regions as the only source, not augmented."""
    with config.data.unlocked():
        config.data.mixture = ConfigDict()
    config.data.augment = dict.fromkeys(config.data.augment, 0.0)
    config.data.augment.update(min_area=1.0, max_ratio=1.0, min_scale=1.0, max_scale=1.0)
    config.data.update(whole_image=False, text_length=16, caption_length=14, **changes)
    return config


def take(config, tokenizer, count):
    batches = training_batches(config, tokenizer)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_a_region_s_row_is_its_box_and_its_text(regions_config, tokenizer):
    config = regions_alone(regions_config())
    records = list(open_split(config.data, "train"))
    batch = take(config, tokenizer, 1)[0]
    known = {}
    for record in records:
        pixels = images.squash(images.decode(record["image"]), 48)
        boxes = [tuple(np.round([b[1], b[0], b[3], b[2]], 3)) for b in record["regions"]["bbox"]]
        texts = [text.decode() for text in record["regions"]["text"]]
        known[pixels.tobytes()] = dict(zip(boxes, texts, strict=True))
    for row in range(config.batch_size):
        # The affine resampling of an image that is not augmented changes no pixel.
        own = known[batch["image"][row].tobytes()]
        mask = batch["region_mask"][row]
        assert mask.sum() == len(own)
        found = {}
        for place in np.flatnonzero(mask):
            box = tuple(np.round(batch["boxes"][row, place], 3))
            for name in ("text_tokens", "caption_tokens"):
                words = tokenizer.decode(batch[name][row, place], skip_special_tokens=True)
                assert words == own[box]
            found[box] = words
        assert found == own
        assert not batch["boxes"][row, ~mask].any()
        assert batch["region_counts"][row].tolist() == [len(own), 0, 0, 0]


def test_each_batch_is_of_one_source_and_of_its_own_shape(regions_config, tokenizer):
    config = regions_config()
    shapes = {}
    for batch in take(config, tokenizer, 8):
        assert len(set(batch["source"].tolist())) == 1
        found = {key: (value.shape, value.dtype) for key, value in batch.items()}
        assert shapes.setdefault(int(batch["source"][0]), found) == found
    first = {key: (s.shape, s.dtype) for key, s in run.batch_shapes(config).items()}
    assert shapes[0] == first
    of_rows = {place: shape["text_tokens"][0] for place, shape in shapes.items()}
    assert of_rows == {0: (16, 1, 12), 1: (16, 6, 12), 2: (16, 1, 272)}  # in the order of names


def test_sources_come_by_their_weights(regions_config, tokenizer):
    weights = {"regions": 3.0, "scenes": 1.0, "drawings": 2.0}
    config = regions_config({f"data.mixture.{name}.weight": w for name, w in weights.items()})
    counts = Counter(int(b["source"][0]) for b in take(config, tokenizer, 24))
    assert counts == {0: 8, 1: 12, 2: 4}  # in the order of names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_goes_on_where_it_stopped(regions_config, tokenizer, workers):
    sequence = take(regions_config(), tokenizer, 9)
    config = regions_config({"data.workers": workers})
    batches = training_batches(config, tokenizer)
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    batches.close()
    resumed = training_batches(config, tokenizer)
    resumed.set_state(state)
    for expected in sequence[4:]:
        found = next(resumed)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    resumed.close()


def test_two_processes_share_the_batches_of_a_mixture(regions_config, tokenizer):
    config = regions_config()
    whole = take(config, tokenizer, 6)
    shares = [training_batches(config, tokenizer, i, 2) for i in range(2)]
    for expected in whole:
        parts = [next(share) for share in shares]
        for name, value in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    for share in shares:
        share.close()


# ---- what is left out ----------------------------------------------------------------------------


def record(boxes, texts):
    """A record of a white image, its boxes as x0, y0, x1, y1."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "white").save(buffer, "PNG")
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
    regions = {"bbox": boxes, "text": [text.encode() for text in texts]}
    return {"image": buffer.getvalue(), "regions": regions, "sentence": b"a scene"}


def example(config, tokenizer, of_record, seed=0):
    """The rows of a record."""
    made = TrainingExample([of_record], 48, config.data, tokenizer)
    return made.example(of_record, np.random.default_rng(seed))


def boxes_in_a_row(count):
    left = np.arange(count) / count
    return np.stack([left, left * 0, left + 1 / count, left * 0 + 1], axis=1)


def test_of_more_regions_than_the_limit_some_are_drawn_and_the_rest_counted(
    regions_config, tokenizer
):
    config = regions_alone(regions_config(), max_regions=3)
    boxes, texts = boxes_in_a_row(7), [f"thing {i}" for i in range(7)]
    seen = set()
    for seed in range(40):
        row = example(config, tokenizer, record(boxes, texts), seed)
        assert row["region_mask"].tolist() == [True] * 3
        assert row["region_counts"].tolist() == [3, 4, 0, 0]
        words = [tokenizer.decode(t, skip_special_tokens=True) for t in row["text_tokens"]]
        assert len(set(words)) == 3
        for word, box in zip(words, row["boxes"], strict=True):
            np.testing.assert_allclose(box, boxes[int(word[-1])], atol=1e-5)
        seen |= set(words)
    assert len(seen) == 7


def test_regions_that_cannot_be_used_are_counted(regions_config, tokenizer):
    config = regions_alone(regions_config(), max_regions=8)
    good = [0.1, 0.2, 0.5, 0.9]
    bad = [[0.5, 0.2, 0.1, 0.9], [0.1, 0.2, 0.1, 0.9], [-0.1, 0.2, 0.5, 0.9], [0.1, 0.2, 0.5, 1.1]]
    boxes, texts = [good, *bad, good, good], ["one", "b", "c", "d", "e", "", "  "]
    row = example(config, tokenizer, record(boxes, texts))
    assert row["region_counts"].tolist() == [1, 0, 0, 6]
    assert row["region_mask"].tolist() == [True] + [False] * 7
    np.testing.assert_allclose(row["boxes"][0], good, atol=1e-6)
    none = example(config, tokenizer, record([], []))
    assert not none["region_mask"].any() and not none["region_counts"].any()


def test_regions_out_of_the_view_are_counted(regions_config, tokenizer):
    config = regions_alone(regions_config(), max_regions=8, min_visible=0.6)
    config.data.augment.update(min_scale=0.5, max_scale=0.5)  # the middle half of each side
    boxes = [[0.3, 0.3, 0.7, 0.7], [0.0, 0.0, 0.2, 0.2], [0.1, 0.3, 0.4, 0.7], [0.2, 0.3, 0.4, 0.7]]
    row = example(config, tokenizer, record(boxes, ["middle", "corner", "half", "most"]))
    assert row["region_counts"].tolist() == [
        2,
        0,
        2,
        0,
    ]
    found = {
        tokenizer.decode(words, skip_special_tokens=True): box
        for words, box in zip(row["text_tokens"][:2], row["boxes"][:2], strict=True)
    }
    np.testing.assert_allclose(found["middle"], [0.1, 0.1, 0.9, 0.9], atol=1e-5)
    np.testing.assert_allclose(found["most"], [0.0, 0.1, 0.3, 0.9], atol=1e-5)


def test_the_whole_image_and_its_regions_share_a_row(regions_config, tokenizer):
    config = regions_alone(regions_config(), max_regions=2)
    config.data.update(whole_image=True, text_templates=("{sentence}",), text_weights=(1.0,))
    config.data.caption_template = "{sentence}"
    row = example(config, tokenizer, record(boxes_in_a_row(2), ["left", "right"]))
    words = [tokenizer.decode(t, skip_special_tokens=True) for t in row["text_tokens"]]
    assert words[0] == "a scene" and sorted(words[1:]) == ["left", "right"]
    assert row["boxes"][0].tolist() == [0, 0, 1, 1] and row["region_mask"].all()


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ({"data.mixture.regions.weight": 0.0}, r"data\.mixture\.regions\.weight: 0; expected a"),
    ({"data.mixture.regions.weight": float("nan")}, r"data\.mixture\.regions\.weight: nan; expec"),
    ({"data.mixture.regions.text_length": 2}, r"data\.mixture\.regions\.text_length: 2; expected"),
    ({"data.mixture.drawings.name": "emoji/no"}, r"data\.mixture\.drawings\.name: no data set"),
    ({"data.max_regions": 0}, r"data\.mixture\.drawings\.max_regions: 0; expected at least 1"),
    ({"data.min_visible": 50.0}, r"min_visible: 50; expected above 0, at most 1"),
    ({"data.min_visible": 0.0}, r"min_visible: 0; expected above 0, at most 1"),
    ({"data.mixture.drawings.split": "no"}, r"data\.mixture\.drawings\.split: emoji/fix.* 'no'"),
    (
        {"data.mixture.scenes.text_templates": ("{nothing}", "{sentence}")},
        r"data\.mixture\.scenes\.text_templates: '{nothing}': has no field",
    ),
    (
        {"data.mixture.scenes.text_weights": (1.0,)},
        r"data\.mixture\.scenes\.text_weights: found \(1\.0,\) for 2 templates",
    ),
    ({"data.regions_field": "boxes"}, r"regions\.regions_field: no field 'boxes'; there are"),
    ({"data.regions_field": "sentence"}, r"regions\.regions_field: 'sentence' is no list"),
    ({"data.regions_field": ""}, r"regions\.whole_image: False, and .*expected one of the two"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_names_its_field(regions_config, tokenizer, changes, message):
    with pytest.raises(UserError, match=message) as error:
        training_batches(regions_config(changes), tokenizer)
    assert "\n" not in str(error.value)


def test_a_field_that_there_is_not_is_named(regions_config, tokenizer):
    config = regions_config()
    with config.data.mixture.unlocked():
        config.data.mixture.drawings.colour = 1
    with pytest.raises(UserError, match=r"data\.mixture\.drawings: .*colour"):
        sources(config.data)
    with config.data.mixture.unlocked():
        del config.data.mixture.drawings.colour
        config.data.mixture.drawings.workers = 3
    with pytest.raises(UserError, match=r"drawings\.workers: is for all sources; expected data\.w"):
        sources(config.data)
