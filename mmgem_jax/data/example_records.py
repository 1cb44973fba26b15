"""Files of array_record that hold tf.train.Example as a source (mmgem_jax/data/sources.py).

Examples are parsed with TFDS's copy of their protocol, without TensorFlow.
"""

from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.order import shuffled
from mmgem_jax.data.tar_shards import known_fields
from mmgem_jax.errors import UserError, first_line

# Of a file that is gone or a spoilt checksum; of what is not an Example.
UNREADABLE = (RuntimeError, DecodeError)


class ExampleRecords:
    """Records of files: bytes, or a list of them where there are more; numbers as arrays.

    Attributes:
      fields: names of the fields of some records.
    """

    def __init__(self, paths):
        """Opens files of array_record, local or of Google's storage (gs://).

        Raises:
          UserError: one is of another place, or no whole file of its format; there are no records.
        """
        self.paths = list(paths)
        for path in self.paths:
            if files.is_remote(path) and not path.startswith("gs://"):
                raise UserError(
                    f"{path}: array_record reads local files and gs:// alone; expected one of them"
                )
        with ThreadPoolExecutor(files.AT_ONCE) as threads:
            self.counts = list(threads.map(count_of, self.paths))
        self.records = grain.sources.ArrayRecordDataSource(self.paths)
        if not len(self):
            raise UserError(f"data.files: found no records in {len(self.paths)} files")
        self.fields = known_fields(self.__getitem__, len(self))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        """One record; Broken where it cannot be read or is no Example, UserError without a file."""
        try:
            example = tf_example_pb2.Example.FromString(self.records[number])
        except UNREADABLE as error:
            raise unreadable(error, self.paths[place(number, self.counts)[0]]) from None
        return {name: value_of(one) for name, one in example.features.feature.items()}

    def name_of(self, number):
        """What to call a record in an error: its file and its number in there."""
        file, within = place(number, self.counts)
        return f"{self.paths[file]} record {within}"

    def order(self, seed):
        """An endless MapDataset of record numbers: every epoch all of them, shuffled anew."""
        return shuffled(len(self), seed)


def count_of(path):
    """How many records a file has; UserError where it is no file of array_record."""
    try:
        with grain.sources.ArrayRecordDataSource([path]) as records:
            return len(records)
    except RuntimeError as error:
        raise UserError(
            f"{path}: {first_line(error)}; expected a whole file of array_record"
        ) from None


def place(number, counts):
    """Which file a record is in, and its number in there, by the records of each file."""
    ends = np.cumsum(counts)
    file = int(np.searchsorted(ends, number, side="right"))
    return file, number - int(ends[file]) + counts[file]


def unreadable(error, path):
    """What to raise where a record is UNREADABLE: UserError if its file is gone, or Broken."""
    if not files.exists(path):
        return UserError(f"{path}: is gone since it was opened; expected a file of array_record")
    return Broken("annotation", first_line(error))


def value_of(feature):
    """What an Example holds under one name."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return b""
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        return values[0] if len(values) == 1 else list(values)
    return np.asarray(values, np.int64 if kind == "int64_list" else np.float32)
