"""The index of large files: made once, file by file, whatever ends the work or changes."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from kill_runs import processes_of

from mmgem_jax.data import record_index, tar_members
from mmgem_jax.data.record_index import RecordIndex
from mmgem_jax.errors import UserError

scanned = []  # paths


def scan(path):
    """A record for each byte of a file; a file named bad cannot be read."""
    scanned.append(path)
    if path.endswith("bad"):
        raise UserError(f"{path}: cannot be read")
    size = os.path.getsize(path)
    return [[place, 1] for place in range(size)], "is odd" if size % 2 else ""


@pytest.fixture
def made(tmp_path):
    """`made(*names)`: the index of files of 1, 2, ... bytes, and which were scanned for it."""

    def make(*names, folder=tmp_path / "index"):
        for size, name in enumerate(names, 1):
            if not (tmp_path / name).exists():
                (tmp_path / name).write_bytes(bytes(size))
        scanned.clear()
        index = RecordIndex([str(tmp_path / name) for name in names], scan, folder)
        return index, [path.removeprefix(f"{tmp_path}/") for path in scanned]

    return make


def test_places(made, tmp_path):
    index, _ = made("a", "b", "c")
    paths = [f"{tmp_path}/{name}" for name in "abc"]
    expected = [(path, place, 1) for size, path in enumerate(paths, 1) for place in range(size)]
    assert [index.place(number) for number in range(len(index))] == expected
    assert index.counts == [1, 2, 3] and index.damaged == dict.fromkeys(paths[::2], "is odd")


def test_files_are_scanned_once_and_only_what_changed_anew(made, tmp_path):
    assert made("a", "b", "c")[1] == ["a", "b", "c"]
    assert made("a", "b", "c")[1] == []
    (tmp_path / "b").write_bytes(bytes(5))
    index, anew = made("a", "b", "c")
    assert anew == ["b"] and index.counts == [1, 5, 3]
    # Other files beside them, or fewer.
    index, anew = made("c", "d", "a")
    assert anew == ["d"] and index.counts == [3, 2, 1]
    assert [made(name)[1] for name in "abcd"] == [[]] * 4


def test_what_was_found_is_kept_when_the_work_ends(made):
    with pytest.raises(UserError, match="bad: cannot be read"):
        made("a", "b", "bad", "c")
    index, anew = made("a", "b", "c")
    assert anew == ["c"] and index.counts == [1, 2, 4]


@pytest.mark.parametrize("kept", ["*.places", "*.json", "files/*"])
@pytest.mark.parametrize("cut", [0, -1])
def test_what_is_not_whole_is_not_believed(made, tmp_path, kept, cut):
    places = made("a", "b")[0].places.tolist()
    for path in (tmp_path / "index").glob(kept):
        path.write_bytes(path.read_bytes()[:cut])
    if kept == "files/*":
        for path in (tmp_path / "index").glob("*.json"):
            path.unlink()
    index, anew = made("a", "b")
    assert index.places.tolist() == places and anew == (["a", "b"] if kept == "files/*" else [])


@pytest.mark.parametrize("folder", ["gs://bucket/index", "file:///tmp/index"])
def test_a_folder_that_is_a_url(made, folder):
    with pytest.raises(UserError, match=rf"^data\.index_dir: {folder}; expected a folder here"):
        made("a", folder=folder)


def test_a_folder_that_cannot_be_written_to(made, tmp_path):
    with pytest.raises(UserError, match=r"^data\.index_dir: .*a.*expected a folder to write"):
        made("a", folder=tmp_path / "a" / "index")


def test_an_index_that_is_gone_before_a_worker_maps_it(made, tmp_path):
    index = pickle.loads(pickle.dumps(made("a")[0]))
    for path in (tmp_path / "index").glob("*.places"):
        path.unlink()
    with pytest.raises(UserError, match=r"^data\.index_dir: .*\.places: .*No such file.*expected"):
        index.place(0)


# ---- processes -----------------------------------------------------------------------------------


def test_many_files_are_shared_among_processes(tmp_path):
    """Whose scan is of a module that imports little."""
    paths = []
    for number in range(40):
        paths.append(str(tmp_path / f"{number:02}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for key in range(1 + number % 3):
                tar.addfile(tarfile.TarInfo(f"{key}.txt"))
    index = RecordIndex(paths, tar_members.scan, tmp_path / "index")
    assert index.counts == [1 + number % 3 for number in range(40)]
    assert [index.place(number)[:2] for number in range(3)] == [
        (paths[0], 0), (paths[1], 0), (paths[1], 512)
    ]  # fmt: skip


def test_a_process_that_dies_is_one_error(tmp_path):
    """Also while another waits for a file for good."""
    paths = [str(tmp_path / str(number)) for number in range(40)]
    for path in paths:
        os.mkfifo(path)
    killer = threading.Thread(target=kill_a_child)
    killer.start()
    with pytest.raises(UserError, match=r"^data\.files: a process that looks for .* died"):
        list(record_index.scanned(paths, tar_members.scan))
    killer.join()
    assert multiprocessing.active_children() == []


def kill_a_child():
    """Kills the first process that this one starts."""
    while not (found := multiprocessing.active_children()):
        time.sleep(0.01)
    time.sleep(0.3)  # till it has begun
    found[0].kill()


PROGRAM = """
import sys, time
from mmgem_jax.data import record_index, tar_members
from mmgem_jax.data.record_index import RecordIndex

def scan(path):
    print("scanning", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    RecordIndex(sys.argv[2:], scan, sys.argv[1])
"""


def test_processes_end_with_a_program_that_is_killed(tmp_path):
    paths = [tmp_path / str(number) for number in range(40)]
    for path in [*paths, tmp_path / "program.py"]:
        path.write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "index", *paths]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as program:
        try:
            assert program.stdout.readline() == b"scanning\n"
            program.kill()
            program.wait()
            end = time.monotonic() + 3
            while left := processes_of(program.pid):
                assert time.monotonic() < end, left
                time.sleep(0.01)
        finally:
            for number in processes_of(program.pid):
                os.kill(number, signal.SIGKILL)
