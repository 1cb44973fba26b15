"""JSON lines with image paths: what a record is, which lines are broken, which file is missed."""

import http.server
import json
import os
import pickle
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.json_lines import JsonLines
from mmgem_jax.errors import UserError

MOST = 1 << 14  # bytes


@pytest.fixture
def source_of(tmp_path):
    """`source_of(*lines)`: the source of a file with these lines, as bytes, beside an image."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"pixels")

    def make(*lines):
        path = tmp_path / "train.jsonl"
        path.write_bytes(b"\n".join(lines))
        return JsonLines([str(path)], "picture", str(tmp_path / "index"), MOST)

    return make


def test_records(source_of, tmp_path):
    absolute = json.dumps({"picture": str(tmp_path / "images" / "1.png"), "tags": ["a", "b"]})
    url = json.dumps({"picture": f"file://{tmp_path}/images/1.png", "n": 3})
    relative = json.dumps({"picture": "images/1.png", "caption": "Ä"}, ensure_ascii=False)
    source = source_of(relative.encode() + b"\r", b"", absolute.encode(), url.encode(), b"", b"{}")
    assert len(source) == 4
    assert source[0] == {"picture": b"pixels", "caption": "Ä"}
    assert source[1] == {"picture": b"pixels", "tags": ["a", "b"]}
    assert source[2] == {"picture": b"pixels", "n": 3}
    assert source[3] == {}
    assert source.fields == {"picture", "caption", "tags", "n"}
    assert [source.name_of(i) for i in range(4)] == [
        f"{tmp_path}/train.jsonl line {n}" for n in (1, 3, 4, 6)
    ]
    assert sorted(source.order(0)[i] for i in range(4)) == [0, 1, 2, 3]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(4)] == [source[i] for i in range(4)]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b"[1]", "annotation"),
        (b"{", "annotation"),
        (b'{"caption": "\xff"}', "annotation"),
        (b"[" * 10_000, "annotation"),
        (b'{"n": ' + b"9" * 5000 + b"}", "annotation"),
        (b'{"picture": 7}', "annotation"),
        (b'{"picture": "images/2.png"}', "missing_file"),
        (b'{"picture": "images"}', "missing_file"),
        (b'{"picture": ""}', "missing_file"),
        (b'{"picture": "a\\u0000b"}', "missing_file"),
        (b'{"picture": "what://is/this"}', "missing_file"),
        (b'{"picture": "gs://elsewhere/1.png"}', "missing_file"),  # would ask for a login
        (b'{"picture": "simplecache::https://host/1.png"}', "missing_file"),
        (b'{"picture": "https://host::memory://1.png"}', "missing_file"),
        (b'{"picture": "images/pipe"}', "missing_file"),
        (b'{"picture": "/dev/zero"}', "missing_file"),
        (b'{"picture": "file:///dev/zero"}', "missing_file"),
        (b'{"picture": "images/large.png"}', "bytes"),
        (b'{"text": "' + b"long" * MOST + b'"}', "bytes"),
    ],
)
def test_broken_lines(source_of, tmp_path, line, cause):
    source = source_of(b'{"picture": "images/1.png"}', line)
    assert source[0] == {"picture": b"pixels"}
    os.mkfifo(tmp_path / "images" / "pipe")
    with open(tmp_path / "images" / "large.png", "wb") as file:
        file.truncate(MOST + 1)
    with pytest.raises(Broken) as raised:
        source[1]
    assert raised.value.cause == cause


class Server(http.server.BaseHTTPRequestHandler):
    """A path is the status of the answer, or how many bytes are sent."""

    def do_GET(self):
        number = int(self.path.strip("/"))
        status, size = (200, number - 1000) if number >= 1000 else (number, 0)
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(bytes(size))

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def web(monkeypatch):
    """The URL of a server on this machine; between requests that fail no one waits."""
    monkeypatch.setattr(files, "WAITS", (0, 0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_images_of_the_web(source_of, web):
    with socket.create_server(("127.0.0.1", 0)) as none:
        closed = f"http://127.0.0.1:{none.getsockname()[1]}/1"
    nowhere = "http://no.such.host.invalid/1"
    refused = [f"{web}/{status}" for status in (403, 404, 410, 416, 429)] + [closed, nowhere]
    urls = [f"{web}/1007", *refused, f"{web}/{1000 + MOST + 1}", f"{web}/503"]
    source = source_of(*(json.dumps({"picture": url}).encode() for url in urls))
    assert source[0] == {"picture": bytes(7)}
    for number in range(1, 1 + len(refused)):
        with pytest.raises(Broken, match=r"^missing_file: http://"):
            source[number]
    with pytest.raises(Broken, match=r"^bytes: http://"):
        source[len(urls) - 2]
    with pytest.raises(UserError, match=r"/503: ClientResponseError: 503"):
        source[len(urls) - 1]


def test_files_run_on(tmp_path):
    for name, count in (("a", 3), ("b", 0), ("c", 2)):
        lines = [json.dumps({"caption": f"{name}{n}"}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    source = JsonLines(paths, "image", tmp_path / "index", MOST)
    assert [source[i]["caption"] for i in range(5)] == ["a0", "a1", "a2", "c0", "c1"]
    assert source.name_of(4) == f"{paths[2]} line 2"


def test_a_file_that_is_gone(source_of, tmp_path):
    source = source_of(b"{}", b"{}")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl: is gone"):
        source[0]
    assert source.name_of(1) == f"{tmp_path}/train.jsonl, byte 3"
    with pytest.raises(UserError, match=r"train\.jsonl: .*expected a file"):
        JsonLines([str(tmp_path / "train.jsonl")], "image", tmp_path / "index", MOST)


def test_no_lines(source_of):
    with pytest.raises(UserError, match=r"^data\.files: found no records"):
        source_of(b"", b"  ")


@settings(max_examples=40)
@given(lines=st.lists(st.binary(max_size=30), min_size=1, max_size=6))
def test_whatever_is_in_a_file(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(b"{}\n" + b"\n".join(lines))
    source = JsonLines([str(folder / "a.jsonl")], "image", folder, MOST)
    written = (folder / "a.jsonl").read_bytes().split(b"\n")
    assert len(source) == sum(bool(line.strip()) for line in written)
    for number in range(len(source)):
        try:
            assert isinstance(source[number], dict)
        except Broken:
            continue
