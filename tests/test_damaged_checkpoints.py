"""Checkpoints whose files are not what was written: never a silently different state."""

import collections
import errno
import gc
import json
import random
import re
import shutil
import zlib

import grain
import jax
import jax.numpy as jnp
import many_hosts
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.checksums import checksums_on_host, fetched, start_checksums
from mmgem_jax.damage import TROUBLE, system_reason
from mmgem_jax.errors import UserError

ALIKE = settings(max_examples=60)
DTYPES = ("float32", "bfloat16", "int32", "bool")


def bits_of(array):
    return np.asarray(array).tobytes()


# ---- checksums -----------------------------------------------------------------------------------


def checksum(array):
    found = fetched(start_checksums({"x": array}))
    assert checksums_on_host({"x": array}) == found
    return found["x"]


def noise(dtype, shape, seed=0):
    """An array of random bits, as good as any; of bools, of both."""
    count = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    return (data % 2 if dtype == "bool" else data).view(jnp.dtype(dtype)).reshape(shape)


@ALIKE
@given(st.sampled_from(DTYPES[:3]), st.integers(0, 10**6), st.integers(0, 7))
def test_any_bit_that_flips_is_seen(dtype, byte, bit):
    array = noise(dtype, (35,))
    data = array.copy().view(np.uint8)
    data[byte % data.size] ^= 1 << bit
    assert checksum(array) != checksum(data.view(array.dtype))


@ALIKE
@given(st.sampled_from(DTYPES), st.integers(0, 34), st.integers(0, 34))
def test_any_two_elements_that_change_places_are_seen(dtype, one, other):
    """Also where values differ in few and high bits, as 1 and 2, and True and False, do."""
    few = np.resize(np.asarray([0, 1, 2, -1, 1.5]), 35)
    for array in (noise(dtype, (35,)), few.astype(jnp.dtype(dtype))):
        swapped = array.copy()
        swapped[[one, other]] = array[[other, one]]
        assert (checksum(array) == checksum(swapped)) == (bits_of(array) == bits_of(swapped))


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_count(dtype):
    array = noise(dtype, (8, 8))
    moved = [array.T, array[::-1], np.roll(array, 1, 0), np.roll(array, 1, 1), np.zeros_like(array)]
    assert len({checksum(x) for x in (array, *moved)}) == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_the_same_on_any_mesh(dtype):
    array = noise(dtype, (4, 6, 8))
    on_one, mesh = checksum(jax.device_put(array, jax.devices()[0])), tiny.mesh_of((2, 2, 2))
    specs = [(), ("fsdp",), (None, "tensor"), ("tensor", None, ("data", "fsdp"))]
    for spec in specs:
        sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert checksum(sharded) == on_one


def test_the_checksum_is_what_it_says():
    """Every word and its place through MurmurHash3's last step, one after the other in Python."""

    def mixed(word):
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    words = noise("int32", (3, 5)).view(np.uint32)
    total = sum(mixed((int(w) + i * 0x9E3779B9) % 2**32) for i, w in enumerate(words.ravel()))
    assert checksum(words.view(np.int32)) == total % 2**32
    assert checksum(np.zeros((0, 3), np.float32)) == 0
    assert checksum(np.int32(7)) == mixed(7)
    assert mixed(1) == 0x514E28B7  # of smhasher's fmix32


# ---- files ---------------------------------------------------------------------------------------


def make_state(step):
    """A state of every kind of leaf there is, and what describes it."""
    random = np.random.default_rng(step)
    state = {
        "kernel": jnp.asarray(random.standard_normal((4, 8)), jnp.float32),
        "bias": jnp.asarray(random.standard_normal(8), jnp.bfloat16),
        "mask": jnp.asarray(random.random(16) < 0.5),
        "step": jnp.int32(step),
    }
    state = jax.device_put(state, jax.devices()[0])
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    return state, jax.tree.map(describe, state)


def numbers():
    """A data iterator: 0, 1, 2, ..."""
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1, 2 and 3, each of its own state."""
    workdir, batches = tmp_path_factory.mktemp("saved"), numbers()
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2, 3):
            next(batches)
            checkpoints.save(step, make_state(step)[0], batches)
    return workdir / "checkpoints"


@pytest.fixture
def copied(saved, tmp_path):
    """`copied(*steps)`: a workdir of its own with those of the steps."""

    def copy(*steps):
        for step in steps:
            shutil.copytree(saved / str(step), tmp_path / "checkpoints" / str(step))
        return tmp_path

    return copy


def restored(workdir):
    """The step that is restored, after its state and position have been compared."""
    batches = numbers()
    with Checkpoints(workdir) as checkpoints:
        state, step = checkpoints.restore(make_state(1)[1], batches)
    for name, expected in make_state(step)[0].items():
        assert (name, state[name].dtype) == (name, expected.dtype)
        assert (name, bits_of(state[name])) == (name, bits_of(expected))
    assert next(batches) == step
    return step


def damage(path, chance):
    """Does something to a file; returns what."""
    data = bytearray(path.read_bytes())
    kind = chance.choice(["a flipped bit"] * 3 + ["cut", "gone", "zeros"])
    if kind == "a flipped bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "zeros":
        path.write_bytes(bytes(len(data)))
    else:
        path.unlink()
    return kind


def test_whatever_happens_to_a_file_no_other_state_comes_back(saved, tmp_path, capfd):
    """Each of 84 times a file of the only step; all are met seven times."""
    chance, outcomes = random.Random(0), collections.Counter()
    files = sorted(p.relative_to(saved / "2") for p in (saved / "2").rglob("*") if p.is_file())
    gc.freeze()  # so that looking for garbage after every error is quick
    for case in range(84):
        file, workdir = files[case % len(files)], tmp_path / str(case)
        folder = shutil.copytree(saved / "2", workdir / "checkpoints" / "2")
        kind = damage(folder / file, chance)
        try:
            assert restored(workdir) == 2, (file, kind)
            outcomes[file.name, "whole"] += 1
        except UserError as error:
            assert re.search(r"of \[2\] all damaged; the newest: .{5,130}$", str(error)), error
            outcomes[file.name, "damaged"] += 1
        assert folder.exists()
    gc.unfreeze()
    assert capfd.readouterr() == ("", "")
    assert outcomes["record.json", "whole"] == 0
    assert outcomes["_METADATA", "damaged"] >= 3
    assert sum(count for (_, end), count in outcomes.items() if end == "damaged") >= 20


def flip(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_states(workdir, one, other):
    """Exchanges the arrays of two steps: whole files, that orbax has nothing against."""
    folder = workdir / "checkpoints"
    (folder / str(one) / "state").rename(folder / "aside")
    (folder / str(other) / "state").rename(folder / str(one) / "state")
    (folder / "aside").rename(folder / str(other) / "state")


def test_the_step_before_is_used_and_the_damaged_one_is_moved_aside(copied, capfd):
    workdir = copied(1, 2, 3)
    swap_states(workdir, 2, 3)
    assert restored(workdir) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for step, line in zip((3, 2), lines, strict=True):
        reason = r"(bias|kernel|mask|step) is not what was saved"
        start = rf"warning: checkpoint {workdir}/checkpoints: step {step} is damaged \({reason}\); "
        end = rf"step 1 is used instead, and the damaged one is now {workdir}/damaged/{step}"
        assert re.fullmatch(start + end, line), line
    assert names_in(workdir / "checkpoints") == ["1"]
    assert names_in(workdir / "damaged") == ["2", "3"]
    assert names_in(workdir / "damaged" / "3") == names_in(workdir / "checkpoints" / "1")


def test_a_run_goes_on_over_a_step_that_was_damaged(copied):
    """The step that is moved aside is saved anew; its place there was taken already."""
    workdir, (state, abstract) = copied(1, 2), make_state(2)
    (workdir / "damaged" / "2").mkdir(parents=True)
    flip(workdir / "checkpoints" / "2" / "run" / "record.json")
    batches = numbers()
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.restore(abstract, batches)[1] == 1
        assert checkpoints.steps == [1]
        next(batches)
        checkpoints.save(2, state, batches)
    assert restored(workdir) == 2
    assert names_in(workdir / "damaged") == ["2", "2.1"]


def test_where_nothing_can_be_read_nothing_is_moved(copied):
    workdir = copied(1, 2)
    for step in ("1", "2"):
        (workdir / "checkpoints" / step / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"expected a whole step; of \[1, 2\] all damaged; the new"):
        restored(workdir)
    assert names_in(workdir) == ["checkpoints"]
    assert names_in(workdir / "checkpoints") == ["1", "2"]


def test_where_there_is_nothing_that_is_said(tmp_path):
    with pytest.raises(UserError, match=r"expected a whole step; of \[\] none$"):
        restored(tmp_path)


def test_a_record_of_another_step_is_not_taken(copied):
    workdir = copied(1, 2)
    (workdir / "checkpoints" / "1").rename(workdir / "checkpoints" / "5")
    with Checkpoints(workdir) as checkpoints, pytest.raises(UserError, match=r"\(it is step 1\)"):
        checkpoints.restore_params(make_state(1)[1], 5)


def test_a_record_that_was_changed_is_not_taken(copied):
    """Another position in the data, in sound JSON."""
    workdir = copied(1, 2)
    path = workdir / "checkpoints" / "2" / "run" / "record.json"
    text = path.read_text()
    assert '"next_index": 2' in text
    path.write_text(text.replace('"next_index": 2', '"next_index": 9'))
    assert restored(workdir) == 1


def test_a_part_that_is_damaged_is_one_line(copied):
    workdir, abstract = copied(1, 2, 3), make_state(3)[1]
    swap_states(workdir, 1, 3)
    kernel, mistake = {"kernel": abstract["kernel"]}, r"is damaged \(kernel is not what was saved\)"
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(UserError, match=f"step 3 {mistake}; the one before it is .*points/2$"):
            checkpoints.restore_params(kernel)
        with pytest.raises(UserError, match=f"step 1 {mistake}; there is none before it$"):
            checkpoints.restore_params(kernel, 1)
        with pytest.raises(UserError, match=r"no such complete step; there are \[1, 2, 3\]$"):
            checkpoints.restore_params(kernel, 4)
        found = checkpoints.restore_params(kernel, 2)["kernel"]
    assert bits_of(found) == bits_of(make_state(2)[0]["kernel"])


DISK = "Input/output error"


def caused(error, cause=None, context=None):
    """An error that was raised from another one, or while another one was handled."""
    error.__cause__, error.__context__ = cause, cause or context
    return error


@pytest.mark.parametrize(
    ("item", "error", "reason"),
    [
        ("run", OSError(errno.EIO, DISK), DISK),
        ("state", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "RESOURCE_.*9 bytes"),
    ],
)
def test_what_the_system_says_is_no_damage_and_moves_nothing(
    copied, monkeypatch, item, error, reason
):
    workdir, load = copied(1, 2), Checkpoints.load

    def failing(self, step, items, partial=False):
        if step == 2 and item in items:
            raise error
        return load(self, step, items, partial)

    monkeypatch.setattr(Checkpoints, "load", failing)
    expected = f"^checkpoint {workdir}/checkpoints: step 2: {reason}; nothing was moved; expected"
    with pytest.raises(UserError, match=expected):
        restored(workdir)
    if item == "run":
        with pytest.raises(UserError, match=expected):  # else it would not be known for the best
            Checkpoints(workdir, best="loss")
    assert names_in(workdir) == ["checkpoints"]
    assert names_in(workdir / "checkpoints") == ["1", "2"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (caused(ValueError("no array"), OSError(errno.ESTALE, "x")), "Stale file handle"),
        (ValueError("NOT_FOUND: d: [OS error 13: EACCES Permission denied]"), "Permission denied"),
        (caused(ValueError("no array"), ValueError(f"read: {DISK} [source")), DISK),
        (caused(ValueError("no array"), context=OSError(errno.EIO, DISK)), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (OSError(errno.ETIMEDOUT, "x"), "Connection timed out"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_which_errors_are_the_systems(error, reason):
    assert system_reason(error, TROUBLE) == reason


def test_a_step_of_an_earlier_version_is_called_that_and_is_not_moved(copied):
    workdir = copied(1, 2)
    step = workdir / "checkpoints" / "2"
    (step / "run").rename(step / "data")
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"run"', '"data"'))
    with pytest.raises(UserError, match=r"step 2 was written by an earlier .*\['data', 'state'\];"):
        restored(workdir)
    assert names_in(workdir) == ["checkpoints"]


def test_a_step_that_was_deleted_by_half_is_damaged(copied):
    workdir = copied(1, 2)
    shutil.rmtree(workdir / "checkpoints" / "2" / "run")
    assert restored(workdir) == 1


def test_a_part_is_checked_alone(copied):
    """A wrong checksum of one array does not keep another from being read."""
    workdir, abstract = copied(2), make_state(2)[1]
    path = workdir / "checkpoints" / "2" / "run" / "record.json"
    record = json.loads(path.read_text().partition(" ")[2])
    record["arrays"]["mask"]["checksum"] ^= 1
    text = json.dumps(record)
    path.write_text(f"{zlib.crc32(text.encode()):08x} {text}")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.restore_params({"kernel": abstract["kernel"], "step": abstract["step"]})
        with pytest.raises(UserError, match="mask is not what was saved"):
            checkpoints.restore_params({"mask": abstract["mask"]})


# ---- several processes ---------------------------------------------------------------------------

PROGRAM = """
import argparse, errno, pathlib, shutil
import grain, jax, numpy as np
from ml_collections import ConfigDict
from mmgem_jax import processes, sharding
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.errors import UserError

parser = argparse.ArgumentParser()
processes.add_arguments(parser)
args = parser.parse_args()
with processes.joined(args.coordinator, args.process_id, args.process_count):
    mesh = sharding.make_mesh(ConfigDict(dict(slice=1, data=1, fsdp=2, tensor=1)))
    batches = iter(grain.MapDataset.range(100).to_iter_dataset())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    make = jax.jit(lambda x: {"x": x + jax.numpy.arange(8)}, out_shardings={"x": rows})
    with Checkpoints("run") as checkpoints:
        for step in (1, 2, 3):
            next(batches)
            checkpoints.save(step, make(step), batches)
    load, reads = Checkpoints.load, []

    def failing(self, step, items, partial=False):
        reads.append(step)
        if step == 3 and "state" in items and jax.process_index() == 1:
            raise ValueError("what one host has in its cache")
        return load(self, step, items, partial)

    def exchange():
        shutil.rmtree("run/checkpoints/2/state")
        shutil.copytree("run/checkpoints/1/state", "run/checkpoints/2/state")

    Checkpoints.load = failing
    processes.on_first(exchange)
    with Checkpoints("run") as checkpoints:
        found, step = checkpoints.restore(make(0), batches)
        own = np.asarray(found["x"].addressable_shards[0].data).tolist()
        outcome = step, own, next(batches), checkpoints.steps, reads
        second, said = jax.process_index() == 1, []

        def offline(self, step, items, partial=False):
            if second:
                raise OSError(errno.EIO, "Input/output error")
            return load(self, step, items, partial)

        Checkpoints.load = offline
        try:
            checkpoints.restore(make(0), batches)
        except UserError as error:
            said.append(str(error).partition("/checkpoints: ")[2])
    if second:
        Checkpoints.steps = property(lambda self: [])
    try:
        Checkpoints("run")
    except UserError as error:
        said.append(str(error).partition("run/")[2])
    outcome += (said,)
    pathlib.Path(f"found.{jax.process_index()}").write_text(repr(outcome))
"""


def test_all_processes_come_to_the_same_step(tmp_path):
    """One of two cannot make sense of step 3, and step 2 has the arrays of step 1.

    Then one of them cannot read at all; and it sees no step where the other sees one.
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    done, seconds = many_hosts.run_processes([["program.py"]] * 2, 1, tmp_path)
    assert [process.returncode for process in done] == [0, 0], done
    first = ["step 1: process 1 cannot read it; expected all to"]
    second = ["step 1: Input/output error; nothing was moved; expected to read it"]
    second += [
        "checkpoints: not the same in process 1 as in the first; expected one command, one config "
        "and the same files on every host"
    ]
    for process, own, said in ((0, [1, 2, 3, 4], first), (1, [5, 6, 7, 8], second)):
        expected = 1, own, 1, [1], [3, 3, 2, 2, 1, 1], said
        assert (tmp_path / f"found.{process}").read_text() == repr(expected)
    lines = [line for line in done[0].stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    assert "step 3 is damaged (process 1 cannot read it); step 1 is used" in lines[0]
    assert "step 2 is damaged (x is not what was saved); step 1 is used" in lines[1]
    assert names_in(tmp_path / "run" / "damaged") == ["2", "3"]
    assert seconds < 150  # of orbax's barriers one takes 300 to give up
