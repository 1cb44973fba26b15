"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from mmgem_jax import run_folder, train
from mmgem_jax.errors import UserError

HOLDER = """
import sys, time
from mmgem_jax import run_folder
with run_folder.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def impatient(monkeypatch):
    """No run waits for another."""
    monkeypatch.setattr(run_folder, "PATIENCE", 0)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_is_told_who_is_in_the_folder(holder, emoji_config, tmp_path, impatient):
    """Nothing of the other's is touched."""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whose = f"process {holder.pid} of {socket.gethostname()} is at work in it"
    with pytest.raises(UserError, match=f"{tmp_path}: {whose}; expected no other run"):
        train.train(emoji_config(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_run_holds_no_folder(holder, tmp_path, impatient):
    holder.kill()
    holder.wait()
    with run_folder.held(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} ")


def test_waits_for_the_end_of_another(holder, tmp_path, monkeypatch, capsys):
    """A line says so; the other, asked to stop, may still be saving."""
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: holder.kill() or holder.wait())
    with run_folder.held(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert f"process {holder.pid}" in line and "waiting up to 120 seconds" in line


def test_the_folder_is_free_again_after_an_error(tmp_path, impatient):
    for _ in range(2):
        with pytest.raises(KeyError), run_folder.held(tmp_path):
            raise KeyError
    with run_folder.held(tmp_path), pytest.raises(UserError), run_folder.held(tmp_path):
        raise AssertionError


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_folder.held(tmp_path), run_folder.held(tmp_path):
        pass
