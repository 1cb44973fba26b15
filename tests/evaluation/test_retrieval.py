"""Recall and ranks against brute force in plain Python, and chance against enumeration."""

import itertools
import statistics
import tracemalloc

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import retrieval
from mmgem_jax.evaluation.retrieval import chance_metrics, retrieval_metrics

KS = (1, 2, 5, 10)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_case(seed, images=13, captions=3, width=8):
    """Images with several captions each, the captions in mixed order."""
    rng = np.random.default_rng(seed)
    text_image = rng.permutation(np.repeat(np.arange(images), captions))
    image_embeddings = unit(rng.normal(size=(images, width)))
    noisy = image_embeddings[text_image] + 0.8 * rng.normal(size=(len(text_image), width))
    return image_embeddings, unit(noisy), text_image


def tied_case(seed):
    """Vectors out of four signs: similarities are exact and most of them tie."""
    rng = np.random.default_rng(seed)
    images = rng.choice([-0.5, 0.5], size=(11, 4)).astype(np.float32)
    texts = rng.choice([-0.5, 0.5], size=(30, 4)).astype(np.float32)
    return images, texts, np.concatenate([np.arange(11), rng.integers(0, 11, size=19)])


def brute_force(images, texts, image_ids, text_image, ks):
    """The definition, word by word: sort the gallery, look for anything relevant in the top k."""
    expected = {}
    for direction, queries, gallery, query_ids, gallery_ids in (
        ("image_to_text", images, texts, image_ids, text_image),
        ("text_to_image", texts, images, text_image, image_ids),
    ):
        ranks = []
        for query, query_id in zip(queries.tolist(), query_ids, strict=True):
            scores = [
                sum(a * b for a, b in zip(query, row, strict=True)) for row in gallery.tolist()
            ]
            order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
            found = [rank for rank, place in enumerate(order, 1) if gallery_ids[place] == query_id]
            ranks.append(found[0])
        for k in ks:
            if k <= len(gallery):
                expected[f"{direction}_r{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        expected[f"{direction}_median_rank"] = statistics.median(ranks)
    return expected


@pytest.mark.parametrize("make", [random_case, tied_case])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_brute_force(make, seed):
    images, texts, text_image = make(seed)
    metrics = retrieval_metrics(images, texts, text_image, KS)
    expected = brute_force(images, texts, range(len(images)), text_image, KS)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert list(metrics) == list(expected)
    assert 0 < metrics["text_to_image_r2"] < 1  # the case can tell right from wrong


def test_many_images_may_share_one_text():
    rng = np.random.default_rng(0)
    names = np.array(["cat", "dog", "fox", "hen", "owl", "pig"])
    image_names = names[rng.permutation(np.arange(20) % len(names))]
    images, texts = unit(rng.normal(size=(20, 5))), unit(rng.normal(size=(6, 5)))
    metrics = retrieval_metrics(images, texts, names, KS, image_ids=image_names)
    assert metrics == pytest.approx(brute_force(images, texts, image_names, names, KS), abs=1e-12)
    assert "image_to_text_r10" not in metrics  # six names
    assert "text_to_image_r10" in metrics  # twenty images


@pytest.mark.parametrize("make", [random_case, tied_case])
def test_the_block_size_changes_nothing(make, monkeypatch):
    images, texts, text_image = make(7)
    whole = retrieval_metrics(images, texts, text_image, KS, block_size=1000)
    for block_size in (1, 3, 30):
        for gallery_block in (1, 4, 1000):
            monkeypatch.setattr(retrieval, "GALLERY_BLOCK", gallery_block)
            assert retrieval_metrics(images, texts, text_image, KS, block_size=block_size) == whole


def test_no_more_than_a_block_of_scores_is_held_in_either_direction(monkeypatch):
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", 200)
    rng = np.random.default_rng(0)
    images, texts = unit(rng.normal(size=(1000, 4))), unit(rng.normal(size=(2000, 4)))
    tracemalloc.start()
    retrieval_metrics(images, texts, np.arange(2000) % 1000, block_size=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 2000 / 2  # bytes: not even half a one for every pair


def test_equal_embeddings_tie_wherever_they_stand():
    # With one embedding for all texts, text i has the rank i + 1 for every image. A float32
    # product gives some of them other last bits than the rest.
    rng = np.random.default_rng(1)
    images = unit(rng.normal(size=(101, 256)))
    texts = np.tile(unit(rng.normal(size=(1, 256))), (101, 1))
    for block_size in (1, 3, 101):
        metrics = retrieval_metrics(
            images, texts, np.arange(101), range(1, 102), block_size=block_size
        )
        for k in range(1, 102):
            assert metrics[f"image_to_text_r{k}"] == pytest.approx(k / 101)


def test_the_order_of_both_galleries_is_of_no_account():
    images, texts, text_image = random_case(3)
    rng = np.random.default_rng(4)
    image_order, text_order = rng.permutation(len(images)), rng.permutation(len(texts))
    moved_to = np.argsort(image_order)
    shuffled = retrieval_metrics(
        images[image_order], texts[text_order], moved_to[text_image[text_order]], KS
    )
    assert shuffled == pytest.approx(retrieval_metrics(images, texts, text_image, KS))


def test_a_query_with_nothing_to_find_is_an_error_or_a_distractor():
    images, texts, text_image = random_case(5)
    more = np.concatenate([images[::-1], images])
    ids = np.concatenate([100 + np.arange(len(images)), np.arange(len(images))])
    with pytest.raises(UserError, match="image 0 has no text"):
        retrieval_metrics(more, texts, text_image, image_ids=ids)
    metrics = retrieval_metrics(more, texts, text_image, KS, image_ids=ids, distractors=True)
    alone = retrieval_metrics(images, texts, text_image, KS)
    assert metrics["image_to_text_r1"] == alone["image_to_text_r1"]
    # The distractors are copies with lower indices: they win every tie, so no text ranks first.
    assert alone["text_to_image_r1"] > 0
    assert metrics["text_to_image_r1"] == 0


def test_what_cannot_be_scored_is_an_error():
    images, texts, text_image = random_case(6)
    broken = texts.copy()
    broken[4, 0] = np.nan
    with pytest.raises(UserError, match="text_embeddings: row 4 has the length nan"):
        retrieval_metrics(images, broken, text_image)
    with pytest.raises(UserError, match="image_embeddings: row 0 has the length 2, expected 1"):
        retrieval_metrics(2 * images, texts, text_image)
    with pytest.raises(UserError, match="text_image: found 38 values, expected 39"):
        retrieval_metrics(images, texts, text_image[:-1])
    with pytest.raises(UserError, match="text 2 has no image"):
        retrieval_metrics(images, texts, np.where(np.arange(39) == 2, 13, text_image))
    with pytest.raises(UserError, match="expected the same width"):
        retrieval_metrics(images, unit(texts[:, :-1]), text_image)
    with pytest.raises(UserError, match=r"found the shape \(0, 8\)"):
        retrieval_metrics(images[:0], texts, text_image)


@pytest.mark.parametrize(
    ("image_ids", "text_image"),
    [
        ([0, 1, 2], [0, 0, 1, 2, 2, 2]),  # captions
        (["a", "b", "a", "c", "a", "b"], ["a", "b", "c"]),  # shared names
        ([0, 0, 1, 1], [0, 0, 1, 1, 1]),  # both
        ([0, 1, 2, 3], [0, 1, 2, 3]),  # pairs
    ],
)
def test_chance_is_the_mean_over_every_ranking(image_ids, text_image):
    ks = (1, 2, 3, 5)
    metrics = chance_metrics(text_image, image_ids, ks)
    expected = {}
    for direction, queries, gallery in (
        ("image_to_text", image_ids, text_image),
        ("text_to_image", text_image, image_ids),
    ):
        ranks = [
            1 + [gallery[place] for place in order].index(query)
            for query in queries
            for order in itertools.permutations(range(len(gallery)))
        ]
        for k in ks:
            if k <= len(gallery):
                expected[f"{direction}_r{k}"] = np.mean([rank <= k for rank in ranks])
        expected[f"{direction}_median_rank"] = np.median(ranks)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert list(metrics) == list(expected)


def test_chance_in_a_large_gallery_of_pairs_is_k_in_n():
    metrics = chance_metrics(range(1000), range(1000))
    assert metrics["image_to_text_r1"] == pytest.approx(0.001)
    assert metrics["text_to_image_r10"] == pytest.approx(0.01)
    assert metrics["image_to_text_median_rank"] == 500.5


def test_chance_has_the_keys_and_queries_of_the_metrics():
    images, texts, text_image = random_case(8)
    ids = [*range(12), "none"]
    with pytest.raises(UserError, match="text_image: "):
        chance_metrics(text_image, ids)
    # Image 12 became "none": it and its three texts have nothing to find, and are not asked.
    chance = chance_metrics(text_image, ids, KS, distractors=True)
    metrics = retrieval_metrics(images, texts, text_image, KS, image_ids=ids, distractors=True)
    assert list(chance) == list(metrics)
    assert chance["text_to_image_r1"] == pytest.approx(1 / 13)
    assert chance["image_to_text_r1"] == pytest.approx(3 / 39)
