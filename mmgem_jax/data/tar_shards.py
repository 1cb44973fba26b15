"""WebDataset's tar files as a source of records, in any order (mmgem_jax/data/sources.py).

A sample is a run of members that share a key, the path up to the first dot of its last part:
000012.jpg, 000012.txt, 000012.json. Where each sample lies is found once (record_index.py); then a
record is one read.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.order import shuffled_by_shard
from mmgem_jax.data.record_index import RecordIndex
from mmgem_jax.data.tar_members import members, padded, scan
from mmgem_jax.errors import UserError, first_line

IMAGES = {"jpg", "jpeg", "png", "webp"}
PROBED = 32  # records that tell which fields there are


class TarShards:
    """Samples of tar files.

    A record has `image`, the bytes of the first image; `json`, a dict; and every other member as
    bytes by its extension, such as `txt`. What a sample does not have is not in its record.

    Attributes:
      paths: of the files.
      counts: how many records each file has.
      damaged: paths of tar files that are cut or spoilt; what is whole in them is used.
      fields: names of the fields of some records.
    """

    def __init__(self, paths, index_dir, window, max_damaged, max_bytes):
        """Opens tar files, and finds the samples in them if that has not been done before.

        Args:
          paths: of the files, here or remote.
          index_dir: folder of what is found.
          window: of the order, see `shuffled_by_shard`.
          max_damaged: share of the files that may be damaged.
          max_bytes: of a sample with its headers; one of more is broken.

        Raises:
          UserError: more are, one is compressed or cannot be read, there are no samples, or the
            window is none.
        """
        if window < 1:
            raise UserError(f"data.window: {window}; expected at least 1")
        self.index, self.window = RecordIndex(paths, scan, index_dir), window
        self.paths, self.counts, self.max_bytes = self.index.paths, self.index.counts, max_bytes
        self.damaged = list(self.index.damaged)
        if self.damaged:
            report_damaged(self.index, max_damaged)
        self.fields = known_fields(self.__getitem__, len(self))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, number):
        """One record.

        Raises:
          Broken: the JSON is no object, the sample too large, or the file has changed.
          UserError: the file is gone, or shorter than it was.
        """
        return record_of(self.block(number))

    def block(self, number):
        """The bytes of a sample's members with their headers; Broken, UserError."""
        path, offset, size = self.index.place(number)
        if size > self.max_bytes:
            raise Broken("bytes", f"{size}, of at most {self.max_bytes}")
        try:
            block = files.read(path, offset, offset + size)
        except FileNotFoundError:
            raise UserError(f"{path}: is gone since it was opened; expected a tar file") from None
        if len(block) < size:
            raise UserError(f"{path}: is shorter than it was; expected a file that stays the same")
        return block

    def name_of(self, number):
        """What to call a record in an error: the tar file and the key in it."""
        path, offset, _ = self.index.place(number)
        try:
            key, _, _ = next(members(padded(self.block(number))))
        except Exception:  # whatever is wrong with it
            return f"{path}, byte {offset}"
        return f"{path}/{key}"

    def order(self, seed):
        """An endless MapDataset of record numbers: by shard, and shuffled within windows."""
        return shuffled_by_shard(self.index.counts, self.window, seed)


def report_damaged(index, most):
    """Prints that tar files are damaged; a UserError where they are more than that share."""
    damaged = [f"{path} ({trouble})" for path, trouble in index.damaged.items()]
    found = f"data.files: {len(damaged)} of {len(index.paths)} tar files are damaged"
    names = ", ".join(damaged[:3]) + ", ..." * (len(damaged) > 3)
    if len(damaged) > most * len(index.paths):
        raise UserError(f"{found}: {names}; expected a share of {most:g} (data.max_broken_share)")
    print(f"{found}, what is whole in them is used: {names}")


def known_fields(record, count):
    """Names of the fields of some records, from the first to the last, those that can be read.

    Args:
      record: a function, number -> dict; Broken.
      count: of all records.
    """

    def names(number):
        try:
            return record(number).keys()
        except Broken:
            return ()

    numbers = np.unique(np.linspace(0, count - 1, PROBED, dtype=np.int64)).tolist()
    with ThreadPoolExecutor(files.AT_ONCE) as threads:
        return frozenset().union(*threads.map(names, numbers))


def record_of(block):
    """The record of a sample's members; Broken."""
    record = {}
    try:
        for _, extension, member in members(padded(block)):
            content = block[member.offset_data : member.offset_data + member.size]
            record.setdefault("image" if extension in IMAGES else extension, content)
    except Exception as error:  # as in `scan`: the file was changed
        raise Broken("annotation", first_line(error)) from None
    if "json" in record:
        record["json"] = json_object(record["json"])
    return record


def json_object(content):
    """The dict that is written as JSON in bytes; Broken where they are none."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Broken("annotation", first_line(error)) from None
    if not isinstance(value, dict):
        raise Broken("annotation", f"JSON of a {type(value).__name__}, not of an object")
    return value
