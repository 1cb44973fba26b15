"""TFDS data sets whose files are spoilt, or vanish, under a run."""

import pickle

import pytest
import tensorflow_datasets as tfds
import tfds_copy
from ml_collections import ConfigDict

from mmgem_jax.data.broken import Broken
from mmgem_jax.data.tfds_records import TfdsRecords
from mmgem_jax.errors import UserError


@pytest.fixture
def written(tmp_path):
    """The source, opened as by a worker, of four captions; and the file that has them."""
    rows = [(number, {"caption": f"caption {number}"}) for number in range(4)]
    tfds_copy.write_copy(tmp_path, "captions", {"caption": tfds.features.Text()}, train=rows)
    data = {"name": "captions", "dir": str(tmp_path), "split": "train[1:]", "image_field": "image"}
    source = TfdsRecords(ConfigDict(data | {"regions_field": ""}), "data")
    (path,) = tmp_path.glob("captions/*/*.array_record*")
    return pickle.loads(pickle.dumps(source)), path


def test_a_spoilt_record_is_broken_and_the_others_are_read(written):
    source, path = written
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # records of about 200 bytes
    path.write_bytes(content)
    broken, read = [], []
    for number in range(3):
        try:
            read.append(source[number]["caption"])
        except Broken as error:
            broken.append(str(error))
    assert len(broken) == 1 and broken[0].startswith("annotation: Corrupted Riegeli/records file")
    assert len(read) == 2 and all(b"caption" in caption for caption in read)


def test_a_file_that_is_gone(written):
    source, path = written
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: is gone since it was opened; expected a file"):
        source[2]
