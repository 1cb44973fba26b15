"""Each image-text set from a tiny copy in the format that it is published in."""

import json

import pytest
from pictures import assert_images, encoded, sha256, write

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.caption_files import SHAREGPT4V
from mmgem_jax.evaluation.datasets import open_dataset


def sentences(number, count):
    return [f" Caption {place} of {number}.\n" for place in range(count)]


def captions(number, count):
    return [f"Caption {place} of {number}." for place in range(count)]


def texts_of(dataset):
    """The texts of each image, in the order of the images."""
    by_id = {}
    for text, image_id in zip(dataset.texts, dataset.text_ids, strict=True):
        by_id.setdefault(image_id, []).append(text)
    return [by_id[image_id] for image_id in dataset.image_ids]


# ---- Karpathy's splits of COCO and Flickr30k -----------------------------------------------------


def karpathy_entry(number, split, count, **fields):
    raw = sentences(number, count)
    return {
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number,
        "split": split,
        "sentids": list(range(count)),
        "sentences": [
            {"tokens": text.split(), "raw": text, "imgid": number, "sentid": place}
            for place, text in enumerate(raw)
        ],
    } | fields


def coco(folder):
    entries = [
        karpathy_entry(90, "train", 5, filepath="train2014", cocoid=900),
        karpathy_entry(7, "test", 5, filepath="val2014", cocoid=700),
        karpathy_entry(8, "val", 5, filepath="val2014", cocoid=800),
        karpathy_entry(5, "test", 6, filepath="val2014", cocoid=500),
        karpathy_entry(91, "restval", 5, filepath="val2014", cocoid=910),
    ]
    for entry in entries[1:4]:
        write(folder / "val2014" / entry["filename"], encoded(entry["imgid"], "PNG"))
    content = {"images": entries, "dataset": "coco"}
    return write(folder / "dataset_coco.json", json.dumps(content))


def test_coco_is_karpathys_split_with_every_caption(tmp_path):
    file = coco(tmp_path)
    dataset = open_dataset("coco", tmp_path)
    assert dataset.protocol == "coco-karpathy-test-5k-partial-2-images-11-texts"
    assert dataset.image_keys == [700, 500]
    assert texts_of(dataset) == [captions(7, 5), captions(5, 6)]
    assert_images(dataset, [7, 5])
    assert dataset.annotation_hash == sha256(file)
    assert (dataset.labels, dataset.class_names, dataset.long_text) == ([], [], False)

    validation = open_dataset("coco", tmp_path, split="val")
    assert validation.image_keys == [800]
    assert validation.protocol.startswith("coco-karpathy-val-5k-partial-")
    with pytest.raises(UserError, match=r"split: 'restval' of coco, expected one of \['test', 'v"):
        open_dataset("coco", tmp_path, split="restval")


def test_flickr30k_names_no_folder(tmp_path):
    entries = [
        karpathy_entry(3, "test", 5, filename="3.jpg"),
        karpathy_entry(4, "val", 5, filename="4.jpg"),
        karpathy_entry(2, "test", 5, filename="2.jpg", filepath="elsewhere"),
    ]
    write(tmp_path / "flickr30k-images" / "3.jpg", encoded(3))
    write(tmp_path / "elsewhere" / "2.jpg", encoded(2))
    write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": entries}))
    dataset = open_dataset("flickr30k", tmp_path)
    assert dataset.protocol == "flickr30k-karpathy-test-1k-partial-2-images-10-texts"
    assert dataset.image_keys == ["3.jpg", "2.jpg"]
    assert texts_of(dataset) == [captions(3, 5), captions(2, 5)]
    assert_images(dataset, [3, 2])


def test_a_whole_copy_has_the_published_protocol(tmp_path):
    entries = [karpathy_entry(i, "test", 5, filename=f"{i}.jpg") for i in range(1000)]
    file = write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": entries}))
    (tmp_path / "flickr30k-images").mkdir()
    for entry in entries:
        (tmp_path / "flickr30k-images" / entry["filename"]).touch()
    dataset = open_dataset("flickr30k", tmp_path)
    assert dataset.protocol == "flickr30k-karpathy-test-1k"
    assert (len(dataset.images), len(dataset.texts)) == (1000, 5000)
    entries[0]["sentences"].append({"raw": "A sixth."})
    write(file, json.dumps({"images": entries}))
    partial = open_dataset("flickr30k", tmp_path).protocol
    assert partial == "flickr30k-karpathy-test-1k-partial-1000-images-5001-texts"


# ---- COCO val2017 --------------------------------------------------------------------------------


def coco_val2017(folder, counts):
    """`counts` of captions by image; the annotations come mixed, as published."""
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 12} for i in counts]
    annotations = [
        {"image_id": i, "id": 100 * i + place, "caption": sentences(i, count)[place]}
        for place in range(max(counts.values()))
        for i, count in counts.items()
        if place < count
    ]
    for i in counts:
        write(folder / "val2017" / f"{i:012d}.jpg", encoded(i))
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    return write(folder / "annotations" / "captions_val2017.json", json.dumps(content))


def test_coco_val2017_has_the_first_five_captions(tmp_path):
    file = coco_val2017(tmp_path, {139: 7, 12: 5, 44: 6})
    dataset = open_dataset("coco-val2017", tmp_path)
    assert dataset.protocol == "coco-val2017-5cap-partial-3-images-15-texts"
    assert dataset.image_keys == [12, 44, 139]
    assert texts_of(dataset) == [captions(i, 5) for i in (12, 44, 139)]
    assert_images(dataset, [12, 44, 139])
    assert dataset.annotation_hash == sha256(file)


def test_an_image_without_a_caption_is_a_mistake(tmp_path):
    coco_val2017(tmp_path, {139: 5, 12: 0})
    with pytest.raises(UserError, match=r"coco-val2017: image 12 has no caption, expected one"):
        open_dataset("coco-val2017", tmp_path)


# ---- mistakes ------------------------------------------------------------------------------------

FILES = {
    "coco": "dataset_coco.json",
    "flickr30k": "dataset_flickr30k.json",
    "coco-val2017": "annotations/captions_val2017.json",
    "sharegpt4v-1k": SHAREGPT4V,
    "dci": "splits.json",
}
WRONG = ["", "{", '"text"', "[[1]]", '{"images": [{"id": 1}], "annotations": 3}', '{"test": 5}']


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"{FILES[name]}: No such file or directory; expected"):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("name", FILES)
def test_a_file_in_another_format_is_named(tmp_path, name, content):
    write(tmp_path / FILES[name], content)
    with pytest.raises(UserError, match=rf"{FILES[name]}: .*; expected ") as error:
        open_dataset(name, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("raw", "", r"coco: image 700: caption ''; expected a text"),
        ("raw", " \n", r"coco: image 700: caption ' \\n'; expected a text"),
        ("raw", 5, r"coco: image 700: caption 5; expected a text"),
        ("text", "?", r"dataset_coco\.json: KeyError 'raw'; expected images with"),
    ],
)
def test_a_caption_that_is_none_is_named(tmp_path, field, value, message):
    file = coco(tmp_path)
    content = json.loads(file.read_text())
    content["images"][1]["sentences"][2] = {field: value}
    write(file, json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_dataset("coco", tmp_path)
