"""A folder that is there whole or not at all."""

import os

import pytest

from mmgem_jax.errors import UserError
from mmgem_jax.new_folder import new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", ["", "a", "a/b"])
def test_it_appears_whole(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b" / "file").exists()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["file"]
    made = tmp_path / "made"
    made.mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == made.stat().st_mode


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_was_there_stays(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("kept")
    for path in (tmp_path / "a", tmp_path / "a" / "file"):
        with pytest.raises(UserError, match="exists already"), new_folder(path):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "new"):
        raise ZeroDivisionError
    assert names(tmp_path / "a") == ["file"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "real") == ["file"]
    assert (tmp_path / "link").is_symlink()


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UserError, match="is a mount point"), new_folder(tmp_path):
        raise AssertionError


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    expected = r"--out .*file/inner: .*expected a folder"
    with pytest.raises(UserError, match=expected), new_folder(tmp_path / "file" / "inner"):
        raise AssertionError
