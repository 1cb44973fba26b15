"""Sets that come through TFDS, from tiny copies that TFDS itself wrote."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import colour
from plain_reader import read_split
from tfds_copy import write_copy

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.datasets import open_dataset
from mmgem_jax.evaluation.tfds_sets import open_pairs

CLASSES = ["hat", "mug", "shoe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Copies of a classification set, COCO's captions, one's own pairs, and one of neither."""
    folder = tmp_path_factory.mktemp("tfds")
    label = tfds.features.ClassLabel(names=CLASSES)
    text = tfds.features.Text()
    labels = [(i, {"label": CLASSES[i % 3], "file_name": f"{i}.jpg"}) for i in range(7)]
    features = {"label": label, "file_name": text}
    write_copy(folder, "things", features, test=labels, validation=labels[:2])

    captions = tfds.features.Sequence({"id": np.int64, "text": text})
    features = {"captions": captions, "image/id": np.int64, "image/filename": text}
    rows = [
        (
            i,
            {
                "image/id": 500 + i,
                "image/filename": f"{i}.jpg",
                "captions": [{"id": j, "text": f" {j} of {i} \n"} for j in range(5 + i)],
            },
        )
        for i in range(3)
    ]
    write_copy(folder, "coco_captions/2014", features, test=rows, val=rows[:1], restval=rows[1:])
    pairs = [(i, {"caption": f"a {CLASSES[i % 3]}"}) for i in range(5)]
    write_copy(folder, "pairs", {"caption": text}, test=pairs)
    write_copy(folder, "boxes", {"label": np.int64}, test=[(0, {"label": 3})])
    return folder


def number(dataset, place):
    """Which image this is, by its colour."""
    found = dataset.pixels(place, 2)[0, 0].tolist()
    return next(i for i in range(9) if list(colour(i)) == found)


def test_a_classification_set_brings_its_labels_and_names(folder):
    dataset = open_dataset("tfds/things", folder)
    assert dataset.protocol == "things-1.1.0-test-7-images-3-classes"
    assert dataset.class_names == CLASSES
    numbers = [number(dataset, place) for place in range(7)]
    assert sorted(numbers) == list(range(7))
    assert dataset.labels == [i % 3 for i in numbers]
    assert dataset.image_keys == [f"{i}.jpg" for i in numbers]
    assert (dataset.texts, dataset.long_text) == ([], False)


def test_a_split_and_a_slice_of_it_have_protocols_of_their_own(folder):
    whole = open_dataset("tfds/things", folder)
    validation = open_dataset("tfds/things", folder, split="validation")
    half = open_dataset("tfds/things:1.1.0", folder, split="test[:4]")
    assert validation.protocol == "things-1.1.0-validation-2-images-3-classes"
    assert half.protocol == "things-1.1.0-test[:4]-4-images-3-classes"
    assert half.labels == whole.labels[:4]
    assert len({d.annotation_hash for d in (whole, validation, half)}) == 3
    assert whole.annotation_hash == open_dataset("tfds/things", folder).annotation_hash


def test_coco_captions_are_karpathys(folder):
    dataset = open_dataset("tfds/coco_captions", folder)  # TFDS's own code would want TensorFlow
    assert dataset.protocol == "coco-karpathy-test-5k-partial-3-images-18-texts"
    numbers = [number(dataset, place) for place in range(3)]
    assert dataset.image_keys == [500 + i for i in numbers]
    assert all(type(key) is int for key in dataset.image_keys)  # of JSON
    expected = [f"{j} of {i}" for i in numbers for j in range(5 + i)]
    assert dataset.texts == expected
    expected = [place for place, i in enumerate(numbers) for _ in range(5 + i)]
    assert dataset.text_ids == expected and dataset.image_ids == [0, 1, 2]
    rest = open_dataset("tfds/coco_captions/2014", folder, split="restval")
    assert rest.protocol == "coco_captions-2014-1.1.0-restval-2-images-13-texts"


def test_pairs_are_texts_that_images_share(folder):
    dataset = open_dataset("tfds/pairs", folder)
    assert dataset.protocol == "pairs-1.1.0-test-5-images-3-texts"
    assert dataset.texts == dataset.text_ids == ["a hat", "a mug", "a shoe"]
    names = [f"a {CLASSES[number(dataset, place) % 3]}" for place in range(5)]
    assert dataset.image_ids == names and dataset.labels == []
    assert dataset.image_keys == ["0", "1", "2", "3", "4"]


# ---- the emoji -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "unseen", "validation"])
def test_emoji_have_distinct_names_and_the_splits_subgroups(emoji_config, split):
    data = emoji_config().data
    dataset = open_dataset("emoji/fixture", data.dir, split=split)
    _, records = read_split(data, split, 8)
    assert dataset.image_ids == [record["name"] for record in records]
    assert dataset.texts == dataset.text_ids == sorted({record["name"] for record in records})
    assert dataset.class_names == sorted({record["subgroup"] for record in records})
    subgroups = [dataset.class_names[label] for label in dataset.labels]
    assert subgroups == [record["subgroup"] for record in records]
    assert dataset.image_keys[0] == f"{records[0]['vendor']}/{records[0]['concept']}"
    counts = f"{len(records)}-images-{len(dataset.texts)}-texts-{len(dataset.class_names)}-classes"
    assert dataset.protocol == f"emoji-fixture-1.0.0-{split}-{counts}"
    assert dataset.templates == ["{c}"]


def test_emoji_pixels_are_those_of_the_split(emoji_config):
    data = emoji_config().data
    pixels, _ = read_split(data, "unseen", 16)
    for dataset in (
        open_dataset("emoji/fixture", data.dir, split="unseen"),
        open_pairs("emoji", data, "unseen", "name", "subgroup"),
    ):
        found = np.stack([dataset.pixels(place, 16) for place in range(len(dataset.images))])
        np.testing.assert_array_equal(found, pixels)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tfds/mnist", "test", r"no data set 'mnist' in data\.dir"),
        ("tfds/coco", "test", r"no data set 'coco' in data\.dir"),
        ("emoji", "test", r"no data set 'emoji/things' in data\.dir"),
        ("emoji/", "test", r"no data set 'emoji/' in data\.dir"),
        ("tfds/things", "train", r"split: things has no split 'train'; there are \['test', 'val"),
        ("tfds/boxes", "test", r"tfds/boxes: found the fields \['image', 'label'\], expected"),
    ],
)
def test_a_mistake_says_what_is_missing(folder, name, split, message):
    with pytest.raises(UserError, match=message) as error:
        open_dataset(name, folder, split=split)
    assert "\n" not in str(error.value)


def test_a_field_that_is_not_there_is_named(emoji_config):
    data = emoji_config().data
    with pytest.raises(UserError, match=r"emoji: no field 'caption' in emoji/fixture; there are"):
        open_pairs("emoji", data, "test", "caption")
    with pytest.raises(UserError, match=r"emoji: no field 'colour' in emoji/fixture; there are"):
        open_pairs("emoji", data, "test", "name", "colour")
