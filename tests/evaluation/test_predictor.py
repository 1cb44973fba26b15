"""Batches, padding, meshes and log probabilities of the engine, on a small random model."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_dataset
from flax.linen import meta
from tiny_dataset import evaluate

from mmgem_jax import run, sharding
from mmgem_jax.data.images import decode
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.predictor import Predictor
from mmgem_jax.evaluation.tasks import Asked
from mmgem_jax.generate import Decoding
from mmgem_jax.models.mmgem import MMGem, whole_image
from mmgem_jax.objective import init_params
from mmgem_jax.train_state import zeros

DATASET = tiny_dataset.dataset()
PNGS = DATASET.images.encoded


@pytest.fixture(scope="module")
def parts(emoji_config):
    """Config, model, tokenizer and parameters whose captions differ from image to image."""
    config = emoji_config({"data.text_length": 24, "data.caption_length": 24})
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    config.eval.batch_size = 4
    model = run.build_model(config.model)
    batch = zeros(run.batch_shapes(config))
    params = meta.unbox(jax.jit(lambda key: init_params(model, batch, key))(jax.random.key(0)))
    return config, model, tokenizer, tiny.randomise(params, scale=0.3)


@pytest.fixture(scope="module")
def predictor(parts):
    """`predictor(devices, method)`, in batches of 4, each made once; and the parameters."""
    config, model, tokenizer, params = parts
    made = {}

    def make(devices=1, method="greedy"):
        if (devices, method) not in made:
            mesh = tiny.mesh_of({1: (1, 1, 1), 8: (2, 2, 2)}[devices])
            decoding = Decoding(method=method, length=4)
            made[devices, method] = Predictor(config, model, tokenizer, mesh, decoding)
        return made[devices, method]

    return make, params


def by_hand(model, params, images):
    """Embeddings and visual tokens of all images at once, with nothing round the model."""

    def both(model, images):
        feature_map, boxes = model.feature_map(images), whole_image(len(images))
        visual = model.visual_tokens(feature_map, boxes)[:, 0]
        return model.embed_regions(feature_map, boxes)[:, 0], visual

    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=both))(params, images)


def look_at_all(engine, params, dataset):
    """Of each batch the places, and embeddings and visual tokens of its whole images."""
    for places, feature_map in engine.read_images(params, dataset):
        yield places, *engine.look_at_whole(params, feature_map)


# ---- images and texts ----------------------------------------------------------------------------


def test_every_image_comes_once_and_padding_never(parts, predictor):
    make, params = predictor
    images = np.stack([np.asarray(decode(png)) for png in PNGS])
    expected = by_hand(parts[1], params, images)
    dataset = dataclasses.replace(DATASET, images=tiny_dataset.Opened(PNGS))
    engine, places = make(), []
    with sharding.use_mesh(engine.mesh):
        for at, embeddings, visual in look_at_all(engine, params, dataset):
            assert embeddings.shape[0] == visual.shape[0] == 4
            places += at.tolist()
            for found, whole in zip((embeddings, visual), expected, strict=True):
                np.testing.assert_allclose(found[: len(at)], whole[at], atol=1e-5)
    assert places == list(range(7))
    assert sorted(dataset.images.opened) == list(range(7))


def test_no_more_images_are_opened_than_are_about_to_be_needed(predictor):
    make, params = predictor
    images = tiny_dataset.Opened(PNGS[:1] * 200)
    dataset = dataclasses.replace(DATASET, images=images, image_keys=list(range(200)))
    engine = make()
    with sharding.use_mesh(engine.mesh):
        batches = engine.read_images(params, dataset)
        next(batches)
        time.sleep(0.3)  # the threads fill what they may
        assert 4 <= len(images.opened) <= 24
        assert sum(len(at) for at, *_ in batches) == 196
    assert sorted(images.opened) == list(range(200))


def test_a_broken_image_is_named(predictor):
    make, params = predictor
    dataset = dataclasses.replace(DATASET, images=[*PNGS[:5], b"no image", PNGS[6]])
    engine = make()
    with sharding.use_mesh(engine.mesh), pytest.raises(UserError) as error:
        list(engine.read_images(params, dataset))
    assert "image 5.png: " in str(error.value) and "\n" not in str(error.value)


def test_texts_are_embedded_in_their_order_and_cut_ones_are_told(parts, predictor):
    make, params = predictor
    texts = [*DATASET.texts[:5], "word " * parts[0].data.text_length]
    engine = make()
    with sharding.use_mesh(engine.mesh):
        embeddings, cut = engine.embed_texts(params, texts)
        alone = [engine.embed_texts(params, [text])[0][0] for text in texts]
    np.testing.assert_allclose(embeddings, alone, atol=1e-5)
    assert len({row.tobytes() for row in embeddings.round(3)}) == 6
    assert cut.tolist() == [False] * 5 + [True]


# ---- regions -------------------------------------------------------------------------------------

REGION_ASKED = Asked(("region_caption", "region_retrieval", "region_classification", "pointing"))


def with_regions(**changes):
    """The data set with 17 regions, of none to five on an image."""
    regions = dataclasses.replace(tiny_dataset.regions(), **changes)
    return dataclasses.replace(DATASET, regions=regions)


def test_regions_are_those_of_the_model_on_the_whole_image(parts, predictor):
    _, model, _, _ = parts
    make, params = predictor
    dataset, engine = with_regions(), make()
    with sharding.use_mesh(engine.mesh):
        found = evaluate(engine, params, dataset, REGION_ASKED)[2].regions
    size = parts[0].model.vision.image_size
    images = np.stack([dataset.pixels(i, size) for i in range(7)])
    apply = jax.jit(lambda p, x, b: model.apply({"params": p}, x, b, method=MMGem.encode_regions))
    of_image = np.split(dataset.regions.boxes, np.flatnonzero(np.diff(dataset.regions.images)) + 1)
    for boxes, image in zip(of_image, np.unique(dataset.regions.images), strict=True):
        padded = np.resize(boxes, (1, 5, 4))
        expected = apply(params, images[image : image + 1], padded)[0, : len(boxes)]
        own = dataset.regions.images == image
        np.testing.assert_allclose(found.embeddings[own], expected, atol=1e-5)
    assert np.abs(found.embeddings - found.embeddings[0]).max(axis=1)[1:].min() > 1e-3


def test_a_whole_image_is_a_region(predictor):
    make, params = predictor
    boxes = np.tile(np.float32([0, 0, 1, 1]), (7, 1))
    whole = with_regions(images=np.arange(7), boxes=boxes, texts=DATASET.texts[:7])
    engine = make()
    with sharding.use_mesh(engine.mesh):
        asked = Asked(("region_caption", "region_retrieval", "caption"))
        _, _, found = evaluate(engine, params, whole, asked)
    np.testing.assert_array_equal(found.regions.embeddings, found.image_embeddings)
    assert found.regions.captions == found.captions


def test_neither_order_nor_company_changes_a_region(predictor):
    make, params = predictor
    dataset, engine = with_regions(), make()
    order = np.random.default_rng(0).permutation(len(dataset.regions))
    regions = dataset.regions
    moved = with_regions(
        images=regions.images[order],
        boxes=regions.boxes[order],
        texts=[regions.texts[i] for i in order],
        keys=order.tolist(),
        labels=[regions.labels[i] for i in order],
    )
    with sharding.use_mesh(engine.mesh):
        metrics, _, found = evaluate(engine, params, dataset, REGION_ASKED)
        other_metrics, _, other = evaluate(engine, params, moved, REGION_ASKED)
    np.testing.assert_allclose(other.regions.embeddings, found.regions.embeddings[order], atol=1e-5)
    assert other.regions.captions == [found.regions.captions[i] for i in order]
    assert other.regions.pointed.tolist() == found.regions.pointed[order].tolist()
    assert other_metrics == pytest.approx(metrics)
    assert len(set(found.regions.captions)) > 3 and len(set(found.regions.pointed.tolist())) > 3


def test_cells_are_boxes_about_them(predictor):
    make, params = predictor
    engine = make()
    with sharding.use_mesh(engine.mesh):
        _, feature_map = next(engine.read_images(params, DATASET))
        H, W = feature_map.shape[1:3]
        cells = {window: engine.embed_cells(params, feature_map, window) for window in (0, 1, 3)}
        box = [[1 / W, 0, 1 / W + 1 / W, 1 / H]]  # of image 2, row 0, column 1
        one, _ = engine.look(params, feature_map, [2], box)
    assert cells[1].shape == (4, H, W, one.shape[1]) and cells[1].dtype == np.float32
    np.testing.assert_allclose(cells[1][2, 0, 1], one[0], atol=1e-5)
    assert engine.window == 2 and np.abs(cells[0] - cells[1]).max() > 1e-3
    assert np.abs(cells[3] - cells[1]).max() > 1e-3


@pytest.mark.parametrize("counts", [(1, 0, 0, 0, 0, 0, 0), (9, 3, 0, 0, 4, 0, 5)])
def test_no_number_of_regions_compiles_anything_again(predictor, counts):
    make, params = predictor
    engine = make()
    dataset = dataclasses.replace(DATASET, regions=tiny_dataset.regions(counts))
    with sharding.use_mesh(engine.mesh):
        _, _, found = evaluate(engine, params, dataset, REGION_ASKED)
    assert len(found.regions.captions) == len(found.regions.embeddings) == sum(counts)
    assert len(found.regions.pointed) == sum(counts)
    programs = engine.feature_map, engine.pooled, engine.cells, engine.caption_rows
    assert [program._cache_size() for program in programs] == [1] * 4


# ---- log P(text | image) -------------------------------------------------------------------------


def slow_log_probs(model, tokenizer, params, visual, texts):
    """log P of each text for each image, one pair at a time and nothing padded."""
    logits = jax.jit(
        lambda p, v, t: model.apply(
            {"params": p}, v, t, jnp.ones_like(t), method=MMGem.caption_logits
        )
    )
    scores = np.zeros((len(visual), len(texts)))
    for column, text in enumerate(texts):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        inputs = np.tile([tokenizer.bos_token_id, *ids[:-1]], (len(visual), 1)).astype(np.int32)
        log_probs = jax.nn.log_softmax(logits(params, visual, inputs), axis=-1)
        scores[:, column] = sum(np.asarray(log_probs[:, at, i]) for at, i in enumerate(ids))
    return scores


TEXTS = ["hat", "a red hat", "cup", "a grey cup", "the blue shoe stands here"]


@pytest.fixture(scope="module")
def expected_scores(parts, predictor):
    _, model, tokenizer, _ = parts
    params = predictor[1]
    images = np.stack([np.asarray(decode(png)) for png in PNGS])
    _, visual = by_hand(model, params, images)
    scores = slow_log_probs(model, tokenizer, params, visual, TEXTS)
    assert scores.std(axis=0).min() > 0.05 and scores.std(axis=1).min() > 1  # worth comparing
    return scores


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_every_candidate_of_every_image_is_scored_in_blocks(predictor, expected_scores, budget):
    make, params = predictor
    engine = make()
    candidates, cut = engine.candidates(TEXTS)
    assert not cut.any() and candidates.shape[1] < engine.scored_length
    engine.scored_candidates, before = budget, engine.scored_candidates
    assert engine.block_of(5) == min(budget, 5)
    with sharding.use_mesh(engine.mesh):
        found = [
            engine.score_all(params, visual, candidates)[: len(at)]
            for at, _, visual in look_at_all(engine, params, DATASET)
        ]
    engine.scored_candidates = before
    np.testing.assert_allclose(np.concatenate(found), expected_scores, rtol=1e-4, atol=1e-4)


def test_pairs_are_scored_wherever_they_stand(predictor, expected_scores):
    make, params = predictor
    engine = make()
    candidates, _ = engine.candidates(TEXTS)
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.choice([0, 1, 5, 6], 25), rng.integers(0, 5, 25)], axis=1)
    pairs[:9, 0] = 5  # one image is asked much more often, others never
    with sharding.use_mesh(engine.mesh):
        found = engine.score_pairs(params, DATASET, candidates, pairs)
    expected = expected_scores[pairs[:, 0], pairs[:, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---- everything together -------------------------------------------------------------------------

ASKED = Asked(
    ("zero_shot", "retrieval", "caption"), ("a photo of a {c}", "{c}"), likelihood="{c}", rerank=3
)


def test_eight_devices_give_the_numbers_of_one(predictor):
    make, params = predictor
    found = []
    for devices in (1, 8):
        engine = make(devices)
        with sharding.use_mesh(engine.mesh):
            found.append(evaluate(engine, params, DATASET, ASKED))
    (metrics, _, predictions), (expected_metrics, _, expected) = found
    assert metrics == expected_metrics
    assert predictions.captions == expected.captions and len(set(expected.captions)) > 3
    for name in ("image_embeddings", "text_embeddings", "class_log_probs"):
        x, y = getattr(predictions, name), getattr(expected, name)
        assert len(x) == {"text_embeddings": 20}.get(name, 7)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    kinds = {name.split("/")[0] for name in metrics}
    assert kinds >= {"zero_shot", "zero_shot_likelihood", "retrieval", "retrieval_reranked"}


def test_eight_devices_say_of_regions_what_one_says(predictor):
    make, params = predictor
    dataset, found = with_regions(), []
    for devices in (1, 8):
        engine = make(devices)
        with sharding.use_mesh(engine.mesh):
            found.append(evaluate(engine, params, dataset, REGION_ASKED))
    (metrics, _, one), (other_metrics, _, other) = found
    assert metrics == other_metrics
    assert one.regions.captions == other.regions.captions
    assert one.regions.pointed.tolist() == other.regions.pointed.tolist()
    np.testing.assert_allclose(one.regions.embeddings, other.regions.embeddings, atol=1e-5)


def test_each_program_is_compiled_once_for_a_whole_set(parts):
    config, model, tokenizer, params = parts
    engine = Predictor(config, model, tokenizer, tiny.mesh_of((1, 1, 1)), Decoding(length=4))
    with sharding.use_mesh(engine.mesh):
        evaluate(engine, params, DATASET, dataclasses.replace(ASKED, rerank=0))
    programs = engine.feature_map, engine.pooled, engine.encode_texts
    programs += engine.caption_rows, engine.log_probs
    assert [program._cache_size() for program in programs] == [1] * 5


def test_samples_are_drawn_from_the_seed_the_same_on_every_mesh(predictor):
    make, params = predictor

    def said(devices, method, seed=0):
        engine = make(devices, method)
        engine.seed, captions = seed, []
        with sharding.use_mesh(engine.mesh):
            for places, _, visual in look_at_all(engine, params, DATASET):
                captions += engine.captions(params, places, visual)
        return captions

    once = said(1, "sample")
    assert once == said(1, "sample") == said(8, "sample")
    assert once != said(1, "sample", seed=1) and once != said(1, "greedy")
