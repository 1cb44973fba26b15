import dataclasses

import jax
import numpy as np
import pytest
import tiny
import tiny_dataset
from flax.linen import meta

from mmgem_jax import run, sharding
from mmgem_jax.evaluation import suite
from mmgem_jax.evaluation.examples import Dataset
from mmgem_jax.evaluation.suite import Evaluator
from mmgem_jax.evaluation.tasks import Predictions
from mmgem_jax.objective import init_params
from mmgem_jax.train_state import zeros

MESHES = {1: (1, 1, 1), 8: (2, 2, 2)}


def mesh_of(devices):
    return tiny.mesh_of(MESHES[devices])


@pytest.fixture(scope="module")
def parts(emoji_config):
    """Config, model, tokenizer and initial parameters."""
    config = emoji_config()
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    model = run.build_model(config.model)
    batch = zeros(run.batch_shapes(config))
    params = meta.unbox(jax.jit(lambda key: init_params(model, batch, key))(jax.random.key(0)))
    return config, model, tokenizer, params


def make_evaluator(parts, devices=1, **options):
    config, model, tokenizer, _ = parts
    config = config.copy_and_resolve_references()
    config.eval.update(options)
    return Evaluator(config, model, tokenizer, mesh_of(devices))


# ---- on any mesh, in batches of any size -------------------------------------------------------


@pytest.fixture(scope="module")
def predictions(parts):
    """What one device says of a split of 6 drawings, in batches of 4."""
    evaluator = make_evaluator(parts, batch_size=4)
    with sharding.use_mesh(evaluator.mesh):
        return evaluator.predict(parts[-1], "unseen")


def assert_same(found, expected):
    assert (found.texts, found.captions) == (expected.texts, expected.captions)
    for name in ("image_embeddings", "text_embeddings"):
        x, y = getattr(found, name), getattr(expected, name)
        assert x.shape == y.shape == (len(x), 32)
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_padding_changes_nothing(parts, predictions):
    evaluator = make_evaluator(parts, batch_size=1)
    with sharding.use_mesh(evaluator.mesh):
        assert_same(evaluator.predict(parts[-1], "unseen"), predictions)
    assert len(predictions.image_embeddings) == len(predictions.captions) == 6


def test_eight_devices_say_what_one_says(parts, predictions):
    evaluator = make_evaluator(parts, devices=8, batch_size=16)
    with sharding.use_mesh(evaluator.mesh):
        together = evaluator.predict(parts[-1], "unseen")
        scores = evaluator.score("unseen", together)
    assert_same(together, predictions)
    one = make_evaluator(parts, batch_size=16)
    with sharding.use_mesh(one.mesh):
        assert one.evaluate(parts[-1], "unseen") == pytest.approx(scores)


# ---- what is scored ------------------------------------------------------------------------------

NAMES = ["dog", "ant", "dog", "cat", "ant"]
DATASET = Dataset(
    name="made",
    protocol="made",
    images=[b""] * 5,
    image_keys=list(range(5)),
    image_ids=NAMES,
    texts=["ant", "cat", "dog"],
    text_ids=["ant", "cat", "dog"],
    labels=[1, 0, 1, 1, 0],
    class_names=["bug", "pet"],
    annotation_hash="",
    missing=[],
    long_text=False,
)


@pytest.fixture
def evaluator(parts):
    """An evaluator with a split of our own, `made`."""
    evaluator = make_evaluator(parts, batch_size=4)
    evaluator.datasets["made"] = DATASET
    return evaluator


def say(image_to, captions):
    """Predictions whose images lie at the given names; a bug lies at `ant`, a pet at `dog`."""
    at = {"ant": 0, "cat": 1, "dog": 2}
    images = np.eye(3, dtype=np.float32)[[at[name] for name in image_to]]
    texts = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 2]]
    names = ["ant", "cat", "dog", "bug", "pet"]
    return Predictions(images, names, texts, captions, np.zeros((0, 0)), {})


def test_all_right_is_one(evaluator):
    scores = evaluator.score("made", say(NAMES, NAMES))
    ones = ["retrieval/image_to_text_r1", "retrieval/text_to_image_r1", "caption/exact_match"]
    assert [scores[name] for name in [*ones, "caption/token_f1"]] == [1, 1, 1, 1]
    # The class of a cat is `pet`, which lies where `dog` does: a cat is as near to both classes,
    # and the first of them is taken.
    assert scores["zero_shot/acc1"] == pytest.approx(4 / 5)


def test_each_score_by_hand(evaluator):
    drawn = ["dog", "ant", "ant", "cat", "ant"]
    captions = ["dog", "ant", "ant", "Cat ", ""]
    scores = evaluator.score("made", say(drawn, captions))
    assert scores["retrieval/image_to_text_r1"] == pytest.approx(4 / 5)
    assert scores["retrieval/text_to_image_r1"] == 1  # each name's first image is of its own
    assert scores["zero_shot/acc1"] == pytest.approx(3 / 5)
    assert scores["zero_shot/mean_per_class_recall"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["caption/exact_match"] == pytest.approx(3 / 5)
    assert {name.split("/")[0] for name in scores} == {"retrieval", "zero_shot", "caption"}


def test_without_classes_there_is_no_classification(parts):
    evaluator = make_evaluator(parts, class_field="")
    assert evaluator.dataset("unseen").class_names == evaluator.dataset("unseen").labels == []
    evaluator.datasets["made"] = dataclasses.replace(DATASET, labels=[], class_names=[])
    scores = evaluator.score("made", say(NAMES, NAMES))
    assert {name.split("/")[0] for name in scores} == {"retrieval", "caption"}


def test_a_split_is_its_drawings_names_and_classes(parts):
    evaluator = make_evaluator(parts, class_field="vendor")
    test = evaluator.dataset("test")
    assert len(test.images) == len(test.image_ids) == 34
    assert evaluator.pixels(test)[33].shape == (32, 32, 3)
    assert "frog" in test.texts and test.texts == test.text_ids == sorted(test.image_ids)
    assert (test.labels, test.class_names) == ([0] * 34, ["fluent-emoji-flat"])


def test_the_annotations_hash_is_of_names_and_classes(parts):
    hashes = [
        make_evaluator(parts, class_field=field).dataset(split).annotation_hash
        for field, split in (("subgroup", "test"), ("subgroup", "test"), ("vendor", "test"))
    ]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 64


def test_floors_are_chance_and_the_pixels_of_names_seen_in_training(parts):
    evaluator = make_evaluator(parts)
    seen, unseen = evaluator.floors("validation"), evaluator.floors("unseen")
    assert seen.keys() == {"chance", "pixels"} and unseen.keys() == {"chance"}
    assert seen["chance"]["retrieval/text_to_image_r1"] == pytest.approx(1 / 34)
    assert unseen["chance"]["retrieval/text_to_image_r1"] == pytest.approx(1 / 6)
    classes = len(evaluator.dataset("unseen").class_names)
    assert unseen["chance"]["zero_shot/acc1"] == pytest.approx(1 / classes)
    assert seen["pixels"]["retrieval/image_to_text_r1"] > 0.5  # by other hands, yet much the same
    assert evaluator.floors("train")["pixels"]["retrieval/image_to_text_r1"] == 1
    assert make_evaluator(parts, pixel_floor=False).floors("test").keys() == {"chance"}


def test_regions_are_scored_beside_the_images(parts):
    evaluator = make_evaluator(parts, batch_size=4, pixel_floor=True)
    regions = tiny_dataset.regions()
    dataset = tiny_dataset.dataset(captions=1, regions=regions, labels=[], class_names=[])
    evaluator.datasets["made"] = dataset
    with sharding.use_mesh(evaluator.mesh):
        predictions = evaluator.predict(parts[-1], "made")
    assert len(predictions.regions.captions) == len(predictions.regions.embeddings) == 17
    predictions.captions, predictions.regions.captions[:] = dataset.texts, regions.texts
    scores = evaluator.score("made", predictions)
    kinds = {name.split("/")[0] for name in scores}
    assert kinds == {"retrieval", "caption", "region_retrieval", "region_caption"}
    assert scores["caption/exact_match"] == scores["region_caption/exact_match"] == 1
    floors = evaluator.floors("made")
    assert floors.keys() == {"chance"}  # no drawing of the training is one of these scenes
    names = {name for name in scores if name.startswith("region_retrieval")}
    within = {"region_retrieval/within_image_chance", "region_retrieval/within_image_median_rank"}
    assert {name for name in floors["chance"] if "region" in name} == names - within
    chance = floors["chance"]["region_retrieval/within_image_r1"]
    assert chance == scores["region_retrieval/within_image_chance"] < 1


def test_a_run_on_regions_opens_its_splits_with_them(parts, monkeypatch):
    opened, made = [], tiny_dataset.dataset(captions=1, regions=tiny_dataset.regions())
    monkeypatch.setattr(suite, "open_regions", lambda *asked: opened.append(asked) or made)
    config = parts[0].copy_and_resolve_references()
    with config.unlocked():
        config.data.regions_field = "regions"
    evaluator = Evaluator(config, *parts[1:3], mesh_of(1))
    data, splits = config.data, [*config.eval.splits, *config.eval.final_splits]
    assert opened == [(data.name, data, split, "name") for split in dict.fromkeys(splits)]
    assert evaluator.dataset(splits[0]) is made


def test_of_regions_alone_nothing_is_asked_of_whole_images(parts):
    evaluator = make_evaluator(parts, batch_size=4)
    nothing = {"texts": [], "text_ids": [], "labels": [], "class_names": []}
    regions = tiny_dataset.regions()
    evaluator.datasets["made"] = tiny_dataset.dataset(regions=regions, **nothing)
    with sharding.use_mesh(evaluator.mesh):
        scores = evaluator.evaluate(parts[-1], "made")
    assert {name.split("/")[0] for name in scores} == {"region_retrieval", "region_caption"}
    assert "retrieval/text_to_image_r1" not in evaluator.floors("made")["chance"]


# ---- what is shown -------------------------------------------------------------------------------


def test_samples_are_evenly_spaced_in_the_order_of_names():
    names = [f"name {9 - i}" for i in range(9)]
    images = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    texts = sorted(names)
    ids = {"image_keys": names, "image_ids": names, "texts": texts, "text_ids": texts}
    dataset = dataclasses.replace(DATASET, **ids)
    at = np.asarray([texts.index(name) for name in names])
    vectors = np.eye(9, dtype=np.float32)
    captions = [name.upper() for name in names]
    found = Predictions(vectors[at], texts, vectors, captions, np.zeros((0, 0)), {})
    rows = suite.samples(dataset, images, found, 3)
    assert [row.name for row in rows] == ["name 1", "name 5", "name 9"]
    assert [row.caption for row in rows] == ["NAME 1", "NAME 5", "NAME 9"]
    assert [int(row.image[0, 0, 0]) for row in rows] == [8, 4, 0]
    assert [row.neighbours[0] for row in rows] == [(row.name, 1.0) for row in rows]
    assert len(suite.samples(dataset, images, found, 100)) == 9


def test_the_table_shows_each_split_beside_its_floors():
    model = {
        "retrieval/image_to_text_r1": 0.1234,
        "zero_shot/acc1": 0.5,
        "caption/exact_match": 0.0,
    }
    splits = {
        "test": {"metrics": model, "floors": {"pixels": {"retrieval/image_to_text_r1": 0.0625}}},
        "unseen": {"metrics": {"caption/token_f1": 1.0}, "floors": {}},
    }
    header, *lines = suite.results_table({"splits": splits}).splitlines()
    assert [line.split() for line in lines] == [
        ["test", "model", "0.123", "0.500", "0.000"],
        ["pixels", "0.062"],
        ["unseen", "model", "1.000"],
    ]
    assert lines[0].index("0.123") == header.index("i>t R@1") + 2
    assert lines[2].rindex("1.000") + 5 == len(header)
    assert "R@10" not in header and "own im." not in header  # what no row has


def test_the_table_has_columns_for_regions_where_there_are_any():
    metrics = {"retrieval/image_to_text_r1": 0.5, "region_retrieval/text_to_region_r1": 0.25}
    splits = {"test": {"metrics": metrics, "floors": {"chance": {}}}}
    header, row, _ = suite.results_table({"splits": splits}).splitlines()
    assert header.split() == ["split", "i>t", "R@1", "t>r", "R@1"]
    assert row.split() == ["test", "model", "0.500", "0.250"]
