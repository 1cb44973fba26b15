"""Files of JSON lines that name images as a source of records (mmgem_jax/data/sources.py).

A line is an object: one field is the path of an image, the others are texts, numbers or lists.
"""

import array
import re

import numpy as np

from mmgem_jax.data import files
from mmgem_jax.data.broken import Broken
from mmgem_jax.data.order import shuffled
from mmgem_jax.data.record_index import RecordIndex
from mmgem_jax.data.tar_shards import json_object, known_fields
from mmgem_jax.errors import UserError, first_line

CHUNK = 1 << 20  # bytes
WEB = ("http", "https")


class JsonLines:
    """The lines of files, each with the bytes of its image; empty lines are none.

    Attributes:
      paths: of the files.
      counts: how many records each file has.
      fields: names of the fields of some lines.
    """

    def __init__(self, paths, image_field, index_dir, max_bytes):
        """Opens files of JSON lines.

        Args:
          paths: of the files, here or remote.
          image_field: the field that is a path: absolute, relative to the line's file, or a URL of
            the web or of where that file is.
          index_dir: folder of where the lines begin.
          max_bytes: of an image file, or a line; one of more is broken.

        Raises:
          UserError: a file cannot be read, or there are no lines.
        """
        self.index, self.image_field = RecordIndex(paths, scan, index_dir), image_field
        self.paths, self.counts, self.max_bytes = self.index.paths, self.index.counts, max_bytes
        self.fields = known_fields(self.line, len(self))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, number):
        """One record.

        Raises:
          Broken: the line is no object of JSON, or there is no such image, or too large a one.
          UserError: the file of the lines is gone, or an image cannot be read.
        """
        record = self.line(number)
        if self.image_field not in record:
            return record
        image = record[self.image_field]
        if not isinstance(image, str):
            raise Broken("annotation", f"{self.image_field} is {image!r:.40}, not a path")
        path, _, _ = self.index.place(number)
        record[self.image_field] = image_at(beside(path, image), protocol(path), self.max_bytes)
        return record

    def line(self, number):
        """The object of a line; Broken, UserError."""
        path, offset, size = self.index.place(number)
        if size > self.max_bytes:
            raise Broken("bytes", f"a line of {size}, of at most {self.max_bytes}")
        try:
            content = files.read(path, offset, offset + size)
        except FileNotFoundError:
            raise UserError(f"{path}: is gone since it was opened; expected lines") from None
        return json_object(content)

    def name_of(self, number):
        """What to call a record in an error: its file and line."""
        path, offset, _ = self.index.place(number)
        line, left = 1, offset
        try:
            with files.open_file(path) as file:
                while chunk := file.read(min(left, CHUNK)):
                    line, left = line + chunk.count(b"\n"), left - len(chunk)
        except (OSError, UserError):  # it is gone, and that is likely the error
            return f"{path}, byte {offset}"
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


def image_at(path, home, most):
    """The bytes of an image file of at most `most` bytes.

    Args:
      path: what a line says, which may be anything: where it leads is read only if it is a file
        here, of the web, or of `home`.
      home: protocol of the line's own file.

    Raises:
      Broken: there is no such file, or a larger one.
      UserError: it cannot be read, and others of its kind could not either.
    """
    path = re.sub("^(file|local)://", "", path)
    chained = files.is_remote(path) and "::" in path  # fsspec: one file system within another
    if chained or protocol(path) not in ("", home, *WEB):
        raise Broken("missing_file", f"{path}: neither here, nor of the web, nor {home or 'local'}")
    try:
        return files.read_whole(path, most)
    except FileNotFoundError as error:
        raise Broken("missing_file", first_line(error)) from None
    except files.Unreachable as error:
        if protocol(path) not in WEB:
            raise
        raise Broken("missing_file", first_line(error)) from None


def protocol(path):
    """What is before :// in a URL; "" of another path."""
    return path.partition("://")[0] if files.is_remote(path) else ""


def beside(path, name):
    """A path, taken as relative to the folder of another file unless it is absolute or a URL."""
    if name.startswith("/") or files.is_remote(name):
        return name
    folder, slash, _ = path.rpartition("/")
    return folder + slash + name
