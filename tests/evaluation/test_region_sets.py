"""Sets of regions from tiny copies: their boxes, texts, keys and protocols, and what is refused."""

import json

import numpy as np
import pytest
import region_copies
import tensorflow_datasets as tfds
from pictures import assert_images, encoded, sha256, write
from tfds_copy import write_copy

from mmgem_jax.data import images, region_files, regions
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import datasets, region_sets
from mmgem_jax.evaluation.datasets import open_dataset
from mmgem_jax.evaluation.tfds_sets import TfdsCopy
from mmgem_jax.models.pooling import check_boxes


def rows(dataset):
    """(key of its image, key, text, box in twelfths and tenths) of every region."""
    boxes = (dataset.regions.boxes * [12, 10, 12, 10]).round(3).tolist()
    keys = [dataset.image_keys[place] for place in dataset.regions.images]
    return list(zip(keys, dataset.regions.keys, dataset.regions.texts, boxes, strict=True))


def assert_sound(dataset):
    """Boxes within the image, regions in the order of the images, no text of a whole image."""
    assert dataset.regions.boxes.dtype == np.float32
    check_boxes(dataset.regions.boxes)
    assert (np.diff(dataset.regions.images) >= 0).all()
    assert (dataset.texts, dataset.text_ids, dataset.labels, dataset.class_names) == ([],) * 4
    assert len(dataset.image_ids) == len(dataset.image_keys) == len(dataset.images)


# ---- Visual Genome -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sizes", [True, False])
def test_visual_genome_says_how_many_regions_it_dropped(tmp_path, with_sizes):
    folder = region_copies.visual_genome(tmp_path, with_sizes)
    dataset = open_dataset("visual-genome", folder)
    assert dataset.protocol == "visual-genome-4-dropped-3-images-5-regions"
    assert rows(dataset) == [
        (1, 11, "the whole", [0, 0, 12, 10]),
        (1, 12, "a part", [3, 5, 6, 10]),
        (2, 21, "over the left", [0, 2, 3, 6]),
        (2, 22, "corner", [9, 9, 12, 10]),
        (3, 34, "kept", [6, 0, 12, 5]),
    ]
    assert_images(dataset, [1, 2, 3])
    assert_sound(dataset)
    assert (dataset.regions.labels, dataset.regions.class_names) == ([], [])
    files = ["region_descriptions.json", *(["image_data.json"] if with_sizes else [])]
    assert dataset.annotation_hash == sha256(*(folder / name for name in files))


def test_a_split_of_visual_genome_is_a_file_of_image_ids(tmp_path):
    folder = region_copies.visual_genome(tmp_path)
    ids = write(folder / "mine.txt", "2\n")
    dataset = open_dataset("visual-genome", folder, split="mine")
    assert dataset.protocol == "visual-genome-mine-1-images-2-regions"
    assert dataset.image_keys == [2]
    files = [folder / name for name in ("region_descriptions.json", "image_data.json")]
    assert dataset.annotation_hash == sha256(*files, ids)
    write(ids, "2\n99\n")
    with pytest.raises(UserError, match=r"mine.txt: found 99, 1 in all, of no image; expected im"):
        open_dataset("visual-genome", folder, split="mine")
    with pytest.raises(UserError, match=r"other.txt: No such file"):
        open_dataset("visual-genome", folder, split="other")


def test_grits_test_images_have_a_key_and_a_reference_a_region(tmp_path):
    file = region_copies.grit(tmp_path)
    dataset = open_dataset("vg-regions", tmp_path)
    assert dataset.protocol == "vg-region-1ref-partial-2-images-3-regions"
    assert rows(dataset) == [
        (3, 8, "second", [6, 5, 12, 10]),  # cut: it ends a pixel outside
        (1, 7, "first", [0, 0, 6, 5]),
        (1, 9, "first", [3, 5, 6, 10]),
    ]
    assert_images(dataset, [3, 1])
    assert_sound(dataset)
    assert dataset.annotation_hash == sha256(file)
    np.testing.assert_array_equal(  # the whole image: no region may fall outside
        dataset.pixels(0, 8), images.squash(images.decode(encoded(3)), 8)
    )


# ---- RefCOCO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_every_expression_is_a_region_of_its_objects_box(tmp_path, name):
    by = "umd" if name == "refcocog" else "unc"
    refs = region_copies.refcoco(tmp_path, by)
    dataset = open_dataset(name, tmp_path)
    assert dataset.protocol == f"{name}-{by}-val-partial-2-images-3-regions"
    assert rows(dataset) == [
        (500, 20, "caf\u00e9 owner", [6, 5, 12, 10]),
        (600, 30, "a dog", [3, 0, 12, 10]),
        (600, 31, "the only dog", [3, 0, 12, 10]),
    ]
    assert dataset.regions.class_names == ["person", "dog"]
    assert dataset.regions.labels == [0, 1, 1]
    assert_images(dataset, [5, 6])
    assert_sound(dataset)
    assert dataset.annotation_hash == sha256(refs, tmp_path / "instances.json")

    region_copies.refcoco(tmp_path, "google")
    google = open_dataset(name, tmp_path, split="google/train")
    assert google.protocol == f"{name}-google-train-1-images-2-regions"
    with pytest.raises(UserError, match=r"split: found 'testA' of refs\(.*, expected one of \['tr"):
        open_dataset(name, tmp_path, split="testA")


def test_refcocog_captions_are_one_reference_an_expression(tmp_path):
    file = region_copies.mdetr(tmp_path)
    dataset = open_dataset("refcocog-captions", tmp_path)
    assert dataset.protocol == "refcocog-val-partial-2-images-3-regions"
    assert rows(dataset) == [
        (500, 70, "a dog", [0, 0, 6, 5]),
        (500, 72, "the dog", [0, 0, 6, 5]),
        (600, 71, "a cat", [3, 0, 12, 10]),
    ]
    assert_sound(dataset)
    assert dataset.annotation_hash == sha256(file)


# ---- What holds for all of them ------------------------------------------------------------------


def test_the_number_of_regions_is_part_of_a_protocol(tmp_path, monkeypatch):
    region_copies.grit(tmp_path)
    published = {"vg-region-1ref": (2, 0, 0, 3)}
    monkeypatch.setattr(datasets, "PUBLISHED", published)
    assert open_dataset("vg-regions", tmp_path).protocol == "vg-region-1ref"
    for counts in ((2, 0, 0, 4), (3, 0, 0, 3), (2, 0, 0, 0)):
        published["vg-region-1ref"] = counts
        found = open_dataset("vg-regions", tmp_path).protocol
        assert found == "vg-region-1ref-partial-2-images-3-regions"


def test_regions_of_images_that_are_not_there_go_with_them(tmp_path):
    region_copies.refcoco(tmp_path)
    whole = open_dataset("refcoco", tmp_path)
    (tmp_path / "train2014" / "COCO_train2014_000000000500.jpg").unlink()
    with pytest.raises(UserError, match=r"refcoco: 1 of the 2 images listed"):
        open_dataset("refcoco", tmp_path)
    dataset = open_dataset("refcoco", tmp_path, allow_missing=True)
    assert dataset.missing == [500]
    assert rows(dataset) == rows(whole)[1:]
    assert dataset.regions.images.tolist() == [0, 0]
    assert dataset.regions.labels == [1, 1]
    assert dataset.protocol == "refcoco-unc-val-partial-1-images-2-regions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bbox": [12, 0, 4, 4]},
            r"region 7: box \[12.0, 0.0, 4.0, 4.0\] of an image of 12 x 10; ",
        ),
        ({"bbox": [0, 0, 0, 4]}, "region 7: box .*expected x, y, width, height with an area"),
        ({"bbox": [5, 5, -2, 4]}, "region 7: box"),
        ({"caption": "  "}, "region 7: found no text, expected one"),
        ({"id": 8}, "region 8: found 2 times, expected keys that differ"),
    ],
)
def test_a_wrong_region_is_named(tmp_path, change, message):
    file = region_copies.grit(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][0].update(change)
    write(file, json.dumps(content))
    with pytest.raises(UserError, match=f"vg-regions: {message}") as error:
        open_dataset("vg-regions", tmp_path)
    assert "\n" not in str(error.value)


def test_a_set_without_a_region_is_a_mistake(tmp_path):
    file = region_copies.grit(tmp_path)
    write(file, json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    with pytest.raises(UserError, match="vg-regions: found no region, expected one or more"):
        open_dataset("vg-regions", tmp_path)


# ---- Through TFDS --------------------------------------------------------------------------------


def test_a_built_set_is_what_it_was_built_from(tmp_path):
    region_copies.refcoco(tmp_path)
    splits, _ = region_files.refcoco(tmp_path / "refs(unc).p", tmp_path / "train2014")
    regions.build(tmp_path / "data", "mine", splits)
    raw = open_dataset("refcoco", tmp_path)
    dataset = open_dataset("regions/mine", tmp_path / "data", split="val")
    assert dataset.protocol == "regions-mine-1.0.0-val-2-images-3-regions"
    order = sorted(range(3), key=lambda i: rows(dataset)[i][1])
    found = [rows(dataset)[i] for i in order]
    assert [key for _, key, _, _ in found] == ["500/0", "600/0", "600/1"]
    assert [row[2:] for row in found] == [row[2:] for row in rows(raw)]
    assert [str(row[0]) for row in found] == [str(row[0]) for row in rows(raw)]
    names = [dataset.regions.class_names[label] for label in dataset.regions.labels]
    assert [names[i] for i in order] == ["person", "dog", "dog"]
    assert dataset.regions.class_names == ["dog", "person"]  # sorted
    assert_sound(dataset)
    with pytest.raises(UserError, match="no split 'test'; there are"):
        open_dataset("regions/mine", tmp_path / "data")
    with pytest.raises(UserError, match="no data set 'regions/other'"):
        open_dataset("regions/other", tmp_path / "data")


def scene(number, *found):
    """The record of a scene with these (bbox, text, category)."""
    fields = ("bbox", "text", "category")
    return {
        "id": f"s{number}",
        "sentence": f" scene {number} ",
        "description": f"a long scene {number}",
        "regions": [dict(zip(fields, row, strict=True)) for row in found],
    }


def write_scenes(folder, name, **splits):
    text = tfds.features.Text()
    region = {"bbox": tfds.features.BBoxFeature(), "text": text, "category": text}
    features = {"id": text, "sentence": text, "description": text}
    features["regions"] = tfds.features.Sequence(region)
    write_copy(folder, name, features, **splits)


def box(y0, x0, y1, x1):
    return tfds.features.BBox(ymin=float(y0), xmin=float(x0), ymax=float(y1), xmax=float(x1))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes 0 and 1 in `test`, scene 2 in `long`."""
    folder = tmp_path_factory.mktemp("scenes")
    first = [(box(0, 0.25, 0.5, 1), "a dog", "animal"), (box(0.5, 0, 1, 0.5), "a cup", "thing")]
    second = [(box(0, 0, 1, 1), "a cat", "animal")]
    test = [(0, scene(0, *first)), (1, scene(1, *second))]
    for name in ("emoji_scenes/things", "emoji_scenes/fixture"):
        write_scenes(folder, name, test=test, long=[(2, scene(2, *second))])
    return folder


@pytest.mark.parametrize("name", ["emoji_scenes", "emoji_scenes/things", "emoji_scenes/fixture"])
def test_scenes_have_regions_and_a_sentence_an_image(scenes, name):
    dataset = open_dataset(name, scenes)
    config = name.partition("/")[2] or "things"
    counts = "2-images-2-texts-3-regions"
    assert dataset.protocol == f"emoji_scenes-{config}-1.1.0-test-{counts}"
    assert sorted(dataset.image_keys) == ["s0", "s1"]
    assert dataset.image_ids == dataset.text_ids == [0, 1]
    assert dataset.texts == [f"scene {key[1]}" for key in dataset.image_keys]
    assert dataset.long_text is False
    assert_images(dataset, [int(key[1]) for key in dataset.image_keys])
    keys = [dataset.image_keys[place] for place in dataset.regions.images]
    found = dict(zip(dataset.regions.keys, dataset.regions.boxes.tolist(), strict=True))
    assert found == {"s0/0": [0.25, 0, 1, 0.5], "s0/1": [0, 0.5, 0.5, 1], "s1/0": [0, 0, 1, 1]}
    assert [key.partition("/")[0] for key in dataset.regions.keys] == keys
    assert dataset.regions.class_names == ["animal", "thing"]
    texts = dict(zip(dataset.regions.keys, dataset.regions.texts, strict=True))
    assert texts == {"s0/0": "a dog", "s0/1": "a cup", "s1/0": "a cat"}
    labels = dict(zip(dataset.regions.keys, dataset.regions.labels, strict=True))
    assert labels == {"s0/0": 0, "s0/1": 1, "s1/0": 0}


def test_long_splits_are_of_descriptions_that_must_not_be_cut(scenes):
    dataset = open_dataset("emoji_scenes", scenes, split="long")
    assert (dataset.texts, dataset.long_text) == (["a long scene 2"], True)
    other = open_dataset("emoji_scenes", scenes)
    assert dataset.annotation_hash != other.annotation_hash
    assert other.annotation_hash == open_dataset("emoji_scenes", scenes).annotation_hash


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((box(0.5, 0, 0.5, 1), "a", ""), "region s0/1: box .*; expected x0, y0, x1, y1 with 0 <="),
        ((box(0, 0, 1, 1), " ", ""), "region s0/1: found no text, expected one"),
        ((box(0, 0, 1, 1), "a", "thing"), "region s0/0: category '', expected a class"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, found, message):
    good = (box(0, 0, 1, 1), "good", "")
    write_scenes(tmp_path, "regions/wrong", test=[(0, scene(0, good, found))])
    with pytest.raises(UserError, match=message):
        open_dataset("regions/wrong", tmp_path)


def test_a_set_without_regions_is_no_region_set(tmp_path):
    write_copy(tmp_path, "regions/none", {"id": tfds.features.Text()}, test=[(0, {"id": "a"})])
    with pytest.raises(UserError, match="no field 'regions' in regions/none; there are"):
        open_dataset("regions/none", tmp_path)
    objects = TfdsCopy("regions/none", str(tmp_path), regions_field="objects")
    with pytest.raises(UserError, match="no field 'objects' in regions/none; there are"):
        region_sets.open_regions("none", objects, "test")
