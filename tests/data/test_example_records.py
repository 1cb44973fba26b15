"""array_record files of tf.train.Example: what a record is, and what is refused."""

import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from mmgem_jax.data.broken import Broken
from mmgem_jax.data.example_records import ExampleRecords
from mmgem_jax.errors import UserError


def example(**fields):
    """An Example's bytes: lists of bytes, whole numbers or others."""
    made = tf_example_pb2.Example()
    for name, values in fields.items():
        feature = made.features.feature[name]
        kinds = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}
        if values:
            kinds[type(values[0])].value.extend(values)
    return made.SerializeToString()


def write(path, records):
    """A file of array_record, a record a chunk."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def test_records(tmp_path):
    full = example(image=[b"\xff\xd8"], tags=[b"a", b"b"], size=[3, -4], score=[0.5], none=[])
    paths = [
        write(tmp_path / "a.array_record", [full]),
        write(tmp_path / "b.array_record", [example(image=[b"2"]), b"\xff no Example"]),
    ]
    source = ExampleRecords(paths)
    assert len(source) == 3
    record = source[0]
    assert record.keys() == {"image", "tags", "size", "score", "none"}
    assert (record["image"], record["tags"], record["none"]) == (b"\xff\xd8", [b"a", b"b"], b"")
    np.testing.assert_array_equal(record["size"], np.array([3, -4]), strict=True)
    np.testing.assert_array_equal(record["score"], np.array([0.5], np.float32), strict=True)
    assert source.fields == record.keys()
    assert pickle.loads(pickle.dumps(source))[1] == source[1] == {"image": b"2"}
    with pytest.raises(Broken) as raised:
        source[2]
    assert raised.value.cause == "annotation"
    assert source.name_of(0) == f"{paths[0]} record 0"
    assert source.name_of(2) == f"{paths[1]} record 1"
    assert sorted(source.order(1)[i] for i in range(3)) == [0, 1, 2]


def test_a_record_whose_checksum_is_wrong(tmp_path):
    path = write(tmp_path / "a", [example(image=[b"first"]), example(image=[b"second"])])
    content = bytearray((tmp_path / "a").read_bytes())
    content[content.index(b"second")] ^= 1
    (tmp_path / "a").write_bytes(content)
    source = ExampleRecords([path])
    assert source[0] == {"image": b"first"}
    with pytest.raises(Broken, match=r"annotation: .*mismatch"):
        source[1]


def test_a_file_that_is_gone(tmp_path):
    paths = [write(tmp_path / name, [example(image=[b"1"])] * 2) for name in "ab"]
    source = pickle.loads(pickle.dumps(ExampleRecords(paths)))  # as a worker has it
    (tmp_path / "b").unlink()
    assert source[1] == {"image": b"1"}
    with pytest.raises(UserError, match=r"^.*/b: is gone since it was opened; expected a file of"):
        source[2]


def test_fields_are_those_of_all_parts_of_the_files(tmp_path):
    """Data sets are often joined one after the other."""
    records = [example(image=[b"1"], a=[1])] * 50 + [example(image=[b"2"], b=[2])] * 50
    source = ExampleRecords([write(tmp_path / "a", records)])
    assert source.fields == {"image", "a", "b"}


def test_refused_files(tmp_path):
    whole = write(tmp_path / "whole", [example(image=[b"1"])])
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:70_000])
    (tmp_path / "text").write_bytes(b"no such thing")
    for name in ("cut", "text", "absent"):
        with pytest.raises(UserError, match=f"/{name}: .*expected a whole file of array_record"):
            ExampleRecords([whole, str(tmp_path / name)])
    with pytest.raises(UserError, match=r"^s3://a: .*expected one of them"):
        ExampleRecords(["s3://a"])
    with pytest.raises(UserError, match="found no records in 1 files"):
        ExampleRecords([write(tmp_path / "empty", [])])
