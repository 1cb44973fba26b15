import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgem_jax.data import emoji_sources
from mmgem_jax.errors import UserError

PACKAGES = Path(__file__).parents[1] / "fixture" / "emoji"


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


def concept(name):
    return emoji_sources.Concept("1f997", name.replace(" ", "-"), name, (), "animal bug", "Animals")


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


def test_an_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm: pack failed \(npm error code ENOTFOUND\); check"):
        emoji_sources.fetch_packages(tmp_path)


def test_a_missing_rasteriser_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'mmgem_jax\[emoji\]'"):
        emoji_sources.rasterise({"body": "", "left": 0, "top": 0, "width": 1, "height": 1}, 64)
