import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from mmgem_jax import run, sharding
from mmgem_jax.data.tokenizer import caption_row
from mmgem_jax.evaluation import suite
from mmgem_jax.evaluation.suite import Evaluator, Predictions, Split
from mmgem_jax.objective import init_params
from mmgem_jax.train_state import zeros

MESHES = {1: (1, 1, 1), 8: (2, 2, 2)}


def mesh_of(devices):
    sizes = dict(zip(sharding.MESH_AXES, MESHES[devices], strict=True))
    return sharding.make_mesh(sizes, jax.devices()[:devices])


@pytest.fixture(scope="module")
def parts(emoji_config):
    """Config, model, tokenizer and initial parameters."""
    config = emoji_config()
    tokenizer = run.load_run_tokenizer(config.data)
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


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_rows_go_through_in_batches_of_one_size_and_come_back_once(parts, count):
    evaluator = make_evaluator(parts, batch_size=4)
    shapes = []

    def double(params, x, y):
        shapes.append((x.shape, y.shape))
        return params * x + y[:, None]

    x, y = np.arange(3.0 * count).reshape(count, 3), np.arange(count)
    found = evaluator.in_batches(double, 2.0, x=x, y=y)
    np.testing.assert_array_equal(found, 2 * x + y[:, None])
    assert shapes == [((4, 3), (4,))] * -(-count // 4)


@pytest.fixture(scope="module")
def predictions(parts):
    """What one device says of a split of 6 drawings, in batches of 4."""
    evaluator = make_evaluator(parts, batch_size=4)
    with sharding.use_mesh(evaluator.mesh):
        return evaluator.predict(parts[-1], "unseen")


def test_padding_changes_nothing(parts, predictions):
    evaluator = make_evaluator(parts, batch_size=1)
    with sharding.use_mesh(evaluator.mesh):
        alone = evaluator.predict(parts[-1], "unseen")
    assert (alone.names, alone.captions) == (predictions.names, predictions.captions)
    for name in ("image_embeddings", "text_embeddings"):
        x, y = getattr(alone, name), getattr(predictions, name)
        assert x.shape == y.shape == (6, 32)
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_eight_devices_say_what_one_says(parts, predictions):
    evaluator = make_evaluator(parts, devices=8, batch_size=16)
    with sharding.use_mesh(evaluator.mesh):
        together = evaluator.predict(parts[-1], "unseen")
        scores = evaluator.score(parts[-1], "unseen", together)
    assert (together.names, together.captions) == (predictions.names, predictions.captions)
    for name in ("image_embeddings", "text_embeddings"):
        np.testing.assert_allclose(getattr(together, name), getattr(predictions, name), atol=1e-5)
    one = make_evaluator(parts, batch_size=16)
    with sharding.use_mesh(one.mesh):
        assert one.evaluate(parts[-1], "unseen") == pytest.approx(scores)


# ---- what is scored ------------------------------------------------------------------------------

TEXTS = ["dog", "ant", "dog", "cat", "ant"]
CLASSES = ["pet", "bug", "pet", "pet", "bug"]


@pytest.fixture
def evaluator(parts):
    """An evaluator with a split of our own, `made`, whose texts have the embeddings we say."""
    evaluator = make_evaluator(parts, batch_size=4)
    images = np.zeros((5, 32, 32, 3), np.uint8)
    evaluator.splits["made"] = Split(images, TEXTS, CLASSES)
    known = {"ant": 0, "cat": 1, "dog": 2, "bug": 0, "pet": 2}
    evaluator.embed_texts = lambda params, texts: np.eye(3, dtype=np.float32)[
        [known[text] for text in texts]
    ]
    return evaluator


def test_the_gallery_is_the_distinct_texts_and_captions_are_decoded(parts, evaluator):
    tokenizer, params = parts[2], parts[3]
    rows = np.stack([caption_row(tokenizer, text, 10)[0] for text in TEXTS])
    outputs = iter([rows[:4], rows[[4, 4, 4, 4]]])
    evaluator.caption = lambda params, image: next(outputs)
    evaluator.encode_images = lambda params, image: jnp.zeros((len(image), 3))
    found = evaluator.predict(params, "made")
    assert found.names == ["ant", "cat", "dog"]
    np.testing.assert_array_equal(found.text_embeddings, np.eye(3))
    assert found.captions == TEXTS
    assert found.image_embeddings.shape == (5, 3)


def say(image_to, captions):
    """Predictions whose images lie at the given names."""
    at = {"ant": 0, "cat": 1, "dog": 2}
    images = np.eye(3, dtype=np.float32)[[at[name] for name in image_to]]
    return Predictions(images, np.eye(3, dtype=np.float32), ["ant", "cat", "dog"], captions)


def test_all_right_is_one(evaluator):
    scores = evaluator.score(None, "made", say(TEXTS, TEXTS))
    ones = ["retrieval/image_to_text_r1", "retrieval/text_to_image_r1", "caption/exact_match"]
    assert [scores[name] for name in [*ones, "caption/token_f1"]] == [1, 1, 1, 1]
    # The class of a cat is `pet`, which lies where `dog` does: a cat is as near to both classes,
    # and the first of them is taken.
    assert scores["zero_shot/acc1"] == pytest.approx(4 / 5)


def test_each_score_by_hand(evaluator):
    drawn = ["dog", "ant", "ant", "cat", "ant"]
    captions = ["dog", "ant", "ant", "Cat ", ""]
    scores = evaluator.score(None, "made", say(drawn, captions))
    assert scores["retrieval/image_to_text_r1"] == pytest.approx(4 / 5)
    assert scores["retrieval/text_to_image_r1"] == 1  # each name's first image is of its own
    assert scores["zero_shot/acc1"] == pytest.approx(3 / 5)
    assert scores["zero_shot/mean_per_class_recall"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["caption/exact_match"] == pytest.approx(3 / 5)
    assert {name.split("/")[0] for name in scores} == {"retrieval", "zero_shot", "caption"}


def test_without_classes_there_is_no_classification(parts):
    evaluator = make_evaluator(parts, class_field="")
    split = evaluator.split("unseen")
    assert split.classes == []
    evaluator.splits["made"] = Split(np.zeros((5, 32, 32, 3), np.uint8), TEXTS, [])
    scores = evaluator.score(None, "made", say(TEXTS, TEXTS))
    assert {name.split("/")[0] for name in scores} == {"retrieval", "caption"}


def test_a_split_is_its_drawings_names_and_classes(parts):
    split = make_evaluator(parts, class_field="vendor").split("test")
    assert split.images.shape == (34, 32, 32, 3)
    assert len(set(split.texts)) == 34 and "frog" in split.texts
    assert split.classes == ["fluent-emoji-flat"] * 34


def test_floors_are_chance_and_the_pixels_of_names_seen_in_training(parts):
    evaluator = make_evaluator(parts)
    seen, unseen = evaluator.floors("validation"), evaluator.floors("unseen")
    assert seen.keys() == {"chance", "pixels"} and unseen.keys() == {"chance"}
    assert seen["chance"]["retrieval/text_to_image_r1"] == pytest.approx(1 / 34)
    assert unseen["chance"]["retrieval/text_to_image_r1"] == pytest.approx(1 / 6)
    classes = len(set(evaluator.split("unseen").classes))
    assert unseen["chance"]["zero_shot/acc1"] == pytest.approx(1 / classes)
    assert seen["pixels"]["retrieval/image_to_text_r1"] > 0.5  # by other hands, yet much the same
    assert evaluator.floors("train")["pixels"]["retrieval/image_to_text_r1"] == 1
    assert make_evaluator(parts, pixel_floor=False).floors("test").keys() == {"chance"}


# ---- what is shown -------------------------------------------------------------------------------


def test_samples_are_evenly_spaced_in_the_order_of_names():
    texts = [f"name {9 - i}" for i in range(9)]
    images = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    names = sorted(texts)
    at = np.asarray([names.index(text) for text in texts])
    vectors = np.eye(9, dtype=np.float32)
    found = Predictions(vectors[at], vectors, names, [text.upper() for text in texts])
    rows = suite.samples(Split(images, texts, []), found, 3)
    assert [row.name for row in rows] == ["name 1", "name 5", "name 9"]
    assert [row.caption for row in rows] == ["NAME 1", "NAME 5", "NAME 9"]
    assert [int(row.image[0, 0, 0]) for row in rows] == [8, 4, 0]
    assert [row.neighbours[0] for row in rows] == [(row.name, 1.0) for row in rows]
    assert len(suite.samples(Split(images, texts, []), found, 100)) == 9


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
