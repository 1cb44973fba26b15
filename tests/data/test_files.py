"""Files here and remote, where a stand-in is gs://: patterns, what is read, what is refused."""

import io
import json
import os
import tarfile

import fsspec
import grain
import pytest
from fsspec.registry import _registry as PROTOCOLS  # register_implementation cannot be undone

from mmgem_jax.data import files
from mmgem_jax.data.json_lines import JsonLines
from mmgem_jax.data.tar_shards import TarShards
from mmgem_jax.errors import UserError

MOST = 1 << 20  # bytes


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder whose files are those of gs:// while the test runs."""
    folder = tmp_path / "bucket"
    folder.mkdir()

    class Bucket(fsspec.AbstractFileSystem):
        protocol = "gs"
        cachable = False

        def ls(self, path, detail=True, **kwargs):
            here = folder / self._strip_protocol(path)
            if not here.exists():
                raise FileNotFoundError(path)
            found = [here] if here.is_file() else sorted(here.iterdir())
            infos = [
                {
                    "name": one.relative_to(folder).as_posix(),
                    "size": one.stat().st_size,
                    "type": "file" if one.is_file() else "directory",
                    "updated": one.stat().st_mtime,
                }
                for one in found
            ]
            return infos if detail else [info["name"] for info in infos]

        def _open(self, path, mode="rb", **kwargs):
            return open(folder / path, mode)

    monkeypatch.setitem(PROTOCOLS, "gs", Bucket)
    return folder


def write_tar(path, samples):
    """A tar file of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# ---- patterns ------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    for name in ("00000.tar", "00001.tar", "00002.tar", "b.txt"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.tar"], ["00000.tar", "00001.tar", "00002.tar"]),
        (["{00000..00002}.tar"], ["00000.tar", "00001.tar", "00002.tar"]),
        (["0000{2,0}.tar"], ["00000.tar", "00002.tar"]),
        (["b.txt", "0000[12].tar"], ["00001.tar", "00002.tar", "b.txt"]),
        (["0000{0,1}.t?r", "00001.tar"], ["00000.tar", "00001.tar"]),
    ],
)
def test_patterns(shards, scheme, patterns, expected):
    found = files.expand([f"{scheme}{shards}/{pattern}" for pattern in patterns], "data.files")
    assert found == [f"{scheme}{shards}/{name}" for name in expected]


def test_a_file_by_two_names_is_one(shards, monkeypatch):
    monkeypatch.chdir(shards)
    names = ["./00000.tar", "00000.tar", ".//./00000.tar", "./0000[0].tar"]
    assert files.expand(names, "data.files") == ["00000.tar"]
    above = f"../{shards.name}"
    assert files.expand([f"{above}/*.txt"], "data.files") == [f"{above}/b.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.jsonl", r"^data\.files: .*/\*\.jsonl: found no such file"),
        ("{00001..00003}.tar", r"^data\.files: .*/00003\.tar: found no such file"),
        ("{00000..1", r"^data\.files: .*/\{00000\.\.1: .*expected a pattern"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_not_there(shards, scheme, pattern, message):
    with pytest.raises(UserError, match=message):
        files.expand([f"{scheme}{shards}/{pattern}"], "data.files")


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://a/b.tar", "data.files: s3://a/b.tar: .*s3fs"), ("xyz://a", "Protocol not known: xyz")],
)
def test_a_protocol_without_its_library(url, message):
    with pytest.raises(UserError, match=message):
        files.expand([url], "data.files")


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_parts_of_a_file(tmp_path, scheme):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    url = f"{scheme}{path}"
    assert files.read(url) == b"0123456789"
    assert files.read(url, 3, 6) == b"345"
    assert files.read(url, 8, 20) == b"89"
    with files.open_file(url) as file:
        file.seek(4)
        assert file.read(2) == b"45"
    before = files.stamps([url])
    os.utime(path, (1, 1))
    assert before != files.stamps([url]) == files.stamps([url])
    for absent in (f"{url}b", f"{url}/b", str(tmp_path), "a\0b", "x" * 5000, "xyz://a"):
        with pytest.raises(FileNotFoundError):
            files.read(absent)
    with pytest.raises(UserError, match="expected a file"):
        files.stamps([f"{url}b"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    """To open a pipe would be to wait for one who writes to it."""
    make(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar: is no regular file; expected a file"):
        files.stamps([f"{tmp_path}/a.tar"])


# ---- sources over them ---------------------------------------------------------------------------


def test_sources_in_a_bucket(bucket, tmp_path):
    write_tar(bucket / "0.tar", {"a/1.jpg": b"one", "a/1.txt": b"1", "a/2.jpg": b"two"})
    (bucket / "a").mkdir()
    (bucket / "a" / "x.jsonl").write_text('{"image": "i/1", "t": "e"}\n{"image": "gs://0.tar"}\n')
    (bucket / "a" / "i").mkdir()
    (bucket / "a" / "i" / "1").write_bytes(b"pixels")
    paths = files.expand(["gs://*.tar"], "data.files")
    assert paths == ["gs://0.tar"]
    source = TarShards(paths, tmp_path / "index", 4, 0, MOST)
    assert [source[i] for i in range(2)] == [{"image": b"one", "txt": b"1"}, {"image": b"two"}]
    assert source.name_of(1) == "gs://0.tar/a/2"
    paths = files.expand(["gs://a/{x,x}.jsonl"], "data.files")
    lines = JsonLines(paths, "image", tmp_path / "index", MOST)
    assert lines[0] == {"image": b"pixels", "t": "e"}
    assert lines[1]["image"] == (bucket / "0.tar").read_bytes()
    with pytest.raises(UserError, match=r"gs://nothing/1\.tar: found no such file"):
        files.expand(["gs://nothing/{1,2}.tar"], "data.files")


def test_worker_processes_read_through_fsspec(tmp_path):
    """Each maps the index and opens the files anew."""
    for shard in range(2):
        names = {f"{shard}{n}.jpg": f"{shard}-{n}".encode() for n in range(4)}
        write_tar(tmp_path / f"{shard}.tar", names)
        for name, content in names.items():
            (tmp_path / name).write_bytes(content)
    paths = files.expand([f"file://{tmp_path}/*.tar"], "data.files")
    tars = TarShards(paths, tmp_path / "index", 4, 0, MOST)
    listed = [json.dumps({"image": f"{s}{n}.jpg"}) for s in range(2) for n in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(listed))
    lines = JsonLines([f"file://{tmp_path}/a.jsonl"], "image", tmp_path / "index", MOST)
    expected = [f"{s}-{n}".encode() for s in range(2) for n in range(4)]
    datasets = [source.order(0)[:8].map(source.__getitem__) for source in (tars, lines)]
    dataset = grain.MapDataset.mix(datasets).to_iter_dataset(grain.ReadOptions(num_threads=0))
    found = [r["image"] for r in dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1))]
    assert sorted(found) == sorted(expected * 2)
    assert found == [record["image"] for record in dataset]
