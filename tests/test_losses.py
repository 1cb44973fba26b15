"""The losses against closed forms, plain loops and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax.losses import caption_cross_entropy, duplicate_mask, info_nce, overlap_mask

info_nce = jax.jit(info_nce)
caption_cross_entropy = jax.jit(caption_cross_entropy)


@functools.partial(jax.jit, static_argnums=3)
def gradients(images, texts, scale, value_of, masked, valid):
    """Gradients of `value_of(info_nce's loss)` by images, texts and scale."""
    total = lambda *inputs: value_of(info_nce(*inputs, masked, valid)[0])  # noqa: E731
    return jax.grad(total, argnums=(0, 1, 2))(images, texts, scale)


def identity(x):
    return x


def unit_rows(count, width=6, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nothing_masked(count):
    return np.zeros((count, count), bool), np.ones(count, bool)


def plain_info_nce(images, texts, scale, masked, valid):
    """The same by two loops over pairs in double precision."""
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    pairs = np.flatnonzero(valid)
    total, right = np.zeros(2), np.zeros(2)
    for i in pairs:
        for way in (0, 1):
            rivals = [
                j for j in pairs if j == i or not (masked[i, j] if way == 0 else masked[j, i])
            ]
            scores = [
                scale * (images[i] @ texts[j] if way == 0 else images[j] @ texts[i]) for j in rivals
            ]
            positive = scores[rivals.index(i)]
            total[way] += np.log(np.sum(np.exp(np.array(scores) - positive)))
            right[way] += max(scores) == positive
    return total / max(len(pairs), 1), right / max(len(pairs), 1)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_equal_embeddings_cost_the_log_of_the_batch_each_way(count):
    same = np.tile(unit_rows(1), (count, 1))
    loss, metrics = info_nce(same, same, 14.0, *nothing_masked(count))
    assert float(loss) == pytest.approx(2 * np.log(count), abs=1e-5)
    assert float(metrics["loss_image_to_text"]) == pytest.approx(np.log(count), abs=1e-5)
    assert float(metrics["loss_text_to_image"]) == pytest.approx(np.log(count), abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("count", [2, 6])
def test_orthogonal_pairs_have_a_closed_form(count, scale):
    """Similarities are the identity matrix, so each way costs ln(1 + (B - 1) / e^scale)."""
    one_hot = np.eye(count, dtype=np.float32)
    loss, metrics = info_nce(one_hot, one_hot, scale, *nothing_masked(count))
    assert float(loss) == pytest.approx(2 * np.log1p((count - 1) * np.exp(-scale)), rel=1e-5)
    assert metrics["accuracy_image_to_text"] == metrics["accuracy_text_to_image"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_info_nce_equals_a_double_loop_with_masks_and_padding(seed):
    random = np.random.default_rng(seed)
    images, texts = unit_rows(9, seed=seed), unit_rows(9, seed=seed + 100)
    masked = random.random((9, 9)) < 0.3  # not symmetric: rows and columns must not be mixed up
    np.fill_diagonal(masked, False)
    valid = random.random(9) < 0.7
    loss, metrics = info_nce(images, texts, 8.0, masked, valid)
    losses, accuracies = plain_info_nce(images, texts, 8.0, masked, valid)
    assert float(loss) == pytest.approx(losses.sum(), rel=1e-5)
    assert float(metrics["loss_image_to_text"]) == pytest.approx(losses[0], rel=1e-5)
    assert float(metrics["loss_text_to_image"]) == pytest.approx(losses[1], rel=1e-5)
    assert float(metrics["accuracy_image_to_text"]) == pytest.approx(accuracies[0], rel=1e-5)
    assert float(metrics["accuracy_text_to_image"]) == pytest.approx(accuracies[1], rel=1e-5)
    inside = masked[np.ix_(valid, valid)]
    expected = inside.sum() / (len(inside) * (len(inside) - 1))
    assert float(metrics["masked_share"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["images", "texts", "scale"])
def test_the_gradient_of_info_nce_is_its_slope(argument):
    inputs = [unit_rows(7, seed=1), unit_rows(7, seed=2), np.float32(5.0)]
    masked = np.zeros((7, 7), bool)
    masked[1, 2] = masked[2, 1] = True
    valid = np.array([True] * 6 + [False])
    gradient = gradients(*inputs, identity, masked, valid)[argument]
    direction = np.random.default_rng(3).standard_normal(np.shape(inputs[argument]))

    def plain(step):
        moved = [np.asarray(x, np.float64) for x in inputs]
        moved[argument] = moved[argument] + step * direction
        return plain_info_nce(*moved, masked, valid)[0].sum()

    slope = (plain(1e-6) - plain(-1e-6)) / 2e-6
    assert float(np.sum(gradient * direction)) == pytest.approx(slope, rel=1e-4)


def test_padding_changes_no_value_and_no_gradient():
    images, texts = unit_rows(10, seed=1), unit_rows(10, seed=2)
    masked = np.zeros((10, 10), bool)
    masked[0, 3] = masked[3, 0] = True
    kept = np.array([0, 2, 3, 5, 6, 9])
    valid = np.isin(np.arange(10), kept)
    few = images[kept], texts[kept]
    few_masked = masked[np.ix_(kept, kept)], np.ones(len(kept), bool)
    expected, expected_metrics = info_nce(*few, 6.0, *few_masked)
    for noise in (1.0, 50.0):
        padded = [np.where(valid[:, None], rows, noise * rows) for rows in (images, texts)]
        found, metrics = info_nce(*padded, 6.0, masked, valid)
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
        for name, value in expected_metrics.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
        ours = gradients(*padded, 6.0, identity, masked, valid)
        theirs = gradients(*few, 6.0, identity, *few_masked)
        for way in (0, 1):
            np.testing.assert_allclose(ours[way][kept], theirs[way], rtol=0, atol=1e-6)
            assert (np.asarray(ours[way])[~valid] == 0).all()
        assert float(ours[2]) == pytest.approx(float(theirs[2]), rel=1e-5)


def test_the_order_of_the_pairs_does_not_matter():
    images, texts = unit_rows(8, seed=1), unit_rows(8, seed=2)
    ids = np.random.default_rng(0).integers(0, 4, (8, 2))
    valid = np.arange(8) != 5
    order = np.random.default_rng(1).permutation(8)
    loss, metrics = info_nce(images, texts, 9.0, duplicate_mask(ids), valid)
    mixed, mixed_metrics = info_nce(
        images[order], texts[order], 9.0, duplicate_mask(ids[order]), valid[order]
    )
    assert float(mixed) == pytest.approx(float(loss), rel=1e-6)
    for name, value in metrics.items():
        assert float(mixed_metrics[name]) == pytest.approx(float(value), rel=1e-6), name


def test_the_two_directions_swap_with_their_inputs():
    images, texts = unit_rows(8, seed=1), unit_rows(8, seed=2)
    _, metrics = info_nce(images, texts, 9.0, *nothing_masked(8))
    _, swapped = info_nce(texts, images, 9.0, *nothing_masked(8))
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
    masked = duplicate_mask(jnp.asarray(ids))
    inputs = unit_rows(6, seed=1), unit_rows(6, seed=2), 100.0
    loss, metrics = info_nce(*inputs, masked, np.array(valid))
    assert float(loss) == 0
    assert all(np.isfinite(value) for value in metrics.values())
    for gradient in gradients(*inputs, identity, masked, np.array(valid)):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_masking_a_duplicate_is_as_good_as_not_having_it_as_a_rival():
    """Pairs 0 and 1 share a text: as negatives of each other they cost ln 2, masked nothing."""
    texts = np.eye(4, dtype=np.float32)[[0, 0, 2, 3]]
    loss = {}
    for name, ids in {"unmasked": [0, 1, 2, 3], "masked": [0, 0, 2, 3]}.items():
        masked = duplicate_mask(jnp.asarray(ids)[:, None])
        loss[name] = float(info_nce(texts, texts, 50.0, masked, np.ones(4, bool))[0])
    assert loss["masked"] == pytest.approx(0, abs=1e-6)
    assert loss["unmasked"] == pytest.approx(2 * np.log(2) / 2, rel=1e-5)


def test_duplicates_are_pairs_that_share_any_id():
    # 0 and 1 share the caption, 1 and 2 the text, and 3's text is 0's and 1's caption.
    ids = jnp.array([[5, 1], [5, 2], [6, 2], [8, 5]])
    expected = np.zeros((4, 4), bool)
    for i, j in ((0, 1), (1, 2), (0, 3), (1, 3)):
        expected[i, j] = expected[j, i] = True
    np.testing.assert_array_equal(duplicate_mask(ids), expected)


def caption_case(seed=0):
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((4, 5, 11)).astype(np.float32)
    targets = random.integers(0, 11, (4, 5))
    return logits, targets, random.random((4, 5)) < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_caption_cross_entropy_equals_numpy(seed):
    logits, targets, mask = caption_case(seed)
    loss, metrics = caption_cross_entropy(logits, targets, mask)
    scores = logits.astype(np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    found = [-log_probs[(*at, targets[tuple(at)])] for at in np.argwhere(mask)]
    right = [scores[tuple(at)].argmax() == targets[tuple(at)] for at in np.argwhere(mask)]
    assert float(loss) == pytest.approx(np.mean(found), rel=1e-5)
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(np.mean(found)), rel=1e-5)
    assert float(metrics["token_accuracy"]) == pytest.approx(np.mean(right), rel=1e-5)


def test_masked_tokens_are_as_good_as_absent():
    logits, targets, mask = caption_case()
    loss, metrics = caption_cross_entropy(logits, targets, mask)
    kept = logits[mask][None], targets[mask][None], np.ones((1, mask.sum()), bool)
    expected, expected_metrics = caption_cross_entropy(*kept)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name


def test_equal_logits_cost_the_log_of_the_vocabulary():
    _, targets, mask = caption_case()
    loss, metrics = caption_cross_entropy(np.zeros((4, 5, 11), np.float32), targets, mask)
    assert float(loss) == pytest.approx(np.log(11), rel=1e-6)
    assert float(metrics["perplexity"]) == pytest.approx(11, rel=1e-5)


def test_the_gradient_of_the_cross_entropy_is_softmax_minus_target():
    logits, targets, mask = caption_case()
    total = lambda logits: caption_cross_entropy(logits, targets, mask)[0]  # noqa: E731
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) - np.eye(11)[targets]
    expected = expected * mask[..., None] / mask.sum()
    np.testing.assert_allclose(jax.grad(total)(logits), expected, rtol=0, atol=1e-6)


def test_a_batch_without_target_tokens_costs_nothing_and_stays_finite():
    logits, targets, mask = caption_case()
    total = lambda logits: caption_cross_entropy(logits, targets, mask & False)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(total)(logits)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# ---- regions that overlap ------------------------------------------------------------------------


def plain_overlap(first, second):
    """Intersection over union of two boxes."""
    sides = [max(0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (area - shared)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_regions_overlap_within_their_image_alone(threshold):
    boxes = tiny.random_boxes(np.random.default_rng(3), (4, 6)).astype(np.float64)
    found = overlap_mask(jnp.asarray(boxes), threshold)
    expected = np.zeros((24, 24), bool)
    for image in range(4):
        for i in range(6):
            for j in range(6):
                over = plain_overlap(boxes[image, i], boxes[image, j])
                expected[image * 6 + i, image * 6 + j] = i != j and over > threshold
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < 4 * 30


def test_padding_and_equal_boxes():
    boxes = np.zeros((1, 4, 4), np.float32)
    boxes[0, :2] = 0.1, 0.2, 0.6, 0.7  # twice the same, and two of padding
    found = np.argwhere(overlap_mask(jnp.asarray(boxes), 0.99)).tolist()
    assert found == [[0, 1], [1, 0]]
    assert not overlap_mask(jnp.asarray(boxes), 1.0).any()
