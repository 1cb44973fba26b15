"""Re-ranking against plain sorting, and that it moves nothing but the first k."""

import numpy as np
import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import retrieval
from mmgem_jax.evaluation.rerank import reranked_metrics, top_items
from mmgem_jax.evaluation.retrieval import retrieval_metrics

KS = (1, 2, 5, 10)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_case(seed):
    """Thirteen images with three captions each, in mixed order, and a log P for every pair."""
    rng = np.random.default_rng(seed)
    text_image = rng.permutation(np.repeat(np.arange(13), 3))
    images = unit(rng.normal(size=(13, 8)))
    texts = unit(images[text_image] + 0.8 * rng.normal(size=(39, 8)))
    return images, texts, text_image, np.round(rng.normal(size=(13, 39)), 1)  # with ties


def sorted_out(scores, log_probs, relevant, k):
    """The rank of the best relevant item of one query, by sorting twice."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    order = sorted(order[:k], key=lambda item: -log_probs[item]) + order[k:]
    return next(rank for rank, item in enumerate(order, 1) if relevant[item])


@pytest.mark.parametrize("k", [1, 4, 20, 100])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_sorting_twice(seed, k):
    images, texts, text_image, log_probs = random_case(seed)
    calls = []

    def of_pairs(pairs):
        calls.append(pairs)
        return log_probs[pairs[:, 0], pairs[:, 1]]

    ids = np.arange(13)
    metrics = reranked_metrics(images, texts, text_image, of_pairs, k, KS, image_ids=ids)
    scores = (images.astype(np.float64) @ texts.astype(np.float64).T).astype(np.float32)
    relevant = ids[:, None] == text_image
    of_images = zip(scores, log_probs, relevant, strict=True)
    of_texts = zip(scores.T, log_probs.T, relevant.T, strict=True)
    ranks = {
        "image_to_text": [sorted_out(*rows, k) for rows in of_images],
        "text_to_image": [sorted_out(*rows, k) for rows in of_texts],
    }
    for direction, found in ranks.items():
        for at in KS:
            assert metrics[f"{direction}_r{at}"] == np.mean(np.asarray(found) <= at)
        assert metrics[f"{direction}_median_rank"] == np.median(found)
    (pairs,) = calls
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) <= 39 * 13


def test_likelihoods_in_the_order_of_similarity_change_nothing():
    images, texts, text_image, _ = random_case(0)
    before = retrieval_metrics(images, texts, text_image, KS, image_ids=range(13))

    def similarity(pairs):
        return np.sum(images[pairs[:, 0]].astype(np.float64) * texts[pairs[:, 1]], axis=1)

    after = reranked_metrics(images, texts, text_image, similarity, 5, KS, image_ids=range(13))
    assert after == before
    assert list(after) == list(before)


def test_the_truth_lifts_what_is_among_the_first_k_and_no_more():
    images, texts, text_image, _ = random_case(1)
    before = retrieval_metrics(images, texts, text_image, KS, image_ids=range(13))

    def truth(pairs):
        return (text_image[pairs[:, 1]] == pairs[:, 0]).astype(float)

    after = reranked_metrics(images, texts, text_image, truth, 5, KS, image_ids=range(13))
    for direction in ("image_to_text", "text_to_image"):
        assert before[f"{direction}_r1"] < after[f"{direction}_r1"] == before[f"{direction}_r5"]
        assert after[f"{direction}_r10"] == before[f"{direction}_r10"]


def test_a_log_p_that_is_none_is_a_mistake():
    images, texts, text_image, _ = random_case(2)
    with pytest.raises(UserError, match="log_probs: found nan at 0, expected a number"):
        nan = lambda pairs: np.full(len(pairs), np.nan)  # noqa: E731
        reranked_metrics(images, texts, text_image, nan, 5, KS, image_ids=range(13))


@pytest.mark.parametrize("blocks", [(256, 2**16), (3, 7), (1, 1), (100, 5)])
def test_top_items_are_those_of_a_stable_sort(monkeypatch, blocks):
    rows, columns = blocks
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", columns)
    rng = np.random.default_rng(0)
    queries = rng.choice([-0.5, 0.5], size=(11, 4)).astype(np.float32)  # most scores tie
    gallery = rng.choice([-0.5, 0.5], size=(30, 4)).astype(np.float32)
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    for k in (1, 4, 30):
        np.testing.assert_array_equal(top_items(queries, gallery, k, rows), order[:, :k])
    assert top_items(queries, gallery, 99, rows).shape == (11, 30)
