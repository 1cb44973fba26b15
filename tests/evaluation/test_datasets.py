"""What holds for every data set: names, counts in the protocol, images that are not there."""

import json

import numpy as np
import pytest
from pictures import colour, encoded, write

from mmgem_jax.data import images
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import datasets
from mmgem_jax.evaluation.datasets import NAMES, open_dataset


@pytest.fixture
def coco(tmp_path):
    """A copy with four images of five captions each, image 40 + i in `val2014/i.jpg`."""
    entries = [
        {
            "filename": f"{i}.jpg",
            "filepath": "val2014",
            "cocoid": 40 + i,
            "split": "test",
            "sentences": [{"raw": f"{place} of {i}"} for place in range(5)],
        }
        for i in range(4)
    ]
    for i in range(4):
        write(tmp_path / "val2014" / f"{i}.jpg", encoded(i))
    write(tmp_path / "dataset_coco.json", json.dumps({"images": entries}))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["", "cococo", "coco/", "folder", "tfds", "emoji/things/x", "regions/x/y"]
)
def test_an_unknown_name_lists_those_that_are_known(tmp_path, name):
    with pytest.raises(UserError) as error:
        open_dataset(name, tmp_path)
    known = ", ".join(NAMES)
    assert str(error.value) == f"dataset: found {name!r}, expected one of {known}"


@pytest.mark.parametrize(
    "name",
    ["coco-val2017", "urban1k", "sharegpt4v-1k", "dci", "vg-regions", "refcocog-captions"],
)
def test_a_split_of_a_set_that_has_none_is_a_mistake(tmp_path, name):
    with pytest.raises(UserError, match=rf"split: 'test' of {name}, which has one alone"):
        open_dataset(name, tmp_path, split="test")


def test_only_the_published_counts_have_the_published_protocol(coco, monkeypatch):
    published = {"coco-karpathy-test-5k": (4, 20, 0, 0)}
    monkeypatch.setattr(datasets, "PUBLISHED", published)
    assert open_dataset("coco", coco).protocol == "coco-karpathy-test-5k"
    for counts in ((5, 20, 0, 0), (4, 21, 0, 0), (4, 20, 1, 0), (4, 20, 0, 1)):
        published["coco-karpathy-test-5k"] = counts
        expected = "coco-karpathy-test-5k-partial-4-images-20-texts"
        assert open_dataset("coco", coco).protocol == expected


def test_images_that_are_not_there_are_a_mistake_or_left_out(coco, monkeypatch):
    for i in (1, 3):
        (coco / "val2014" / f"{i}.jpg").unlink()
    monkeypatch.setattr(datasets, "PUBLISHED", {"coco-karpathy-test-5k": (4, 20, 0, 0)})
    with pytest.raises(UserError, match=r"2 of the 4 images listed.*1\.jpg, .*3\.jpg\); expected"):
        open_dataset("coco", coco)

    dataset = open_dataset("coco", coco, allow_missing=True)
    assert dataset.missing == [41, 43]
    assert dataset.protocol == "coco-karpathy-test-5k-partial-2-images-10-texts"
    assert dataset.image_keys == [40, 42]
    assert dataset.texts == [f"{place} of {i}" for i in (0, 2) for place in range(5)]
    assert dataset.text_ids == [image_id for image_id in dataset.image_ids for _ in range(5)]
    assert dataset.pixels(1, 3)[0, 0].tolist() == list(colour(2))

    for i in (0, 2):
        (coco / "val2014" / f"{i}.jpg").unlink()
    with pytest.raises(UserError, match=r"coco: 4 of the 4 .*, \.\.\.\); expected one or more"):
        open_dataset("coco", coco, allow_missing=True)


def test_a_split_without_an_image_is_a_mistake(coco):
    write(coco / "dataset_coco.json", json.dumps({"images": []}))
    with pytest.raises(UserError, match="coco: found no image, expected one or more"):
        open_dataset("coco", coco)


def test_images_are_opened_when_they_are_asked_for(coco):
    dataset = open_dataset("coco", coco)
    write(coco / "val2014" / "2.jpg", encoded(77))
    assert dataset.images[2] == encoded(77)
    assert [*dataset.images][3] == dataset.images[-1] == encoded(3)
    with pytest.raises(IndexError):
        dataset.images[4]


def test_pixels_are_those_of_the_evaluation(coco):
    content = encoded(5, "JPEG")
    write(coco / "val2014" / "0.jpg", content)
    pixels = open_dataset("coco", coco).pixels(0, 8)
    expected = images.resize_and_crop(images.decode(content), 8)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0, 10, -30])
def test_a_broken_image_is_named(coco, file_format, kept):
    write(coco / "val2014" / "1.jpg", encoded(1, file_format)[:kept])
    dataset = open_dataset("coco", coco)
    dataset.pixels(0, 8)
    with pytest.raises(UserError, match=r"^coco: image 41: [^<>]+; expected a whole image file$"):
        dataset.pixels(1, 8)


def test_an_image_that_has_gone_since_is_named(coco):
    dataset = open_dataset("coco", coco)
    (coco / "val2014" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"coco: image 43: .*No such file"):
        dataset.pixels(3, 8)
