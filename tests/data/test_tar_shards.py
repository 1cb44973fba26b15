"""Tar files as records: WebDataset's samples, hostile members, damage of any kind, the index."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmgem_jax.data.broken import Broken
from mmgem_jax.data.tar_members import Guarded
from mmgem_jax.data.tar_shards import TarShards
from mmgem_jax.errors import UserError


def add(tar, name, content=b"", **changes):
    """Adds a member; `changes` are of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in changes.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def write(path, members, **options):
    """A tar file of (name, bytes) pairs."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            add(tar, name, content)
    return str(path)


def sample(key, size=700):
    """The members of a sample as img2dataset writes them."""
    caption = json.dumps({"caption": f"of {key}", "width": 3})
    pixels = key.encode() * (size // len(key))
    return [(f"{key}.jpg", pixels), (f"{key}.txt", key.encode()), (f"{key}.json", caption.encode())]


def record(key, size=700):
    """What `sample` is as a record."""
    return {
        "image": key.encode() * (size // len(key)),
        "txt": key.encode(),
        "json": {"caption": f"of {key}", "width": 3},
    }


def opened(paths, folder, most=0.0):
    """A source of tar files whose index is made in that folder."""
    return TarShards([str(path) for path in paths], str(folder), 4, most, 1 << 20)


def records(source):
    """All records of a source."""
    return [source[number] for number in range(len(source))]


# ---- samples -------------------------------------------------------------------------------------


def test_samples_of_several_files(tmp_path):
    keys = ["000000", "000001", "000002"]
    first = write(tmp_path / "a.tar", [m for key in keys for m in sample(key)])
    others = [("x/y.PNG", b"p"), ("x/y.cls.txt", b"2")]
    second = write(tmp_path / "b.tar", [*sample("000000"), *others])
    source = opened([first, second], tmp_path / "index")
    expected = [*map(record, keys), record("000000"), {"image": b"p", "cls.txt": b"2"}]
    assert records(source) == expected
    assert source.fields == {"image", "txt", "json", "cls.txt"}
    assert source.damaged == []
    assert [source.name_of(i) for i in (1, 3, 4)] == [
        f"{first}/000001", f"{second}/000000", f"{second}/x/y"
    ]  # fmt: skip
    assert records(pickle.loads(pickle.dumps(source))) == expected
    assert "places" not in vars(pickle.loads(pickle.dumps(source)).index)  # each worker's own
    assert sorted(source.order(0)[i] for i in range(5)) == list(range(5))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, format):
    """Of all formats of tar, with long names, folders, dots and members that are no sample's."""
    long = "folder.of.dots/" + "n" * 90
    names = [
        "a.jpg",
        "a.txt",
        "b.txt",
        "d/b.jpg",
        "d/b.txt",
        "b.seg.png",
        ".hidden",
        "noext",
        "b.TXT",
    ]
    members = [(name, name.encode()) for name in names]
    if format != tarfile.USTAR_FORMAT:
        long += "m" * 200 + "é"
    members += [(f"{long}.jpg", b"image"), (f"{long}.txt", b"text"), ("c/d/e.webp", b"")]
    path = write(tmp_path / "a.tar", members, format=format)
    theirs = []
    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": path, "stream": stream}])
        their_samples = list(group_by_keys(files))
    for found in their_samples:
        fields = {k: v for k, v in found.items() if not k.startswith("__")}
        image = next((k for k in fields if k in ("jpg", "png", "webp")), None)
        ours = {("image" if k == image else k): v for k, v in fields.items()}
        theirs.append((f"{path}/{found['__key__']}", ours))
    source = opened([path], tmp_path / "index")
    ours = [(source.name_of(i), source[i]) for i in range(len(source))]
    assert ours == theirs and len(ours) == 6


def test_the_first_of_what_comes_twice_is_taken(tmp_path):
    members = [("a.jpg", b"1"), ("a.png", b"2"), ("a.txt", b"3"), ("a.txt", b"4")]
    source = opened([write(tmp_path / "a.tar", members)], tmp_path / "index")
    assert records(source) == [{"image": b"1", "txt": b"3"}]


def test_what_a_sample_lacks_is_not_in_its_record(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("b.txt", b"2"),
        ("c.json", b"[]"),
        ("d.json", b"{"),
        ("e.txt", b""),
    ]
    source = opened([write(tmp_path / "a.tar", members)], tmp_path / "index")
    assert [source[i] for i in (0, 1, 4)] == [{"image": b"1"}, {"txt": b"2"}, {"txt": b""}]
    for number in (2, 3):
        with pytest.raises(Broken, match=r"^annotation: "):
            source[number]


# ---- hostile members -----------------------------------------------------------------------------


def test_hostile_members_are_keys_and_nothing_else(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"not to be seen")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with tarfile.open(work / "a.tar", "w") as tar:
        add(tar, "/absolute/a.jpg", b"1")
        add(tar, "../../b.jpg", b"2")
        add(tar, "c.jpg", b"3")
        add(tar, "c.txt", type=tarfile.SYMTYPE, linkname=str(secret))
        add(tar, "c.caption", type=tarfile.LNKTYPE, linkname="../secret.txt")
        add(tar, "c.null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add(tar, "c.pipe", type=tarfile.FIFOTYPE)
        add(tar, "c.d", type=tarfile.DIRTYPE)
        # 64 GiB of nothing, in half a kilobyte.
        sparse = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 36)}
        add(tar, "c.sparse", pax_headers={**sparse, "GNU.sparse.name": "c.sparse"})
        add(tar, "d\udcff\n.jpg", b"4")
    before = sorted(tmp_path.rglob("*"))
    source = opened(["a.tar"], work / "index")
    assert records(source) == [{"image": bytes([c])} for c in b"1234"]
    names = [source.name_of(number) for number in range(4)]
    assert names[:3] == ["a.tar//absolute/a", "a.tar/../../b", "a.tar/c"]
    assert names[3].encode() and "xff" in names[3]  # can be printed
    new = {path for path in tmp_path.rglob("*") if path not in before}
    assert {path.relative_to(work).parts[0] for path in new} == {"index"}


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40), 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_sizes_that_cannot_be(tmp_path, kind, size):
    """Python's tarfile went in a circle of a negative one (CVE-2025-8194)."""
    header = tarfile.TarInfo("b.jpg")
    header.type, header.size = kind, size
    bad = header.tobuf(tarfile.GNU_FORMAT)
    good = Path(write(tmp_path / "good.tar", sample("a"))).read_bytes()
    whole = good[: -(-(512 * 3 + 1024 + 512 * 2) // 512) * 512]
    (tmp_path / "a.tar").write_bytes(whole + bad + bytes(2048))
    source = opened([tmp_path / "a.tar"], tmp_path / "index", most=1)
    assert source[0] == record("a") and source.damaged == [str(tmp_path / "a.tar")]


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory):
    """The bytes of a tar file of four samples, their keys, and where each sample ends."""
    keys = ["a", "b", "c", "d"]
    path = tmp_path_factory.mktemp("small") / "a.tar"
    write(path, [m for key in keys for m in sample(key)])
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith(".json")]
    return path.read_bytes(), keys, ends


@settings(max_examples=60)
@given(st.data())
def test_a_cut_file_gives_all_before_the_cut(small_tar, tmp_path_factory, data):
    content, keys, ends = small_tar
    edges = [edge + shift for edge in ends for shift in (-1, 0, 1, 500, 1024)]
    cut = data.draw(st.integers(0, len(content)) | st.sampled_from(edges))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.tar").write_bytes(content[:cut])
    whole = [record(key) for key, end in zip(keys, ends, strict=True) if end <= cut]
    try:
        source = opened([folder / "a.tar"], folder / "index", most=1)
    except UserError as error:
        assert "found no records" in str(error) and not whole
        return
    assert records(source)[: len(whole)] == whole
    # Of the one that is cut, no member that is not whole.
    for found in records(source)[len(whole) :]:
        assert found.items() <= record(keys[len(whole)]).items()
    # Behind the last member are 512 zeros, the end, and then more of them.
    assert (source.damaged == []) == (cut >= -(-ends[-1] // 512) * 512 + 512)


SPOILT = st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=12))


@settings(max_examples=120)
@given(spoilt=st.lists(SPOILT, min_size=1, max_size=4), again=st.booleans())
def test_whatever_is_in_a_file_it_is_read_or_refused(small_tar, tmp_path_factory, spoilt, again):
    content = bytearray(small_tar[0])
    for place, new in spoilt:
        place %= len(content)
        content[place : place + len(new)] = new
    if again:  # a header whose checksum is right, whatever it says
        header = content[: tarfile.BLOCKSIZE]
        checksum = tarfile.calc_chksums(bytes(header))[0]
        content[148:156] = b"%06o\0 " % checksum
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "a.tar").write_bytes(content)
    before = sorted(os.listdir(folder))
    try:
        source = opened([folder / "a.tar"], folder / "index", most=1)
    except UserError:
        return
    for number in range(len(source)):
        assert source.name_of(number)
        try:
            assert isinstance(source[number], dict)
        except Broken as error:
            assert error.cause == "annotation"
    assert sorted(os.listdir(folder)) == [*before, "index"]


def test_damaged_files_are_named_up_to_a_share(tmp_path, capsys):
    paths = [write(tmp_path / f"{n}.tar", sample(f"{n}")) for n in range(4)]
    content = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(content[:2048])
    Path(paths[3]).write_bytes(b"<html>no tar</html>" * 100)
    source = opened(paths, tmp_path / "index", most=0.5)
    assert source.damaged == [paths[1], paths[3]]
    assert [found.get("txt") for found in records(source)] == [b"0", None, b"2"]
    printed = capsys.readouterr().out
    assert printed.startswith("data.files: 2 of 4 tar files are damaged") and paths[3] in printed
    with pytest.raises(UserError, match=r"2 of 4 .*1\.tar \(unexpected end.*share of 0\.49"):
        opened(paths, tmp_path / "index", most=0.49)


def test_a_sample_that_is_too_large_is_broken_without_a_read(tmp_path):
    path = write(tmp_path / "a.tar", [*sample("a"), ("b.jpg", bytes(1 << 20)), *sample("c")])
    source = opened([path], tmp_path / "index")
    assert (source[0], source[2]) == (record("a"), record("c"))
    os.unlink(path)
    with pytest.raises(Broken, match=r"^bytes: 1049088, of at most 1048576"):
        source[1]
    assert source.name_of(1) == f"{path}, byte 3584"


def test_fields_are_those_of_all_parts_of_the_files(tmp_path):
    """Data sets are often joined one after the other."""
    first = write(tmp_path / "a.tar", [(f"{n}.jpg", b"1") for n in range(60)])
    second = write(tmp_path / "b.tar", [(f"{n}.cls", b"2") for n in range(9)])
    assert opened([first, second], tmp_path / "index").fields == {"image", "cls"}


def test_a_file_that_cannot_seek_is_an_error_of_the_user():
    reader, writer = os.pipe()
    os.close(writer)
    message = r"^a\.tar: .*seek.*; expected a tar file"
    with os.fdopen(reader, "rb") as file, pytest.raises(UserError, match=message):
        Guarded("a.tar", file)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_files(tmp_path, compression):
    with tarfile.open(tmp_path / "a.tar", f"w:{compression}") as tar:
        add(tar, "a.jpg", b"1")
    with pytest.raises(UserError, match=r"a\.tar: is compressed; expected a plain tar"):
        opened([tmp_path / "a.tar"], tmp_path / "index")
    assert os.listdir(tmp_path / "index" / "files") == []


def test_a_window_of_none(tmp_path):
    with pytest.raises(UserError, match=r"^data\.window: 0; expected at least 1"):
        TarShards([write(tmp_path / "a.tar", sample("a"))], tmp_path / "index", 0, 0, 1 << 20)


def test_no_samples(tmp_path):
    path = write(tmp_path / "a.tar", [("readme", b"1")])
    with pytest.raises(UserError, match=r"^data\.files: found no records in 1 files"):
        opened([path], tmp_path / "index")


def test_files_that_change_under_a_run(tmp_path):
    path = tmp_path / "a.tar"
    write(path, sample("a"))
    source = opened([path], tmp_path / "index")
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    with pytest.raises(Broken, match=r"^annotation: "):
        source[0]
    assert source.name_of(0) == f"{path}, byte 0"
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"a\.tar: is shorter than it was"):
        source[0]
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar: is gone"):
        source[0]
