"""CLIP_benchmark's WebDataset folders: tar files that are read where they lie."""

import hashlib
import io
import tarfile

import pytest
from pictures import colour, encoded, write

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.datasets import open_dataset

TEMPLATES = ["a photo of a {c}.", "the {c}, drawn"]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(numbers, kind, annotation, image="webp"):
    """Members as webdataset's writer makes them: a key of seven digits, one extension each."""
    formats = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}
    for number in numbers:
        yield f"s{number:07d}.{kind}", annotation(number).encode()
        yield f"s{number:07d}.{image}", encoded(number, formats[image])


@pytest.fixture
def classification(tmp_path):
    """Five images in two tar files; the class of image i is i % 3."""
    write(tmp_path / "classnames.txt", "hat\n mug \n\nshoe\n")
    write(tmp_path / "zeroshot_classification_templates.txt", "\n".join(TEMPLATES) + "\n")
    write(tmp_path / "test" / "nshards.txt", "2\n")
    label = lambda number: str(number % 3)  # noqa: E731
    write_tar(tmp_path / "test" / "0.tar", samples((0, 1, 2), "cls", label, "png"))
    write_tar(tmp_path / "test" / "1.tar", samples((3, 4), "cls", label, "png"))
    return tmp_path


@pytest.fixture
def retrieval(tmp_path):
    """Two images, with two and with one caption."""
    write(tmp_path / "dataset_type.txt", "retrieval\n")
    write(tmp_path / "test" / "nshards.txt", "1")
    texts = {0: "A hat.\nOne hat, seen\\n from above\n", 1: "A mug."}
    write_tar(tmp_path / "test" / "0.tar", samples(texts, "txt", texts.get, "png"))
    return tmp_path


def test_labels_names_and_templates_are_the_folders(classification):
    dataset = open_dataset("wds/vtab/things", classification)
    assert dataset.protocol == "wds-vtab-things-test-5-images-3-classes"
    assert dataset.labels == [0, 1, 2, 0, 1]
    assert dataset.class_names == ["hat", "mug", "shoe"]
    assert dataset.templates == TEMPLATES
    keys = [f"0.tar/s{i:07d}" for i in range(3)] + [f"1.tar/s{i:07d}" for i in (3, 4)]
    assert dataset.image_keys == keys
    assert [dataset.images[i] for i in range(5)] == [encoded(i) for i in range(5)]
    assert dataset.pixels(4, 2)[0, 0].tolist() == list(colour(4))
    content = (classification / "classnames.txt").read_bytes() + b"0\n1\n2\n0\n1\n"
    assert dataset.annotation_hash == hashlib.sha256(content).hexdigest()


def test_captions_are_the_lines_of_a_text(retrieval):
    dataset = open_dataset("wds/flickr8k", retrieval)
    assert dataset.protocol == "wds-flickr8k-test-2-images-3-texts"
    assert dataset.texts == ["A hat.", "One hat, seen\\n from above", "A mug."]
    assert dataset.text_ids == [dataset.image_ids[i] for i in (0, 0, 1)]
    assert (dataset.labels, dataset.class_names, dataset.templates) == ([], [], [])


def test_without_the_type_the_samples_tell(retrieval):
    (retrieval / "dataset_type.txt").unlink()
    assert open_dataset("wds/flickr8k", retrieval).texts[-1] == "A mug."


def test_a_split_is_a_folder(retrieval):
    texts = {5: "A shoe."}
    write_tar(retrieval / "train" / "0.tar", samples(texts, "txt", texts.get))
    write(retrieval / "train" / "nshards.txt", "1")
    dataset = open_dataset("wds/flickr8k", retrieval, split="train")
    assert dataset.texts == ["A shoe."]
    assert dataset.protocol == "wds-flickr8k-train-1-images-1-texts"


@pytest.mark.parametrize("image", ["webp", "png", "jpg"])
def test_the_published_kinds_of_images_are_found(tmp_path, image):
    write(tmp_path / "test" / "nshards.txt", "1")
    members = list(samples((6, 7), "cls", str, image))
    extra = [("__notes__", b""), ("a/._s0000007.cls", b"desktop"), ("s0000006.json", b"{}")]
    write_tar(tmp_path / "test" / "0.tar", [*members, *extra])
    dataset = open_dataset("wds/x", tmp_path)
    assert (dataset.labels, dataset.class_names) == ([6, 7], [])
    assert [*dataset.images] == [members[1][1], members[3][1]]


def test_only_what_is_asked_for_is_read(classification):
    dataset = open_dataset("wds/things", classification)
    path, offset, size = dataset.images.places[1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(encoded(9)[:size])
    assert dataset.images[1][:40] == encoded(9)[:40] and dataset.images[2] == encoded(2)
    with path.open("r+b") as file:
        file.truncate(offset + 5)
    with pytest.raises(UserError, match=r"image 0\.tar/s0000001: .*0\.tar: ends at .*; expected"):
        dataset.pixels(1, 4)


# ---- mistakes ------------------------------------------------------------------------------------


def one(*members):
    """A folder's change: its only tar file has these members."""
    return lambda folder: write_tar(folder / "test" / "1.tar", members)


MISTAKES = {
    "no count": (lambda f: (f / "test/nshards.txt").unlink(), r"nshards\.txt: No such file"),
    "count": (lambda f: write(f / "test/nshards.txt", "two"), r"nshards\.txt: found 'two', exp"),
    "none": (lambda f: write(f / "test/nshards.txt", "0"), r"test: found no sample in the tar"),
    "absent": (lambda f: (f / "test/1.tar").unlink(), r"1\.tar: .*No such file.*; expected a who"),
    "cut": (lambda f: write(f / "test/1.tar", (f / "test/1.tar").read_bytes()[:2000]), "whole tar"),
    "no tar": (lambda f: write(f / "test/1.tar", "text"), r"1\.tar: .*; expected a whole tar file"),
    "empty": (lambda f: write(f / "test/1.tar", b""), r"1\.tar: .*; expected a whole tar file"),
    "label": (one(("a.cls", b"x"), ("a.png", b"")), r"sample a: found the label 'x', expected a"),
    "below": (one(("a.cls", b"-1"), ("a.png", b"")), r"sample a: found the label '-1'"),
    "above": (one(("a.cls", b"3"), ("a.png", b"")), r"image 1\.tar/a: label 3, expected 0 to 2"),
    "no image": (one(("a.cls", b"1")), r"sample a: found \['cls'\], expected an image and 'cls'"),
    "no label": (one(("b/a.png", b"")), r"sample b/a: found \['png'\], expected an image and 'cls"),
    "twice": (one(("a.png", b""), ("a.png", b"")), r"1\.tar: found a\.png twice"),
    "bytes": (one(("a.cls", b"\xff"), ("a.png", b"")), r"sample a: .*; expected text in UTF-8"),
    "type": (lambda f: write(f / "dataset_type.txt", "multilabel"), r"type\.txt: found 'multilab"),
    "template": (
        lambda f: write(f / "zeroshot_classification_templates.txt", "a photo"),
        r"templates\.txt: found the template 'a photo', expected \{c\} in it",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_file(classification, mistake):
    change, message = MISTAKES[mistake]
    change(classification)
    with pytest.raises(UserError, match=message) as error:
        open_dataset("wds/things", classification)
    assert "\n" not in str(error.value)


def test_an_empty_caption_is_named(retrieval):
    texts = {0: "A hat.\n\nAgain", 1: "A mug"}
    write_tar(retrieval / "test" / "0.tar", samples(texts, "txt", texts.get))
    with pytest.raises(UserError, match=r"wds/x: image 0\.tar/s0000000: caption ''; expected"):
        open_dataset("wds/x", retrieval)
