"""Region sets built from published annotations, read back, refused when wrong."""

import io
from collections import Counter

import pytest
import region_copies
import tensorflow_datasets as tfds
from pictures import write
from PIL import Image

from mmgem_jax.data import images, region_files, regions
from mmgem_jax.data.tfds_records import open_split
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.tfds_sets import TfdsCopy


@pytest.fixture
def vg(tmp_path):
    """A copy of Visual Genome and its records."""
    folder = region_copies.visual_genome(tmp_path / "vg")
    return folder, list(region_files.visual_genome(folder, folder))


def records_of(data_dir, name, split):
    """A split's records by id, their texts as str."""
    source = open_split(TfdsCopy(f"regions/{name}", str(data_dir)), split)
    return {record["id"].decode(): record for record in source}


def test_records_come_back_as_they_were(vg, tmp_path):
    folder, records = vg
    built, counts = regions.build(tmp_path / "data", "vg", {"train": records}, vocab_size=300)
    assert built == tmp_path / "data" / "regions" / "vg" / "1.0.0"
    assert load_tokenizer(str(built / "tokenizer")).vocab_size > 250
    assert counts == {
        "train": Counter(
            {
                "images": 4,
                "regions": 9,
                "cut at the edge": 2,
                "without area": 3,
                "without text": 1,
                "without a region": 1,
            }
        )
    }
    found = records_of(tmp_path / "data", "vg", "train")
    assert set(found) == {"1", "2", "3"}
    assert found["2"]["image"] == (folder / "VG_100K_2" / "2.jpg").read_bytes()
    assert images.decode(found["2"]["image"]).size == (12, 10)
    boxes = [box.tolist() for box in found["2"]["regions"]["bbox"]]
    assert boxes[0] == pytest.approx([0.2, 0, 0.6, 0.25])  # y0, x0, y1, x1
    assert boxes[1] == pytest.approx([0.9, 0.75, 1, 1])
    assert found["2"]["regions"]["text"] == [b"over the left", b"corner"]
    assert found["1"]["regions"]["text"] == [b"the whole", b"a part"]
    assert found["1"]["regions"]["category"] == [b"", b""]


def test_sizes_are_the_image_files_where_none_are_listed(tmp_path):
    folder = region_copies.visual_genome(tmp_path / "vg", with_sizes=False)
    records = list(region_files.visual_genome(folder, folder))[:1]
    regions.build(tmp_path / "data", "vg", {"train": records})
    box = records_of(tmp_path / "data", "vg", "train")["1"]["regions"]["bbox"][1]
    assert box.tolist() == pytest.approx([0.5, 0.25, 1, 0.5])


def test_refcocos_splits_and_categories_are_kept(tmp_path):
    refs = region_copies.refcoco(tmp_path)
    splits = regions.read_splits("refcoco", tmp_path, tmp_path / "train2014", {})
    assert refs == regions.refs_file(refs) == regions.refs_file(tmp_path)
    regions.build(tmp_path / "data", "refcoco", splits)
    train = records_of(tmp_path / "data", "refcoco", "train")["500"]["regions"]
    assert train["text"] == [b"the left dog", b"dog on the left"]
    assert train["category"] == [b"dog", b"dog"]
    assert train["bbox"][0].tolist() == train["bbox"][1].tolist() == [0, 0, 0.5, 0.5]
    assert set(records_of(tmp_path / "data", "refcoco", "val")) == {"500", "600"}


def keys(splits):
    return {split: [record.key for record in records] for split, records in splits.items()}


def test_images_that_are_evaluated_on_are_not_trained_on(vg, tmp_path):
    folder, _ = vg
    test = region_copies.grit(tmp_path)  # of images 3 and 1
    ids = write(tmp_path / "ids.txt", "4\n3\n9\n")
    held_out = {"validation": ids, "test": test}
    splits = regions.read_splits("visual-genome", folder, folder, held_out)
    assert keys(splits) == {"train": [2], "validation": [3, 4], "test": [1]}
    splits = regions.read_splits("visual-genome", folder, folder, {"test": test}, ids)
    assert keys(splits) == {"train": [2], "test": [1]}
    splits = regions.read_splits("coco", test, tmp_path / "images", {"test": ids})
    assert keys(splits) == {"train": [1], "test": [3]}

    region_copies.refcoco(tmp_path)
    leave_out = region_copies.mdetr(tmp_path)
    splits = regions.read_splits("refcoco", tmp_path, tmp_path, {})
    assert keys(splits) == {"train": [500], "val": [500, 600]}
    with pytest.raises(UserError, match="test: found with refcoco, which has splits"):
        regions.read_splits("refcoco", tmp_path, tmp_path, {"test": ids})
    splits = regions.read_splits("refcoco", tmp_path, tmp_path, {}, leave_out)
    assert keys(splits) == {"train": [], "val": []}
    with pytest.raises(UserError, match="train: found no image; expected images"):
        regions.build(tmp_path / "data", "refcoco", splits)


def test_ids_of_no_image_are_a_mistake(vg, tmp_path):
    folder, _ = vg
    for content, found in (("77\n", "77"), ("", "nothing")):
        ids = write(tmp_path / "ids.txt", content)
        with pytest.raises(UserError, match=f"ids.txt: found {found}; expected ids of images in"):
            regions.read_splits("visual-genome", folder, folder, {"test": ids})
        with pytest.raises(UserError, match=f"ids.txt: found {found}; expected ids of images in"):
            regions.read_splits("visual-genome", folder, folder, {}, ids)


def test_several_refs_files_must_be_told_apart(tmp_path):
    region_copies.refcoco(tmp_path)
    region_copies.refcoco(tmp_path, "google")
    with pytest.raises(UserError, match=r"found refs\(google\)\.p, refs\(unc\)\.p; expected one"):
        regions.refs_file(tmp_path)
    with pytest.raises(UserError, match="found none; expected one"):
        regions.refs_file(tmp_path / "train2014")


def cut():
    """The first part of an image's file, with its whole header."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "JPEG")
    return file.getvalue()[:-500]


@pytest.mark.parametrize("content", [None, b"no image", cut()])
def test_images_that_are_missing_or_broken(vg, tmp_path, content):
    folder, records = vg
    image = folder / "VG_100K_2" / "2.jpg"
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(UserError, match=r"2\.jpg.*; expected a whole image file") as error:
        regions.build(tmp_path / "data", "vg", {"train": records})
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)
    _, counts = regions.build(tmp_path / "data", "vg", {"train": records}, allow_missing=True)
    assert (counts["train"]["missing or broken"], counts["train"]["images"]) == (1, 4)
    assert set(records_of(tmp_path / "data", "vg", "train")) == {"1", "3"}


def test_what_cannot_be_built_leaves_nothing(vg, tmp_path):
    _, records = vg
    for splits, options, message in (
        ({"train": records[3:]}, {}, "found no image with a region; expected one or more"),
        ({"train": records * 2}, {}, "train: found image 1 2 times; expected images, each once"),
        ({"train": []}, {}, "train: found no image; expected images"),
        ({"train": records}, {"vocab_size": 10}, "vocab_size"),
        ({"test": records}, {"vocab_size": 300}, r"vocab_size: found the splits \['test'\]; expec"),
    ):
        with pytest.raises(UserError, match=message):
            regions.build(tmp_path / "data", "vg", splits, **options)
    for name in ("", "a/b", "..", "a.b"):
        with pytest.raises(UserError, match=r"name: found '.*'; expected letters, digits, - and _"):
            regions.build(tmp_path / "data", name, {"train": records})
    folder, _ = regions.build(tmp_path / "data", "vg", {"train": records})
    with pytest.raises(UserError, match="exists; delete it or give another name"):
        regions.build(tmp_path / "data", "vg", {"train": records})
    assert tfds.builder_from_directory(folder).info.splits["train"].num_examples == 3


# ---- The tool ------------------------------------------------------------------------------------


def test_the_tool_builds_and_says_what_was_left_out(vg, tmp_path, call_tool):
    folder, _ = vg
    status, out, _ = call_tool(
        *("build_regions.py", "--data_dir", tmp_path / "data", "--format", "visual-genome"),
        *("--annotations", folder, "--images", folder, "--test", region_copies.grit(tmp_path)),
        *("--vocab_size", 300, "--name", "my-vg"),
    )
    assert status == 0
    assert out.splitlines() == [
        f"built {tmp_path / 'data/regions/my-vg/1.0.0'}; train on it with "
        "--config.data.name=regions/my-vg",
        "  train: 2 images, 3 regions, 2 cut at the edge, 1 without area, 1 without a region",
        "  test: 2 images, 6 regions, 0 cut at the edge, 2 without area, 1 without text",
    ]
    assert set(records_of(tmp_path / "data", "my-vg", "train")) == {"2"}
    assert set(records_of(tmp_path / "data", "my-vg", "test")) == {"1", "3"}


def test_the_tool_takes_some_of_refcocos_splits(tmp_path, call_tool):
    region_copies.refcoco(tmp_path)
    arguments = (
        *("build_regions.py", "--data_dir", tmp_path / "data", "--format", "refcoco"),
        *("--annotations", tmp_path, "--images", tmp_path / "train2014"),
    )
    status, _, err = call_tool(*arguments, "--splits", "val,testA")
    expected = "error: --splits: found ['testA']; expected some of ['train', 'val']"
    assert (status, err.splitlines()) == (2, [expected])
    status, out, _ = call_tool(*arguments, "--splits", "val")
    assert status == 0 and out.splitlines()[1:] == ["  val: 2 images, 3 regions, 2 cut at the edge"]


def test_the_tools_mistakes_are_one_line(tmp_path, call_tool):
    status, out, err = call_tool(
        *("build_regions.py", "--data_dir", tmp_path / "data", "--format", "coco"),
        *("--annotations", tmp_path / "absent.json", "--images", tmp_path),
    )
    assert (status, out) == (2, "")
    expected = f"error: {tmp_path / 'absent.json'}: No such file or directory; expected an "
    assert err.splitlines() == [f"{expected}annotation file"]
