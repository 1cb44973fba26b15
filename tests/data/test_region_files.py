"""Published region annotations from tiny copies: what the readers give, and what they refuse."""

import hashlib
import json
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import region_copies
from pictures import sha256, write

from mmgem_jax.data import region_files
from mmgem_jax.data.region_files import Region, on_image, usable_regions
from mmgem_jax.errors import UserError

# ---- Visual Genome -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_sizes", [True, False])
def test_visual_genome_comes_in_the_files_order(tmp_path, with_sizes):
    folder = region_copies.visual_genome(tmp_path, with_sizes)
    digest = hashlib.sha256()
    records = list(region_files.visual_genome(folder, folder, digest))
    assert [record.key for record in records] == [1, 2, 3, 4]
    places = [record.path.relative_to(folder).as_posix() for record in records]
    assert places == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg", "VG_100K_2/4.jpg"]
    assert [record.size for record in records] == [(12, 10) if with_sizes else None] * 4
    assert records[0].regions[1] == Region(12, (3.0, 5.0, 3.0, 5.0), "a part")
    files = ["region_descriptions.json", *(["image_data.json"] if with_sizes else [])]
    assert digest.hexdigest() == sha256(*(folder / name for name in files))


def test_visual_genomes_images_may_all_be_in_one_folder(tmp_path):
    folder = region_copies.visual_genome(tmp_path)
    write(tmp_path / "all" / "1.jpg", b"")
    paths = [record.path for record in region_files.visual_genome(folder, tmp_path / "all")]
    assert paths[0] == tmp_path / "all" / "1.jpg"
    assert paths[1] == tmp_path / "all" / "VG_100K_2" / "2.jpg"  # which is not there


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("region_descriptions.json", "[", "region_descriptions.json: .*expected JSON"),
        ("region_descriptions.json", '[{"id": 1}]', "KeyError 'regions'; expected images with"),
        ("region_descriptions.json", "[7]", "TypeError .*expected images with an id and regions"),
        ("image_data.json", '[{"image_id": 1}]', "KeyError 'width'; expected images with image_id"),
        (
            "image_data.json",
            '[{"image_id": 1, "width": 0, "height": 5, "url": "a/b"}]',
            "image_data.json: found an image of 0 x 5; expected pixels",
        ),
        (
            "region_descriptions.json",
            json.dumps([{"id": 1, "regions": [region_copies.vg_region(1, 5, 0, 0, "a", 1, "b")]}]),
            "region 5: box .*expected x, y, width, height",
        ),
        (
            "region_descriptions.json",
            json.dumps([{"id": 1, "regions": [region_copies.vg_region(1, 5, 0, 0, 1, 1, None)]}]),
            "region 5: text None; expected a text",
        ),
    ],
)
def test_visual_genome_that_is_not_as_published(tmp_path, file, content, message):
    folder = region_copies.visual_genome(tmp_path)
    write(folder / file, content)
    with pytest.raises(UserError, match=message) as error:
        list(region_files.visual_genome(folder, folder))
    assert "\n" not in str(error.value)


# ---- RefCOCO -------------------------------------------------------------------------------------


def test_refcoco_has_a_region_for_every_sentence_of_an_object(tmp_path):
    refs = region_copies.refcoco(tmp_path)
    digest = hashlib.sha256()
    splits, class_names = region_files.refcoco(refs, tmp_path / "train2014", digest)
    assert class_names == ["person", "dog"]  # in the order of their ids
    assert {split: [r.key for r in records] for split, records in splits.items()} == {
        "train": [500],
        "val": [500, 600],
    }
    dog = splits["train"][0]
    assert dog.size == (12, 10)
    assert dog.path == tmp_path / "train2014" / "COCO_train2014_000000000500.jpg"
    assert dog.path.is_file()
    assert dog.regions == [
        Region(10, (0.0, 0.0, 6.0, 5.0), "the left dog", "dog"),
        Region(11, (0.0, 0.0, 6.0, 5.0), "dog on the left", "dog"),
    ]
    assert splits["val"][0].regions == [
        Region(20, (6.0, 5.0, 6.0, 5.0), "caf\u00e9 owner", "person")
    ]
    assert digest.hexdigest() == sha256(refs, tmp_path / "instances.json")


def test_a_python_2_pickle_has_8_bit_strings():
    """Python's own reader, told to leave them alone, shows what the copies are made of."""
    content = region_copies.python2_pickle([{"sent": "a", "x": 1.5, "n": "caf\u00e9"}])
    assert pickle.loads(content, encoding="bytes") == [
        {b"sent": b"a", b"x": 1.5, b"n": "caf\u00e9"}
    ]
    assert region_files.load_plain_pickle(content, "refs") == [
        {"sent": "a", "x": 1.5, "n": "caf\u00e9"}
    ]


def test_8_bit_strings_are_utf_8_and_no_byte_is_an_error():
    content = rb"(lS'caf\xc3\xa9'" + b"\na" + rb"S'caf\xe9'" + b"\na."
    assert region_files.load_plain_pickle(content, "refs") == ["caf\u00e9", "caf\ufffd"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_plain_values_is_read(protocol):
    value = [{"a": [1, 2.5, None, True, (1, 2)], "b": {"c": "d", 10**20: b""}}]
    content = pickle.dumps(value, protocol)
    if protocol < 3:  # bytes are made by a call there, which is refused
        value[0]["b"][10**20] = ""
        content = pickle.dumps(value, protocol)
    assert region_files.load_plain_pickle(content, "refs") == value


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_does_nothing(tmp_path, protocol):
    refs = region_copies.refcoco(tmp_path)
    trace = tmp_path / "trace"
    content = pickle.dumps([Evil(f"touch {trace}")], protocol)
    refs.write_bytes(content)
    with pytest.raises(UserError) as error:
        region_files.refcoco(refs, tmp_path)
    assert not trace.exists()
    assert str(error.value) == (
        f"{refs}: found posix.system, which would run as code; expected a pickle of plain lists, "
        "dicts, texts and numbers"
    )
    pickle.loads(content)  # the command is one that would have run
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"(lp0",
        b"\x80\x09.",
        b"not a pickle",
        b"Pname\n.",  # an object that the reader's owner is to find
        b"\x82\x01.",  # a registered extension
        b"(cbuiltins\neval\nS'1'\no.",
        b"(S'1'\nibuiltins\neval\n.",
        b"I1\nI2\nb.",
        b"]]a" * 3,
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    ],
)
def test_bytes_that_are_no_plain_pickle(content):
    with pytest.raises(UserError, match=r"^refs: .*; expected a pickle of plain lists") as error:
        region_files.load_plain_pickle(content, "refs")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda refs: refs[0].pop("split"), r"refs\(unc\).p: KeyError 'split'; expected refs with"),
        (
            lambda refs: refs[0].update(ann_id=99),
            "KeyError 99; expected refs with .*instances.json",
        ),
        (lambda refs: refs[0].update(image_id=99), "KeyError 99"),
        (lambda refs: refs.append(7), "TypeError"),
    ],
)
def test_refs_that_do_not_fit_their_instances(tmp_path, change, message):
    path = region_copies.refcoco(tmp_path)
    refs = region_files.load_plain_pickle(path.read_bytes(), path)
    change(refs)
    path.write_bytes(pickle.dumps(refs))
    with pytest.raises(UserError, match=message):
        region_files.refcoco(path, tmp_path)


# ---- COCO-style caption files --------------------------------------------------------------------


def test_grits_file_has_an_image_with_all_its_regions(tmp_path):
    records = region_files.coco_regions(region_copies.grit(tmp_path), tmp_path / "images")
    assert [record.key for record in records] == [3, 1]
    assert [[region.key for region in record.regions] for record in records] == [[8], [7, 9]]
    assert records[1].regions[1] == Region(9, (3.0, 5.0, 3.0, 5.0), "first")


@pytest.mark.parametrize("captions_in", ["annotations", "images"])
def test_mdetrs_entries_of_one_image_are_one_record(tmp_path, captions_in):
    file = region_copies.mdetr(tmp_path, captions_in)
    records = region_files.coco_regions(file, tmp_path / "train2014")
    assert [record.key for record in records] == [500, 600]
    found = [[(region.key, region.text) for region in record.regions] for record in records]
    assert found == [[(70, "a dog"), (72, "the dog")], [(71, "a cat")]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(image_id=99), "test.json: KeyError 99; expected im"),
        (lambda c: c["annotations"][0].pop("caption"), "KeyError 'caption'; expected images, and"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"region 7: box \[1, 2, 3\]; exp"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "a"]), "region 7: box"),
        (lambda c: c["annotations"][0].update(bbox=None), "region 7: box None"),
        (lambda c: c["images"][0].update(width="12"), "image of '12' x 10; expected pixels"),
    ],
)
def test_caption_files_that_are_not_as_published(tmp_path, change, message):
    file = region_copies.grit(tmp_path)
    content = json.loads(file.read_text())
    change(content)
    write(file, json.dumps(content))
    with pytest.raises(UserError, match=message):
        region_files.coco_regions(file, tmp_path)


def test_image_ids_are_lines_or_the_names_of_images(tmp_path):
    lines = write(tmp_path / "ids.txt", "1\n\n 3 \r\n")
    assert region_files.image_ids(lines) == {"1", "3"}
    assert region_files.image_ids(region_copies.grit(tmp_path)) == {"1", "3"}
    with pytest.raises(UserError, match=r"ids.json: .*expected images with a file_name"):
        region_files.image_ids(write(tmp_path / "ids.json", "[1, 3]"))


# ---- Boxes ---------------------------------------------------------------------------------------


def test_a_box_is_shares_of_the_image_cut_at_its_edges():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = rng.integers(1, 50, 2).tolist()
        x, y = rng.integers(-60, 60, 2).tolist()
        w, h = rng.integers(-10, 60, 2).tolist()
        corners = on_image((x, y, w, h), (width, height))
        inside = np.zeros((height, width), bool)  # the pixels that the box covers
        inside[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
        assert region_files.has_area(corners) == inside.any()
        if inside.any():
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            expected = np.asarray(edges) / [width, height, width, height]
            np.testing.assert_allclose(corners, expected, atol=1e-6)
            assert corners.dtype == np.float32


@pytest.mark.parametrize(
    "box",
    [
        *((0, 0, 0, 5), (0, 0, 5, 0), (5, 5, -5, 5), (12, 0, 3, 3), (-3, 0, 3, 3)),
        *((0, 0, float("nan"), 5), (float("inf"), 0, 5, 5), (6, 0, 1e-30, 5)),
    ],
)
def test_boxes_without_area(box):
    assert not region_files.has_area(on_image(box, (12, 10)))


def test_what_training_can_use_is_counted_by_cause(tmp_path):
    folder = region_copies.visual_genome(tmp_path)
    counts, kept = Counter(), {}
    for record in region_files.visual_genome(folder, folder):
        for corners, region in usable_regions(record.regions, record.size, counts):
            kept[region.key] = corners.tolist()
    assert counts == {"regions": 9, "cut at the edge": 2, "without area": 3, "without text": 1}
    assert set(kept) == {11, 12, 21, 22, 34}
    assert kept[21] == pytest.approx([0, 0.2, 0.25, 0.6])
    assert kept[22] == pytest.approx([0.75, 0.9, 1, 1])
    assert kept[11] == [0, 0, 1, 1]


def test_the_size_of_an_image_file(tmp_path):
    folder = region_copies.visual_genome(tmp_path)
    assert region_files.image_size(folder / "VG_100K" / "1.jpg") == (12, 10)
    for name in ("absent.jpg", "image_data.json"):
        with pytest.raises(UserError, match=rf"{name}: .*; expected an image file"):
            region_files.image_size(folder / name)
