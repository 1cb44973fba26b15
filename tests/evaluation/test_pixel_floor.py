"""The nearest drawing by pixels against brute force in plain Python."""

import statistics

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.pixel_floor import pixel_floor

KS = (1, 2, 5, 10)


def drawings(rng, count, side=32):
    """Random drawings whose 16 x 16 means are whole numbers, though no pixel has their value."""
    means = rng.integers(60, 196, size=(count, 16, 16, 3))
    image = means.repeat(side // 16, axis=1).repeat(side // 16, axis=2)
    sign = np.where(np.arange(side) % 2, 1, -1)
    spread = rng.integers(1, 60, size=means.shape).repeat(side // 16, axis=1)
    spread = spread.repeat(side // 16, axis=2) * (sign[:, None] * sign)[..., None]
    return (image + spread).astype(np.uint8)


def brute_force(train, train_names, test, test_names, ks):
    def shrunken(image):
        small = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
        return np.asarray(small).astype(float).ravel().tolist()

    def distance(left, right):
        return sum((a - b) ** 2 for a, b in zip(left, right, strict=True))

    train, test = [shrunken(image) for image in train], [shrunken(image) for image in test]
    gallery = sorted(set(test_names))
    table = [
        [
            min(
                (
                    distance(image, other)
                    for other, other_name in zip(train, train_names, strict=True)
                    if other_name == name
                ),
                default=float("inf"),
            )
            for name in gallery
        ]
        for image in test
    ]

    def best_rank(distances, wanted):
        if min(distances[place] for place in wanted) == float("inf"):
            return len(distances) + 1
        order = sorted(range(len(distances)), key=lambda place: (distances[place], place))
        return min(order.index(place) + 1 for place in wanted)

    of_images = [
        best_rank(row, [gallery.index(name)]) for row, name in zip(table, test_names, strict=True)
    ]
    of_names = [
        best_rank(
            [row[place] for row in table],
            [index for index, other in enumerate(test_names) if other == name],
        )
        for place, name in enumerate(gallery)
    ]
    expected = {}
    for direction, ranks, size in (
        ("image_to_text", of_images, len(gallery)),
        ("text_to_image", of_names, len(test)),
    ):
        for k in ks:
            if k <= size:
                expected[f"{direction}_r{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        expected[f"{direction}_median_rank"] = statistics.median(ranks)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_floor_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    names = [f"name {number}" for number in rng.permutation(14)]
    train_names = rng.choice(names[:12], size=30).tolist()  # the last two have no drawing
    test_names = names[2:] + names[5:7]  # the first two are not asked for, two are asked twice
    train, test = drawings(rng, 30), drawings(rng, len(test_names))
    # Half of the tests look like a training drawing of their name, and two like any other.
    for place in range(0, len(test), 2):
        same = [row for row, name in enumerate(train_names) if name == test_names[place]]
        if same:
            test[place] = np.clip(train[same[0]].astype(int) + 9 * (place % 4), 0, 255)
    test[1] = train[0]
    metrics = pixel_floor(train, train_names, test, test_names, KS)
    expected = brute_force(train, train_names, test, test_names, KS)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert list(metrics) == list(expected)
    assert 0 < metrics["image_to_text_r1"] < 1
    for block_size in (1, 3):
        assert pixel_floor(train, train_names, test, test_names, KS, block_size) == metrics


def test_a_test_drawing_seen_in_training_is_found():
    rng = np.random.default_rng(0)
    images, names = drawings(rng, 12, side=64), [f"name {number}" for number in range(12)]
    metrics = pixel_floor(images[::-1], names[::-1], images, names)
    assert set(metrics.values()) == {1.0}


def test_images_of_any_size_and_shape_are_compared():
    black, white = np.zeros((20, 7, 3), np.uint8), np.full((5, 33, 3), 255, np.uint8)
    metrics = pixel_floor([black, white], ["b", "w"], [white[:, :9], black[:3]], ["w", "b"])
    assert metrics["image_to_text_r1"] == metrics["text_to_image_r1"] == 1


def test_names_without_a_training_drawing_are_never_found():
    rng = np.random.default_rng(0)
    images = drawings(rng, 4)
    metrics = pixel_floor(images, ["a", "b", "x", "y"], images, ["a", "b", "c", "d"], (1, 4))
    assert metrics["image_to_text_r4"] == metrics["text_to_image_r4"] == 0.5
    nothing = pixel_floor(images, ["x"] * 4, images, ["a", "b", "c", "d"], (1, 4))
    assert nothing["image_to_text_r4"] == nothing["text_to_image_r4"] == 0
    assert nothing["image_to_text_median_rank"] == 5


def test_what_cannot_be_compared_is_an_error():
    images = drawings(np.random.default_rng(0), 2)
    with pytest.raises(UserError, match="train_names: found 1 values, expected 2"):
        pixel_floor(images, ["a"], images, ["a", "b"])
    with pytest.raises(UserError, match=r"test_images: image 0 is float64 .* expected uint8"):
        pixel_floor(images, ["a", "b"], images / 255, ["a", "b"])
    with pytest.raises(UserError, match="test_images: found none"):
        pixel_floor(images, ["a", "b"], [], [])
