import json
import resource
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmgem_jax.errors import UserError
from mmgem_jax.metric_writer import MetricWriter


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, resume_step, *records, last_step=None):
    with MetricWriter(workdir, resume_step, last_step) as writer:
        for step, metrics in records:
            writer.write(step, metrics)


def events(workdir):
    """What is in the TensorBoard files, read from their bytes."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def scalars(workdir):
    """Every (tag, step, value) in them."""
    return [(v.tag, e.step, v.simple_value) for e in events(workdir) for v in e.summary.value]


def test_a_line_is_one_flat_object_with_the_step_first(tmp_path):
    write(tmp_path, 0, (3, {"train/loss": np.float32(0.1), "train/b": np.int32(2)}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 3, "train/loss": 0.10000000149011612, "train/b": 2.0}'
    write(tmp_path, 3, (4, {"eval/a": 1}))
    assert lines(tmp_path)[1] == {"step": 4, "eval/a": 1.0}


def test_tensorboard_has_the_same_values(tmp_path):
    write(tmp_path, 0, (1, {"train/loss": 0.25}), (2, {"train/loss": 0.1, "eval/t/r1": 1.0}))
    expected = [("train/loss", 1, 0.25), ("train/loss", 2, np.float32(0.1)), ("eval/t/r1", 2, 1.0)]
    assert scalars(tmp_path) == expected


def test_a_restart_within_a_second_keeps_what_tensorboard_has(tmp_path):
    write(tmp_path, 0, (1, {"train/loss": 0.25}))
    write(tmp_path, 1, (2, {"train/loss": 0.5}))
    assert scalars(tmp_path) == [("train/loss", 1, 0.25), ("train/loss", 2, 0.5)]


def test_tensorboard_is_told_from_where_on_it_is_written_again(tmp_path):
    write(tmp_path, 3, (4, {"train/loss": 0.5}))
    version, start, scalar = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, SessionLog.START)
    assert (
        scalar.step == 4 and min(e.wall_time for e in (version, start, scalar)) > time.time() - 60
    )


def test_tensorboard_itself_shows_the_last_of_what_was_written_twice(tmp_path):
    pytest.importorskip("tensorboard.backend")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, *[(step, {"train/loss": 1.0}) for step in range(1, 6)])
    write(tmp_path, 3, *[(step, {"train/loss": 2.0}) for step in range(4, 7)])
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(s.step, s.value) for s in shown] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_what_is_later_than_the_checkpoint_is_taken_back(tmp_path):
    write(tmp_path, 0, *[(step, {"train/loss": step}) for step in (2, 4, 6)], (4, {"eval/a": 1}))
    write(tmp_path, 4)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 4]
    write(tmp_path, 0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    write(tmp_path, 0, (2, {"train/loss": 0.5}), (4, {"train/loss": 0.25}))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[: -1 - cut])
    write(tmp_path, 4, (5, {"train/loss": 0.125}))
    assert [line["step"] for line in lines(tmp_path)] == [2, 5]


@pytest.mark.parametrize(
    "line", ['{"step": 2, "trai', "3", '{"a": 1}', '{"step": "2"}', "\0\0", "ÿ"]
)
def test_a_damaged_line_is_dropped_and_that_is_said(tmp_path, capfd, line):
    write(tmp_path, 0, (2, {"train/loss": 0.5}), (4, {"train/loss": 0.25}))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_bytes("\n".join([first, line, second, ""]).encode("latin-1"))
    write(tmp_path, 4, (5, {"train/loss": 0.125}))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    said = f"warning: {path} line 2: no metrics of a step; it is dropped\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(("full", "size"), [("metrics.jsonl", 900), ("tensorboard", 0)])
def test_a_full_disk_is_one_line_and_no_wait(tmp_path, capfd, full, size):
    """Events take more bytes than lines, which thus have to have some before."""
    if size:
        write(tmp_path, 0, (1, {"train/" + "x" * size: 1.0}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        expected = rf"^{tmp_path}/{full}: File too large; expected what can be written$"
        with pytest.raises(UserError, match=expected), MetricWriter(tmp_path, 1) as writer:
            for step in range(2, 1000):
                writer.write(step, {"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""
    write(tmp_path, 1, (2, {"a": 1.0}))
    assert lines(tmp_path)[-1] == {"step": 2, "a": 1.0}


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_cannot_be_opened_is_one_line(tmp_path, name):
    if name == "metrics.jsonl":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: .*; expected what can be written$"):
        write(tmp_path, 0)


def test_the_evaluation_at_the_end_is_written_again_not_twice(tmp_path):
    train, final = {"train/loss": 0.5}, {"eval/test/caption/token_f1": 0.5}
    write(tmp_path, 0, (4, final), (8, train), (8, final), last_step=8)
    write(tmp_path, 8, last_step=8)
    assert lines(tmp_path) == [{"step": 4} | final, {"step": 8} | train]
