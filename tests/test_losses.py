"""The losses against closed forms, plain loops and finite differences."""

import functools

import jax
import numpy as np
import pytest

from mmgem_jax import caption_loss, contrastive, losses
from mmgem_jax.losses import Pairs

info_nce = jax.jit(losses.info_nce, static_argnums=(4, 5))
caption_cross_entropy = jax.jit(losses.caption_cross_entropy)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a few pairs and a few tokens are several chunks, the last one padded."""
    monkeypatch.setattr(contrastive, "CHUNK", 4)
    monkeypatch.setattr(caption_loss, "ENTRIES", 1)


@functools.partial(jax.jit, static_argnums=4)
def gradients(images, texts, scale, pairs, duplicates=True):
    """Gradients of info_nce's loss by images, texts and scale."""
    total = lambda *inputs: info_nce(*inputs, pairs, duplicates, 1.0)[0]  # noqa: E731
    return jax.grad(total, argnums=(0, 1, 2))(images, texts, scale)


def unit_rows(count, width=6, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs_of(ids, valid=None):
    """Pairs with these ids [N, K]; all valid by default, each a whole image of its own."""
    N = len(ids)
    valid = np.ones(N, bool) if valid is None else np.asarray(valid)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (N, 1))
    return Pairs(np.asarray(ids, np.int32), np.arange(N, dtype=np.int32), boxes, valid)


def all_different(count, valid=None):
    return pairs_of(np.arange(count)[:, None], valid)


def share_an_id(ids):
    """bool [N, N], True for two different pairs that share an id, by a loop."""
    sets = [set(row) for row in np.asarray(ids).tolist()]
    return np.array(
        [[i != j and bool(a & b) for j, b in enumerate(sets)] for i, a in enumerate(sets)]
    )


def plain_info_nce(images, texts, scale, pairs):
    """The same by two loops over pairs in double precision, duplicates masked."""
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    masked, numbers = share_an_id(pairs.group_ids), np.flatnonzero(pairs.valid)
    total, right = np.zeros(2), np.zeros(2)
    for i in numbers:
        for way in (0, 1):
            rivals = [j for j in numbers if not masked[i, j]]
            scores = [
                scale * (images[i] @ texts[j] if way == 0 else images[j] @ texts[i]) for j in rivals
            ]
            positive = scores[rivals.index(i)]
            total[way] += np.log(np.sum(np.exp(np.array(scores) - positive)))
            right[way] += max(scores) == positive
    return total / max(len(numbers), 1), right / max(len(numbers), 1)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_equal_embeddings_cost_the_log_of_the_batch_each_way(count):
    same = np.tile(unit_rows(1), (count, 1))
    loss, metrics = info_nce(same, same, 14.0, all_different(count), True, 1.0)
    assert float(loss) == pytest.approx(2 * np.log(count), abs=1e-5)
    assert float(metrics["loss_image_to_text"]) == pytest.approx(np.log(count), abs=1e-5)
    assert float(metrics["loss_text_to_image"]) == pytest.approx(np.log(count), abs=1e-5)
    assert metrics["accuracy_image_to_text"] == (count == 1)  # a tie is no success


@pytest.mark.parametrize("scale", [1.0, 3.5, 40.0])
@pytest.mark.parametrize("count", [2, 6])
def test_orthogonal_pairs_have_a_closed_form(count, scale):
    """Similarities are the identity matrix, so each way costs ln(1 + (B - 1) / e^scale)."""
    one_hot = np.eye(count, dtype=np.float32)
    loss, metrics = info_nce(one_hot, one_hot, scale, all_different(count), True, 1.0)
    assert float(loss) == pytest.approx(2 * np.log1p((count - 1) * np.exp(-scale)), rel=1e-5)
    assert metrics["accuracy_image_to_text"] == metrics["accuracy_text_to_image"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_info_nce_equals_a_double_loop_with_masks_and_padding(seed):
    random = np.random.default_rng(seed)
    images, texts = unit_rows(9, seed=seed), unit_rows(9, seed=seed + 100)
    pairs = pairs_of(random.integers(0, 9, (9, 2)), random.random(9) < 0.7)
    loss, metrics = info_nce(images, texts, 8.0, pairs, True, 1.0)
    expected, accuracies = plain_info_nce(images, texts, 8.0, pairs)
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-5)
    assert float(metrics["loss_image_to_text"]) == pytest.approx(expected[0], rel=1e-5)
    assert float(metrics["loss_text_to_image"]) == pytest.approx(expected[1], rel=1e-5)
    assert float(metrics["accuracy_image_to_text"]) == pytest.approx(accuracies[0], rel=1e-5)
    assert float(metrics["accuracy_text_to_image"]) == pytest.approx(accuracies[1], rel=1e-5)
    inside = share_an_id(pairs.group_ids)[np.ix_(pairs.valid, pairs.valid)]
    share = inside.sum() / (len(inside) * (len(inside) - 1))
    assert float(metrics["masked_share"]) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["images", "texts", "scale"])
def test_the_gradient_of_info_nce_is_its_slope(argument):
    inputs = [unit_rows(7, seed=1), unit_rows(7, seed=2), np.float32(5.0)]
    pairs = pairs_of([[0], [1], [1], [2], [3], [4], [5]], [True] * 6 + [False])
    gradient = gradients(*inputs, pairs)[argument]
    direction = np.random.default_rng(3).standard_normal(np.shape(inputs[argument]))

    def plain(step):
        moved = [np.asarray(x, np.float64) for x in inputs]
        moved[argument] = moved[argument] + step * direction
        return plain_info_nce(*moved, pairs)[0].sum()

    slope = (plain(1e-6) - plain(-1e-6)) / 2e-6
    assert float(np.sum(gradient * direction)) == pytest.approx(slope, rel=1e-4)


def test_padding_changes_no_value_and_no_gradient():
    images, texts = unit_rows(10, seed=1), unit_rows(10, seed=2)
    ids = np.array([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])[:, None]
    kept = np.array([0, 2, 3, 5, 6, 9])
    valid = np.isin(np.arange(10), kept)
    few = images[kept], texts[kept], 6.0, pairs_of(ids[kept])
    expected, expected_metrics = info_nce(*few, True, 1.0)
    for noise in (1.0, 50.0):
        padded = [np.where(valid[:, None], rows, noise * rows) for rows in (images, texts)]
        padded = *padded, 6.0, pairs_of(ids, valid)
        found, metrics = info_nce(*padded, True, 1.0)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
        for name, value in expected_metrics.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
        ours, theirs = gradients(*padded), gradients(*few)
        for way in (0, 1):
            np.testing.assert_allclose(ours[way][kept], theirs[way], rtol=0, atol=1e-6)
            assert (np.asarray(ours[way])[~valid] == 0).all()
        assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-5)


def test_the_order_of_the_pairs_does_not_matter():
    images, texts = unit_rows(8, seed=1), unit_rows(8, seed=2)
    pairs = pairs_of(np.random.default_rng(0).integers(0, 4, (8, 2)), np.arange(8) != 5)
    order = np.random.default_rng(1).permutation(8)
    loss, metrics = info_nce(images, texts, 9.0, pairs, True, 1.0)
    mixed = jax.tree.map(lambda x: x[order], (images, texts, pairs))
    mixed, mixed_metrics = info_nce(*mixed[:2], 9.0, mixed[2], True, 1.0)
    assert float(mixed) == pytest.approx(float(loss), rel=1e-6)
    for name, value in metrics.items():
        assert float(mixed_metrics[name]) == pytest.approx(float(value), rel=1e-6), name


def test_the_two_directions_swap_with_their_inputs():
    images, texts = unit_rows(8, seed=1), unit_rows(8, seed=2)
    _, metrics = info_nce(images, texts, 9.0, all_different(8), True, 1.0)
    _, swapped = info_nce(texts, images, 9.0, all_different(8), True, 1.0)
    assert metrics["loss_image_to_text"] != metrics["loss_text_to_image"]
    assert float(metrics["loss_image_to_text"]) == pytest.approx(
        float(swapped["loss_text_to_image"]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("ids", "valid"),
    [
        ([[7, 7]] * 6, [True] * 6),
        ([[i, i] for i in range(6)], [False, False, True, False, False, False]),
        ([[i, i] for i in range(6)], [False] * 6),
        ([[7, 7]] * 6, [False] * 6),
    ],
    ids=["all captions the same", "one valid pair", "all padding", "all padding, all the same"],
)
def test_a_batch_without_negatives_costs_nothing_and_stays_finite(ids, valid):
    inputs = unit_rows(6, seed=1), unit_rows(6, seed=2), 100.0, pairs_of(ids, valid)
    loss, metrics = info_nce(*inputs, True, 1.0)
    assert float(loss) == 0
    assert all(np.isfinite(value) for value in metrics.values())
    for gradient in gradients(*inputs):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_masking_a_duplicate_is_as_good_as_not_having_it_as_a_rival():
    """Pairs 0 and 1 share a text: as negatives of each other they cost ln 2, masked nothing."""
    texts = np.eye(4, dtype=np.float32)[[0, 0, 2, 3]]
    pairs = pairs_of([[0], [0], [2], [3]])
    loss = {
        mask: float(info_nce(texts, texts, 50.0, pairs, mask, 1.0)[0]) for mask in (True, False)
    }
    assert loss[True] == pytest.approx(0, abs=1e-6)
    assert loss[False] == pytest.approx(2 * np.log(2) / 2, rel=1e-5)


# ---- captions ------------------------------------------------------------------------------------


def caption_case(seed=0):
    """States whose logits, by a head that is the identity matrix, are themselves."""
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((4, 5, 11)).astype(np.float32)
    targets = random.integers(0, 11, (4, 5)).astype(np.int32)
    return logits, targets, random.random((4, 5)) < 0.6


def of_logits(logits, targets, mask):
    head = np.eye(11, dtype=np.float32)
    return caption_cross_entropy(logits, head, targets, mask, mask.sum())


@pytest.mark.parametrize("seed", range(3))
def test_caption_cross_entropy_equals_numpy(seed):
    logits, targets, mask = caption_case(seed)
    loss, correct = of_logits(logits, targets, mask)
    scores = logits.astype(np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    found = [-log_probs[(*at, targets[tuple(at)])] for at in np.argwhere(mask)]
    right = [scores[tuple(at)].argmax() == targets[tuple(at)] for at in np.argwhere(mask)]
    assert float(loss) == pytest.approx(np.mean(found), rel=1e-5)
    assert float(correct) == pytest.approx(np.mean(right), rel=1e-5)


def test_masked_tokens_are_as_good_as_absent():
    logits, targets, mask = caption_case()
    kept = logits[mask][None], targets[mask][None], np.ones((1, mask.sum()), bool)
    garbage = np.where(mask[..., None], logits, 1e6)
    for found, expected in zip(of_logits(garbage, targets, mask), of_logits(*kept), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_equal_logits_cost_the_log_of_the_vocabulary_and_are_not_right():
    _, targets, mask = caption_case()
    loss, correct = of_logits(np.zeros((4, 5, 11), np.float32), targets, mask)
    assert float(loss) == pytest.approx(np.log(11), rel=1e-6)
    assert float(correct) == 0


def test_the_gradient_of_the_cross_entropy_is_softmax_minus_target():
    logits, targets, mask = caption_case()
    total = lambda logits: of_logits(logits, targets, mask)[0]  # noqa: E731
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) - np.eye(11)[targets]
    expected = expected * mask[..., None] / mask.sum()
    np.testing.assert_allclose(jax.grad(total)(logits), expected, rtol=0, atol=1e-6)


def test_a_batch_without_target_tokens_costs_nothing_and_stays_finite():
    logits, targets, mask = caption_case()
    total = lambda logits: of_logits(logits, targets, mask & False)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(total)(logits)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
