"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mmgem_jax import processes, run_folder, train
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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


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

    def sleep(_):
        holder.kill()
        holder.wait()

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(run_folder, "time", clock)
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


def test_of_several_processes_the_first_holds_it_until_the_others_know_of_an_error(
    tmp_path, impatient, monkeypatch
):
    """They may write meanwhile."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "on_first", lambda function: function())
    monkeypatch.setattr(run_folder, "UNTIL_EXIT", kept := [])
    with run_folder.held(tmp_path):
        pass
    with pytest.raises(KeyError), run_folder.held(tmp_path):
        raise KeyError
    with pytest.raises(UserError, match="is at work"), run_folder.held(tmp_path):
        raise AssertionError
    kept[0].close()
    with run_folder.held(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_where_there_are_no_locks_a_line_says_so_and_trouble_is_an_error(
    number, tmp_path, monkeypatch, capsys
):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if number == errno.EIO:
        with pytest.raises(UserError, match="lock: Input/output error"), run_folder.held(tmp_path):
            raise AssertionError
        return
    with run_folder.held(tmp_path), run_folder.held(tmp_path):
        pass
    assert capsys.readouterr().err.count("lock: No locks available") == 2
