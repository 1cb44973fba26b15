"""The sets of long texts, from tiny copies in the formats that they are published in."""

import json

import pytest
from pictures import assert_images, encoded, sha256, write

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_files
from mmgem_jax.evaluation.caption_files import SHAREGPT4V, rejoined
from mmgem_jax.evaluation.datasets import open_dataset


def test_urban1k_has_the_first_line_alone_and_joins_by_stem(tmp_path):
    lines = {"10": "One. Two.\nThree.", "2": "Crossing \u2028 street\r\nmore", "9": "Only"}
    for stem, text in lines.items():
        write(tmp_path / "caption" / f"{stem}.txt", text)
        write(tmp_path / "image" / f"{stem}.jpg", encoded(int(stem)))
    write(tmp_path / "caption" / "._10.txt", "left by a desktop")
    write(tmp_path / "image" / ".DS_Store", "left by a desktop")
    dataset = open_dataset("urban1k", tmp_path)
    assert dataset.protocol == "urban1k-line1-partial-3-images-3-texts"
    assert dataset.image_keys == ["10", "2", "9"]
    assert dataset.texts == ["One. Two.", "Crossing \u2028 street", "Only"]
    assert dataset.text_ids == dataset.image_ids and dataset.long_text
    assert_images(dataset, [10, 2, 9])
    assert dataset.annotation_hash == sha256(*(tmp_path / f"caption/{s}.txt" for s in (10, 2, 9)))

    write(tmp_path / "image" / "11.jpg", encoded(11))
    with pytest.raises(UserError, match=r"11\.jpg: found no caption/11\.txt"):
        open_dataset("urban1k", tmp_path)


def sharegpt4v_entry(number):
    return {
        "id": f"sa_{number}",
        "image": f"sam/images/sa_{number}.jpg",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": f'It is {number}:\n\n[{{a}}, \\"b"].\nNo more.'},
        ],
    }


@pytest.mark.parametrize("chunk", [7, 100, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt4v_has_the_first_thousand(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(caption_files, "CHUNK", chunk)
    content = json.dumps([sharegpt4v_entry(i) for i in range(3)], indent=indent)
    file = write(tmp_path / SHAREGPT4V, content)
    for i in range(3):
        write(tmp_path / f"sam/images/sa_{i}.jpg", encoded(i))
    dataset = open_dataset("sharegpt4v-1k", tmp_path)
    assert dataset.protocol == "sharegpt4v-1k-partial-3-images-3-texts"
    assert dataset.texts == [f'It is {i}:  [{{a}}, \\"b"]. No more.' for i in range(3)]
    assert dataset.image_keys == [f"sam/images/sa_{i}.jpg" for i in range(3)]
    assert dataset.long_text and dataset.annotation_hash == sha256(file)
    assert_images(dataset, range(3))


def test_of_sharegpt4v_no_more_than_a_thousand_are_read(tmp_path):
    entries = [sharegpt4v_entry(i) for i in range(1003)]
    write(tmp_path / SHAREGPT4V, json.dumps(entries)[:-40])  # what follows is not looked at
    for i in range(1000):
        write(tmp_path / f"sam/images/sa_{i}.jpg", b"")
    dataset = open_dataset("sharegpt4v-1k", tmp_path)
    assert dataset.protocol == "sharegpt4v-1k"
    assert dataset.texts[-1].startswith("It is 999:")
    write(tmp_path / SHAREGPT4V, json.dumps(entries[:1000])[:-40])
    with pytest.raises(UserError, match=rf"{SHAREGPT4V}: .*; expected a JSON list"):
        open_dataset("sharegpt4v-1k", tmp_path)


def test_a_broken_entry_of_sharegpt4v_does_not_read_on_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_files, "CHUNK", 100)
    monkeypatch.setattr(caption_files, "LONGEST", 1000)
    entries = json.dumps([sharegpt4v_entry(i) for i in range(100)])
    content = entries.replace('"from": "human"', '"from": human', 1)
    write(tmp_path / SHAREGPT4V, content.encode() + b"\xff")  # not UTF-8, where none should look
    with pytest.raises(UserError, match=r"Expecting value: .*; expected a JSON list"):
        open_dataset("sharegpt4v-1k", tmp_path)


def dci(folder, **changes):
    splits = {"train": ["b.json"], "valid": [], "test": ["a.json"]}
    write(folder / "splits.json", json.dumps(splits))
    for number, stem in enumerate("ab"):
        entry = {
            "image": f"sa_{number}.jpg",
            "short_caption": f" A square. Number {number}",
            "extra_caption": "Its side is 1.5 m.\nIt is</s>plain...",
            "mask_data": {"0": {"outer_mask": "iVBORw0KGgo", "label": "square"}},
            "mask_keys": ["0"],
            "summaries": {"base": ["A square."]},
        }
        write(folder / "annotations" / f"{stem}.json", json.dumps(entry | changes))
        write(folder / "photos" / f"sa_{number}.jpg", encoded(number))


def test_dci_is_merged_as_by_lotlip(tmp_path):
    dci(tmp_path)
    dataset = open_dataset("dci", tmp_path)
    assert dataset.protocol == "dci-lotlip-partial-2-images-2-texts"
    assert dataset.image_keys == ["sa_1.jpg", "sa_0.jpg"]
    merged = "A square. Number {}. Its side is 1. 5 m. It is. plain"
    assert dataset.texts == [merged.format(1), merged.format(0)]
    assert_images(dataset, [1, 0])
    files = [
        tmp_path / name for name in ("splits.json", "annotations/b.json", "annotations/a.json")
    ]
    assert dataset.long_text and dataset.annotation_hash == sha256(*files)


def test_a_text_without_an_end_of_a_sentence_stays():
    assert rejoined(" one, two ") == "one, two"
    assert rejoined(rejoined("a.b\n\nc</s>")) == "a. b. c"


def test_an_annotation_of_dci_that_is_not_as_published_is_named(tmp_path):
    dci(tmp_path, extra_caption=None)
    with pytest.raises(UserError, match=r"annotations/b\.json: TypeError .*; expected image, sh"):
        open_dataset("dci", tmp_path)


def test_a_caption_of_urban1k_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"caption: no such folder; expected files \.txt"):
        open_dataset("urban1k", tmp_path)
    write(tmp_path / "image" / "1.jpg", encoded(1))
    file = write(tmp_path / "caption" / "1.txt", b"\xff\xfe")
    with pytest.raises(UserError, match=r"caption/1\.txt: .*; expected text in UTF-8"):
        open_dataset("urban1k", tmp_path)
    write(file, "")
    with pytest.raises(UserError, match=r"urban1k: image 1: caption ''; expected a text"):
        open_dataset("urban1k", tmp_path)
