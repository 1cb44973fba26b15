"""Files of JSON lines that name images as a source of records (mmgem_jax/data/sources.py).

A line is an object: one field is the path of an image, the others are texts, numbers or lists.
"""

import array

import numpy as np

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.order import shuffled
from mmgem_jax.data.record_index import RecordIndex
from mmgem_jax.data.tar_shards import PROBED, json_object
from mmgem_jax.errors import UserError, first_line

CHUNK = 1 << 20  # bytes


class JsonLines:
    """The lines of files, each with the bytes of its image; empty lines are none.

    Attributes:
      fields: names of the fields of the first lines.
    """

    def __init__(self, paths, image_field, index_dir):
        """Opens files of JSON lines.

        Args:
          paths: of the files, here or remote.
          image_field: the field that is a path: absolute, a URL, or relative to the line's file.
          index_dir: folder of where the lines begin.

        Raises:
          UserError: a file cannot be read, or there are no lines.
        """
        self.index, self.image_field = RecordIndex(paths, scan, index_dir), image_field
        found = set()
        for number in range(min(PROBED, len(self))):
            try:
                found |= self.line(number).keys()
            except Broken:
                continue
        self.fields = frozenset(found)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, number):
        """One record.

        Raises:
          Broken: the line is no object of JSON, or there is no such image.
          UserError: the file of the lines is gone, or an image cannot be read.
        """
        record = self.line(number)
        if self.image_field not in record:
            return record
        image = record[self.image_field]
        if not isinstance(image, str):
            raise Broken("annotation", f"{self.image_field} is {image!r:.40}, not a path")
        path, _, _ = self.index.place(number)
        try:
            record[self.image_field] = files.read(beside(path, image))
        except FileNotFoundError as error:
            raise Broken("missing_file", first_line(error)) from None
        return record

    def line(self, number):
        """The object of a line; Broken, UserError."""
        path, offset, size = self.index.place(number)
        try:
            content = files.read(path, offset, offset + size)
        except FileNotFoundError:
            raise UserError(f"{path}: is gone since it was opened; expected lines") from None
        return json_object(content)

    def name_of(self, number):
        """What to call a record in an error: its file and line."""
        path, left, _ = self.index.place(number)
        line = 1
        with files.open_file(path) as file:
            while chunk := file.read(min(left, CHUNK)):
                line, left = line + chunk.count(b"\n"), left - len(chunk)
        return f"{path} line {line}"

    def order(self, seed):
        """An endless MapDataset of record numbers: every epoch all of them, shuffled anew."""
        return shuffled(len(self), seed)


def scan(path):
    """Places of a file's lines that are not empty, int64 [lines, 2], and "": no file is damaged."""
    places, offset = array.array("q"), 0  # tens of millions of them
    try:
        with files.open_file(path) as file:
            for line in file:
                if line.strip():
                    places.extend((offset, len(line)))
                offset += len(line)
    except FileNotFoundError as error:
        raise UserError(f"{first_line(error)}; expected lines of JSON") from None
    return np.asarray(places, np.int64).reshape(-1, 2), ""


def beside(path, name):
    """A path, taken as relative to the folder of another file unless it is absolute or a URL."""
    if name.startswith("/") or files.is_remote(name):
        return name
    folder, slash, _ = path.rpartition("/")
    return folder + slash + name
