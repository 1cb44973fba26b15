"""Ranks of hand-made embeddings, texts and boxes that regions share, and chance."""

import itertools

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.examples import Regions
from mmgem_jax.evaluation.region_retrieval import (
    region_chance_metrics,
    region_retrieval_metrics,
    relevance,
    truth_of,
)
from mmgem_jax.evaluation.retrieval import best_ranks, retrieval_metrics


def regions(texts, images, boxes=None):
    """Regions of these texts; each has a box of its own unless numbers say which share one."""
    places = np.arange(len(texts)) if boxes is None else np.asarray(boxes)
    corners = np.stack([places, places, places + 1, places + 1], axis=1) / (len(texts) + 1)
    keys = list(range(len(texts)))
    return Regions(np.asarray(images), corners.astype(np.float32), list(texts), keys)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def metrics_of(truth, embeddings, texts, **options):
    return region_retrieval_metrics(truth, np.float32(embeddings), np.float32(texts), **options)


def test_every_rank_by_hand():
    truth = truth_of(regions(["cat", "dog", "sun", "cup"], [0, 0, 0, 1]))
    axes = np.eye(4)
    # Cat and dog are where the other should be; the sun is right, and the cup in its image alone.
    found = metrics_of(truth, axes[[1, 0, 2, 3]], axes, ks=(1, 2, 3, 4, 5))
    assert found["text_to_region_r1"] == found["region_to_text_r1"] == 2 / 4
    # A cat's text ranks the dog first; the others tie, and of them the cat has the lowest index.
    assert found["text_to_region_r2"] == 1
    assert found["text_to_region_median_rank"] == 1.5
    # The cup does not count: nothing could be wrong.
    assert found["within_image_r1"] == pytest.approx(1 / 3)
    assert found["within_image_median_rank"] == 2
    assert found["within_image_chance"] == pytest.approx(1 / 3)
    assert "within_image_r3" not in found and "within_image_r2" in found
    assert "text_to_region_r4" in found and "text_to_region_r5" not in found


def test_regions_that_share_a_text_are_no_errors_for_each_other():
    truth = truth_of(regions(["A  cloud", "a cloud", "sun", "sun"], [0, 0, 0, 1]))
    assert truth.texts == ["A  cloud", "sun"] and truth.text_of.tolist() == [0, 0, 1, 1]
    axes = np.eye(2)
    # The text lies nearer to the second cloud than to the first.
    found = metrics_of(truth, unit([[0.8, 0.6], [1, 0], [0, 1], [0, 1]]), axes)
    ones = ("text_to_region_r1", "region_to_text_r1", "within_image_r1")
    assert [found[name] for name in ones] == [1, 1, 1]
    assert found["within_image_chance"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_an_object_with_several_texts_is_one_item():
    truth = truth_of(regions(["cat", "grey cat", "dog"], [0, 0, 0], boxes=[0, 0, 1]))
    assert truth.boxes.tolist() == [0, 2] and truth.box_of.tolist() == [0, 0, 1]
    found = metrics_of(truth, np.eye(2)[[0, 0, 1]], unit([[1, 0], [0.9, 0.1], [0, 1]]))
    ones = ("text_to_region_r1", "region_to_text_r1", "within_image_r1")
    assert [found[name] for name in ones] == [1, 1, 1]
    assert found["within_image_chance"] == pytest.approx(1 / 2)


def test_the_same_box_of_another_image_is_another_item():
    truth = truth_of(regions(["cat", "dog"], [0, 1], boxes=[0, 0]))
    assert truth.boxes.tolist() == [0, 1]


def noisy(seed, count=60):
    """Regions of 12 images that share 20 texts, in 40 boxes or so, and embeddings of both."""
    rng = np.random.default_rng(seed)
    texts = [f"text {i}" for i in rng.integers(0, 20, count)]
    made = regions(texts, np.sort(rng.integers(0, 12, count)), rng.integers(0, 6, count))
    truth = truth_of(made)
    of_boxes = rng.standard_normal((len(truth.boxes), 8))
    of_texts = unit(rng.standard_normal((len(truth.texts), 8)))
    return made, unit(of_boxes)[truth.box_of], of_texts


def slow_metrics(made, embeddings, text_embeddings, k):
    """The three recalls at k, one query at a time, from the definition alone."""
    names = list(dict.fromkeys(made.texts))
    box = [
        (image, *corners) for image, corners in zip(made.images, made.boxes.tolist(), strict=True)
    ]
    own = {b: embeddings[i] for i, b in reversed(list(enumerate(box)))}
    true = set(zip(made.texts, box, strict=True))

    def found(text, boxes):
        near = sorted(boxes, key=lambda b: -float(own[b] @ text_embeddings[names.index(text)]))
        return any((text, b) in true for b in near[:k])

    def named(b):
        near = sorted(names, key=lambda t: -float(own[b] @ text_embeddings[names.index(t)]))
        return any((t, b) in true for t in near[:k])

    within = []
    for text, (image, *_) in zip(made.texts, box, strict=True):
        of_image = [b for b in own if b[0] == image]
        within += [found(text, of_image)] if len(of_image) > k else []
    answers = [found(t, own) for t in names], [named(b) for b in own], within
    return [np.mean(row) for row in answers]


@pytest.mark.parametrize(("seed", "k"), [*itertools.product(range(3), (1, 3))])
def test_recalls_are_those_of_a_plain_loop(seed, k):
    made, embeddings, texts = noisy(seed)
    found = region_retrieval_metrics(truth_of(made), embeddings, texts, ks=(k,))
    names = ("text_to_region", "region_to_text", "within_image")
    expected = slow_metrics(made, embeddings, texts, k)
    assert [found[f"{name}_r{k}"] for name in names] == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[2] < 1


def test_with_a_box_each_the_whole_set_is_plain_retrieval():
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in rng.integers(0, 20, 60)]
    truth = truth_of(regions(texts, [0] * 60))
    embeddings, of_texts = (unit(rng.standard_normal((n, 8))) for n in (60, len(truth.texts)))
    found = region_retrieval_metrics(truth, embeddings, of_texts)
    ids = np.arange(len(truth.texts))
    plain = retrieval_metrics(embeddings, of_texts, ids, image_ids=truth.text_of)
    for name, value in plain.items():
        assert found[name.replace("image", "region")] == value


def test_the_order_of_regions_does_not_matter():
    made, embeddings, texts = noisy(3)
    order = np.random.default_rng(1).permutation(len(made))
    moved = Regions(
        made.images[order], made.boxes[order], [made.texts[i] for i in order], order.tolist()
    )
    truth, other = truth_of(made), truth_of(moved)
    texts_moved = texts[[truth.texts.index(text) for text in other.texts]]
    found = region_retrieval_metrics(truth, embeddings, texts)
    assert region_retrieval_metrics(other, embeddings[order], texts_moved) == pytest.approx(found)
    assert region_chance_metrics(other) == pytest.approx(region_chance_metrics(truth))


def test_relevance_in_parts_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    queries, items = rng.integers(0, 30, 80), rng.integers(0, 50, 80)
    whole = relevance(queries, items)(slice(0, 30), slice(0, 50))
    assert set(zip(*np.nonzero(whole), strict=True)) == set(zip(queries, items, strict=True))
    parts = [
        [relevance(queries, items)(slice(r, r + 10), slice(c, c + 25)) for c in (0, 25)]
        for r in (0, 10, 20)
    ]
    np.testing.assert_array_equal(np.block(parts), whole)


def test_chance_is_the_mean_of_random_rankings():
    made, _, _ = noisy(4)
    truth, rng = truth_of(made), np.random.default_rng(0)
    draws = []
    for _ in range(200):
        boxes = unit(rng.standard_normal((len(truth.boxes), 64)))[truth.box_of]
        texts = unit(rng.standard_normal((len(truth.texts), 64)))
        draws.append(region_retrieval_metrics(truth, boxes, texts))
    chance = region_chance_metrics(truth)
    for name, expected in chance.items():
        if "median" not in name:
            values = [draw[name] for draw in draws]
            error = np.std(values) / np.sqrt(len(values))
            assert abs(np.mean(values) - expected) < 4 * error + 1e-9, name
    assert draws[0]["within_image_chance"] == chance["within_image_r1"]


def test_images_of_one_region_have_no_retrieval_within():
    truth = truth_of(regions(["cat", "dog"], [0, 1]))
    found = metrics_of(truth, np.eye(2), np.eye(2), ks=(1,))
    assert not [name for name in found if name.startswith("within")]
    assert not [name for name in region_chance_metrics(truth) if name.startswith("within")]


def test_embeddings_that_were_never_normalised_are_refused():
    truth = truth_of(regions(["cat", "dog"], [0, 0]))
    with pytest.raises(UserError, match="embeddings: row 0 has the length 2"):
        metrics_of(truth, 2 * np.eye(2), np.eye(2))
    ids = np.arange(2)
    assert best_ranks(np.eye(2), np.eye(2)[::-1], ids, ids).tolist() == [2, 2]
