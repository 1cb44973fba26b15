import io
import itertools
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmgem_jax.data import emoji, scenes
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer
from mmgem_jax.errors import UserError

ROOT = Path(__file__).parents[2]
VENDORS = {
    "train": {"noto", "noto-v1", "twemoji", "openmoji"},
    "validation": {"emojione"},
    "long_validation": {"emojione"},
    "test": {"fluent-emoji-flat"},
    "unseen": {"fluent-emoji-flat"},
    "long": {"fluent-emoji-flat"},
}


def read(folder):
    builder = tfds.builder_from_directory(folder)
    sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


def solid_extent(image):
    rows, columns = np.nonzero(np.asarray(image)[..., 3] >= 32)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.fixture(scope="module")
def data_dir(emoji_config):
    return emoji_config().data.dir


@pytest.fixture(scope="module")
def folder(data_dir):
    return scenes.build(data_dir, "fixture")


@pytest.fixture(scope="module")
def splits(folder):
    return read(folder)


@pytest.fixture(scope="module")
def drawings(data_dir):
    """Every record of the emoji."""
    records = read(emoji.data_folder(data_dir, "fixture"))
    return list(itertools.chain.from_iterable(records.values()))


@pytest.fixture(scope="module")
def pairs(splits):
    """The scenes a and b of every pair."""
    by_id = {r["id"].decode(): r for s in ("long", "long_validation") for r in splits[s]}
    stems = {name[:-1] for name in by_id}
    assert set(by_id) == {stem + letter for stem in stems for letter in "ab"}
    return [(by_id[f"{stem}a"], by_id[f"{stem}b"]) for stem in sorted(stems)]


def names_of(record):
    return [name.decode() for name in record["regions"]["text"]]


def boxes_of(record):
    return np.stack(record["regions"]["bbox"])


def test_each_split_has_its_scenes_and_every_scene_its_own_id(splits):
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 24,
        "validation": 8,
        "test": 8,
        "unseen": 8,
        "long": 8,
        "long_validation": 8,
    }
    ids = {record["id"].decode() for records in splits.values() for record in records}
    assert len(ids) == 64
    assert {"train/0", "train/23", "unseen/7", "long/3b", "long_validation/0a"} <= ids


def test_objects_are_two_to_six_different_things_hardly_covered(splits):
    counts = set()
    for record in itertools.chain.from_iterable(splits.values()):
        names, boxes = names_of(record), boxes_of(record)
        counts.add(len(names))
        assert len(set(names)) == len(names)
        assert boxes.shape == (len(names), 4)
        assert boxes.dtype == np.float32
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        longer = 128 * (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        assert longer.min() >= 27  # a pixel of a faint edge less than what was drawn
        assert longer.max() <= 60
        for (t, le, b, r), (u, m, c, s) in itertools.combinations(boxes.tolist(), 2):
            shared = max(0, min(b, c) - max(t, u)) * max(0, min(r, s) - max(le, m))
            assert shared <= 0.15 * ((b - t) * (r - le) + (c - u) * (s - m) - shared) + 1e-6
    assert counts == {2, 3, 4, 5, 6}


def test_every_object_is_its_vendors_drawing_where_its_box_says(splits, drawings):
    """A box is compared with the drawings of its name by every vendor: its own must fit best."""
    by_name = {}
    for record in drawings:
        image = Image.open(io.BytesIO(record["image"]))
        trimmed = image.crop(solid_extent(image))
        by_name.setdefault(record["name"].decode(), {})[record["vendor"].decode()] = trimmed
    found = {split: [] for split in splits}
    for split, record in ((split, r) for split, records in splits.items() for r in records):
        scene = Image.open(io.BytesIO(record["image"]))
        assert (scene.format, scene.mode, scene.size) == ("JPEG", "RGB", (128, 128))
        for name, box in zip(names_of(record), boxes_of(record), strict=True):
            top, left, bottom, right = (int(side) for side in 128 * box)
            seen = np.asarray(scene)[top:bottom, left:right].astype(float)
            errors = {}
            for vendor, image in by_name[name].items():
                own = np.asarray(image.resize((right - left, bottom - top), 3)).astype(float)
                # The median: another object may cover up to a third.
                error = np.abs(own[..., :3] - seen).mean(axis=2)[own[..., 3] > 250]
                errors[vendor] = np.median(error)
            vendor = min(errors, key=errors.get)
            assert errors[vendor] < 12, (record["id"], name, errors)
            found[split].append(vendor)
    assert {split: set(vendors) for split, vendors in found.items()} == VENDORS


def test_texts_of_regions_are_names_and_subgroups_and_the_unseen_stay_unseen(splits, drawings):
    subgroup = {record["name"]: record["subgroup"] for record in drawings}
    held = {r["name"] for r in drawings if r["concept"].decode() in held_out(drawings)}
    for split, records in splits.items():
        for record in records:
            regions = record["regions"]
            assert [subgroup[name] for name in regions["text"]] == list(regions["category"])
            assert all((name in held) == (split == "unseen") for name in regions["text"])
            for name in regions["text"]:
                assert name in record["sentence"]
                assert name in record["description"]


def held_out(drawings):
    return emoji.held_out({record["concept"].decode() for record in drawings}, 6)


def test_descriptions_have_100_to_300_tokens_and_sentences_few(splits, folder):
    backend = load_tokenizer(str(folder / "tokenizer")).backend_tokenizer
    for record in itertools.chain.from_iterable(splits.values()):
        described = len(backend.encode(record["description"].decode()).ids)
        said = len(backend.encode(record["sentence"].decode()).ids)
        assert 100 <= described <= 300
        # The fixture's vocabulary spells many names out; that of `things` needs 8 an object.
        assert said <= 16 * len(names_of(record))


def test_descriptions_of_a_pair_are_equal_up_to_beyond_the_77th_token_only(pairs, folder):
    backend = load_tokenizer(str(folder / "tokenizer")).backend_tokenizer
    for a, b in pairs:
        tokens = [backend.encode(scene["description"].decode()).ids for scene in (a, b)]
        assert tokens[0][:78] == tokens[1][:78]
        assert tokens[0] != tokens[1]
        assert a["sentence"] != b["sentence"]


def test_a_pair_differs_in_one_object_or_in_the_places_of_two(pairs):
    kinds = set()
    for a, b in pairs:
        names = names_of(a), names_of(b)
        differing = [i for i, (one, other) in enumerate(zip(*names, strict=True)) if one != other]
        if len(differing) == 2:
            assert [names[0][i] for i in differing] == [names[1][i] for i in reversed(differing)]
        else:
            assert len(differing) == 1
            assert names[1][differing[0]] not in names[0]
        kinds.add(len(differing))
        same = np.delete(np.arange(len(names[0])), differing)
        np.testing.assert_array_equal(boxes_of(a)[same], boxes_of(b)[same])
        changed = boxes_of(a)[differing], boxes_of(b)[differing]
        middles = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in changed]
        np.testing.assert_allclose(*middles, atol=2 / 128)
        longer = [(boxes[:, 2:] - boxes[:, :2]).max(axis=1) for boxes in changed]
        np.testing.assert_allclose(*longer, atol=2.5 / 128)
        # Two that change places are of one size, so that no other detail changes with them.
        assert np.ptp(longer) <= 2.5 / 128
    assert kinds == {1, 2}


def test_the_pictures_of_a_pair_are_equal_but_for_what_differs(pairs):
    for a, b in pairs:
        pixels = [np.asarray(Image.open(io.BytesIO(scene["image"]))) for scene in (a, b)]
        pixels = [image.copy() for image in pixels]
        for index, (one, other) in enumerate(zip(names_of(a), names_of(b), strict=True)):
            if one != other:
                for box in (boxes_of(a)[index], boxes_of(b)[index]):
                    # Two pixels for faint edges, and whole blocks of JPEG.
                    top, left = (np.maximum(128 * box[:2] - 2, 0) // 8 * 8).astype(int)
                    bottom, right = (-(-(128 * box[2:] + 2) // 8) * 8).astype(int)
                    for image in pixels:
                        image[top:bottom, left:right] = 0
        assert np.mean(pixels[0] == 0) < 0.5
        np.testing.assert_array_equal(*pixels)
        assert a["image"] != b["image"]


def test_the_same_seed_makes_the_same_scenes_and_another_one_others(splits, data_dir, tmp_path):
    (tmp_path / "emoji").symlink_to(Path(data_dir) / "emoji")
    folder = scenes.build(str(tmp_path), "fixture")
    again = read(folder)
    for split, records in splits.items():
        for record, other in zip(records, again[split], strict=True):
            np.testing.assert_array_equal(boxes_of(record), boxes_of(other))
            for field in ("id", "image", "sentence", "description"):
                assert record[field] == other[field]
            for field in ("text", "category"):
                assert list(record["regions"][field]) == list(other["regions"][field])
    with pytest.raises(UserError, match=r"seed: .* was built with 0, found 1; delete that"):
        scenes.build(str(tmp_path), "fixture", seed=1)
    folder.rename(tmp_path / "first")
    other = read(scenes.build(str(tmp_path), "fixture", seed=1))
    assert not {r["image"] for r in other["train"]} & {r["image"] for r in splits["train"]}


def test_beside_the_records_lie_attribution_tokenizer_and_metadata(folder, data_dir):
    source = emoji.data_folder(data_dir, "fixture")
    page = (folder / "ATTRIBUTION.md").read_text()
    assert page.startswith((source / "ATTRIBUTION.md").read_text())
    assert "composed into scenes" in page
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(str(source / "tokenizer")))
    metadata = tfds.builder_from_directory(folder).info.metadata
    assert metadata["seed"] == 0
    assert metadata["scenes"]["long"] == 4
    assert metadata["tokenizer"] == fingerprint(tokenizer)


def test_the_command_line_reports_and_ends_with_one_line(folder, data_dir, monkeypatch, capsys):
    def run(*arguments):
        tool = str(ROOT / "tools" / "build_scenes.py")
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        runpy.run_path(tool, run_name="__main__")

    run("--data_dir", data_dir, "--config", "fixture")
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"already built: {folder}\n")
    assert "  train: 24 scenes, " in out
    assert "description: 1" in out
    for arguments, message in (
        (("--data_dir", folder), "data_dir: found no drawings in .*build_emoji.py"),
        (("--data_dir", folder, "--config", "thing"), "config: found 'thing', expected one of"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(message, err)
