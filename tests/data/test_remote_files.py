"""Remote files that fail, refuse, or send too much; and how little of them is fetched."""

import io
import os
import tarfile

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry as PROTOCOLS  # register_implementation cannot be undone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.tar_members import scan
from mmgem_jax.errors import UserError

# ---- answers -------------------------------------------------------------------------------------


class Answers(fsspec.AbstractFileSystem):
    """Remote files that are what is in `coming`, one after the other: bytes or an error."""

    protocol = "answers"
    cachable = False
    coming: list

    def cat_file(self, path, start=None, end=None, **kwargs):
        answer = self.coming.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def info(self, path, **kwargs):
        return {"name": path, "size": self.cat_file(path), "type": "file"}


@pytest.fixture
def answers(monkeypatch):
    """`answers(*coming)`: what answers:// says next; returns the waits between, which are none."""
    waits = []
    monkeypatch.setitem(PROTOCOLS, "answers", Answers)
    monkeypatch.setattr(files.time, "sleep", waits.append)

    def set_up(*coming):
        Answers.coming = list(coming)
        waits.clear()
        return waits

    return set_up


class Refusal(Exception):
    """As aiohttp's."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


def test_a_remote_file_that_fails_is_asked_for_again(answers):
    waits = answers(ConnectionError("first"), TimeoutError("second"), b"content")
    assert files.read("answers://a") == b"content" and waits == [0.5, 2.0]
    waits = answers(*[ConnectionError("no network\nat all")] * 3)
    with pytest.raises(UserError, match=r"^answers://a: ConnectionError: no network; expected"):
        files.read("answers://a")
    assert waits == [0.5, 2.0]
    waits = answers(ConnectionError("first"), 3)
    assert files.stamps(["answers://a"]) == [[3, ""]] and waits == [0.5]


@pytest.mark.parametrize(
    ("error", "times", "kind"),
    [
        (FileNotFoundError("a"), 1, FileNotFoundError),
        (PermissionError("a"), 1, FileNotFoundError),
        (Refusal(416), 1, FileNotFoundError),  # an empty file
        (Refusal(403), 1, files.Unreachable),
        (Refusal(429), 3, files.Unreachable),
        (Refusal(503), 3, UserError),
        (ImportError("no library"), 1, UserError),
    ],
)
def test_what_an_error_of_a_remote_file_is(answers, error, times, kind):
    answers(*[error] * 3)
    with pytest.raises((FileNotFoundError, UserError)) as raised:
        files.read("answers://a", 0, 9)
    assert type(raised.value) is kind and len(Answers.coming) == 3 - times


def test_a_server_that_sends_all_of_a_file_instead_of_a_part_is_refused(answers):
    answers(b"0123456789", b"0123456789")
    with pytest.raises(UserError, match=r"^answers://a: answers with more bytes than asked"):
        files.read("answers://a", 2, 5)
    assert files.read("answers://a", 0, 10) == b"0123456789"


def test_a_file_of_unknown_size_is_refused(answers):
    answers(None)
    with pytest.raises(UserError, match=r"^answers://a: is of unknown size; expected a server"):
        files.open_file("answers://a")


def test_a_whole_file_is_of_so_many_bytes_at_most(tmp_path, answers):
    path = tmp_path / "a"
    for size, kept in ((0, b""), (10, bytes(10)), (11, None), (1 << 40, None)):
        with open(path, "wb") as file:
            file.truncate(size)
        answers(bytes(min(size, 11)))  # no more is asked for
        for name in (str(path), "answers://a"):
            if kept is None:
                with pytest.raises(Broken, match=r"^bytes: .*more than 10 bytes"):
                    files.read_whole(name, 10)
            else:
                assert files.read_whole(name, 10) == kept


# ---- how much of a remote file is fetched --------------------------------------------------------


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Sizes of what was fetched, one a request, from the local files counted://."""
    sizes = []

    class Counted(LocalFileSystem):
        protocol = "counted"
        cachable = False

        def cat_file(self, path, start=None, end=None, **kwargs):
            content = super().cat_file(path, start, end, **kwargs)
            sizes.append(len(content))
            return content

    monkeypatch.setitem(PROTOCOLS, "counted", Counted)
    return sizes


@pytest.mark.parametrize(
    ("size", "share", "requests"),
    [
        (400_000, 0.1, 2.0),  # bytes of a member; most of the file; most requests a member
        (1_000, 1.1, 0.05),
        (50_000, 1.1, 0.2),
    ],
)
def test_of_large_members_little_more_than_the_headers_is_fetched(
    tmp_path, fetched, size, share, requests
):
    count = 4_000_000 // size
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    expected = scan(f"{tmp_path}/a.tar")
    assert scan(f"counted://{tmp_path}/a.tar") == expected and len(expected[0]) == count
    assert sum(fetched) < share * (tmp_path / "a.tar").stat().st_size
    assert len(fetched) < requests * count


def test_lines_are_fetched_many_at_once(tmp_path, fetched):
    lines = [b"%d" % n * (n % 97) for n in range(100_000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with files.open_file(f"counted://{tmp_path}/a.jsonl") as file:
        assert file.read().split(b"\n") == lines
    size = (tmp_path / "a.jsonl").stat().st_size
    assert sum(fetched) == size and len(fetched) < 8 + size / (1 << 20)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 20_000)), max_size=9))
def test_a_remote_file_is_read_as_a_local_one(tmp_path, fetched, reads):
    path = tmp_path / "a"
    if not path.exists():
        path.write_bytes(np.random.default_rng(0).bytes(30_000))
    with files.open_file(f"counted://{path}") as remote, open(path, "rb") as local:
        for position, count in reads:
            assert remote.seek(position) == local.seek(position)
            assert remote.read(count) == local.read(count)
        assert remote.seek(0, os.SEEK_END) == 30_000
