"""Folders of images for every class, as ImageNet's."""

import hashlib

import pytest
from pictures import colour, encoded, write

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import datasets
from mmgem_jax.evaluation.datasets import open_dataset

FOLDERS = ("n01443537", "n02123045", "n01440764")


@pytest.fixture
def imagenet(tmp_path):
    """Three folders in `val`, of 1, 2 and 3 images, and what else may lie about."""
    number = 0
    for count, folder in enumerate(FOLDERS, start=1):
        for place in reversed(range(count)):
            file = tmp_path / "val" / folder / f"ILSVRC2012_val_{place}.JPEG"
            write(file, encoded(number))
            number += 1
    write(tmp_path / "val" / "n01440764" / "notes.txt", "not an image")
    write(tmp_path / "val" / ".ipynb_checkpoints" / "a.JPEG", encoded(9))
    write(tmp_path / "val" / "labels.csv", "not a class")
    return tmp_path


def test_classes_are_the_sorted_folders(imagenet):
    dataset = open_dataset("imagenet", imagenet)
    assert dataset.class_names == sorted(FOLDERS)
    assert dataset.labels == [0, 0, 0, 1, 2, 2]
    files = [f"n01440764/ILSVRC2012_val_{i}.JPEG" for i in range(3)]
    files += ["n01443537/ILSVRC2012_val_0.JPEG"]
    files += [f"n02123045/ILSVRC2012_val_{i}.JPEG" for i in range(2)]
    assert dataset.image_keys == files
    found = [dataset.pixels(i, 3)[0, 0].tolist() for i in range(6)]
    assert found == [list(colour(number)) for number in (5, 4, 3, 0, 2, 1)]
    assert (dataset.texts, dataset.text_ids, dataset.missing) == ([], [], [])
    lines = "".join(f"{file}\n" for file in files)
    assert dataset.annotation_hash == hashlib.sha256(lines.encode()).hexdigest()
    assert dataset.protocol == "imagenet1k-val-50k-partial-6-images-3-classes"


def test_the_folder_itself_may_be_the_path(imagenet):
    whole, inner = (open_dataset("imagenet", path) for path in (imagenet, imagenet / "val"))
    assert whole == inner == open_dataset("imagenet", imagenet, split="val")
    with pytest.raises(UserError, match="split: found 'train' of imagenet, expected 'val'"):
        open_dataset("imagenet", imagenet, split="train")


def test_the_published_counts_are_images_and_classes(imagenet, monkeypatch):
    monkeypatch.setattr(datasets, "PUBLISHED", {"imagenet1k-val-50k": (6, 0, 3, 0)})
    assert open_dataset("imagenet", imagenet).protocol == "imagenet1k-val-50k"


def test_a_file_of_class_names_is_in_the_order_of_the_folders(imagenet):
    plain = open_dataset("imagenet", imagenet)
    file = write(imagenet / "classnames.txt", "tench\n goldfish \n\ntabby cat\n")
    named = open_dataset("imagenet", imagenet)
    assert named.class_names == ["tench", "goldfish", "tabby cat"]
    assert named.labels == plain.labels and named.annotation_hash != plain.annotation_hash
    write(file, "tench\ngoldfish\n")
    with pytest.raises(UserError, match=r"classnames\.txt: found 2 names for the 3 folders of"):
        open_dataset("imagenet", imagenet)


def test_any_set_of_folders_has_its_counts_in_its_protocol(imagenet):
    dataset = open_dataset("folder/our/pets", imagenet, split="val")
    assert dataset.protocol == "folder-our-pets-val-6-images-3-classes"
    assert dataset.name == "folder/our/pets"
    inner = open_dataset("folder/pets", imagenet / "val")
    assert inner.protocol == "folder-pets-6-images-3-classes"


def test_folders_of_numbers_are_in_the_order_of_the_numbers(tmp_path):
    for label in (10, 9, 0, 1):
        write(tmp_path / str(label) / "a" / "b.png", encoded(label))
    dataset = open_dataset("folder/imagenetv2", tmp_path)
    assert dataset.class_names == ["0", "1", "9", "10"]
    assert dataset.image_keys == [f"{label}/a/b.png" for label in (0, 1, 9, 10)]
    write(tmp_path / "x" / "b.png", encoded(0))
    mixed = open_dataset("folder/imagenetv2", tmp_path)
    assert mixed.class_names == ["0", "1", "10", "9", "x"]


def test_a_folder_without_an_image_or_a_class_is_a_mistake(imagenet):
    with pytest.raises(UserError, match=r"nowhere: no such folder; expected a folder of images"):
        open_dataset("folder/pets", imagenet, split="nowhere")
    with pytest.raises(UserError, match=r"n01440764: found no folder, expected one of images for"):
        open_dataset("folder/pets", imagenet / "val" / "n01440764")
    (imagenet / "val" / "n03").mkdir()
    with pytest.raises(UserError, match=r"val/n03: found no image, expected one or more"):
        open_dataset("imagenet", imagenet)
