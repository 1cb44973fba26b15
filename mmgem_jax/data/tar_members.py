"""The members of tar files, by which WebDataset's samples are found; spoilt and hostile ones too.

Members are only ever read into memory, so what their names say harms nothing; links, devices,
folders and sparse files are passed over. This file imports little: processes start with it.
"""

import io
import os
import tarfile

from mmgem_jax.data import files
from mmgem_jax.errors import UserError, first_line

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
BLOCK = 512  # bytes, of which a tar file is made


def scan(path):
    """Places of a tar file's samples, [samples, 2], and what is wrong with it, or "".

    Raises:
      UserError: it is compressed, or cannot be read.
    """
    places, before = [], None
    try:
        file = files.open_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{first_line(error)}; expected a tar file") from None
    with file:
        guarded = Guarded(path, file)
        if guarded.read(8).startswith(COMPRESSED):
            raise UserError(
                f"{path}: is compressed; expected a plain tar file, in which a sample can be read "
                "without those before it"
            )
        guarded.seek(0)
        try:
            for key, _, member in members(guarded):
                end = member.offset_data + member.size
                if key != before:
                    places.append([member.offset, 0])
                places[-1][1] = end - places[-1][0]
                before = key
        except UserError:
            raise
        except Exception as error:  # of a spoilt header, tarfile makes all kinds
            return places, first_line(error)
    return places, ""


def members(file):
    """(key, extension, tarfile's header) of the members that samples are made of, in their order.

    Args:
      file: a Guarded; a member is given if all of it is there.

    Raises:
      tarfile.ReadError, and others: damage, after what is whole before it.
    """
    # A name that is not UTF-8 still makes a key that can be printed.
    tar = tarfile.open(fileobj=file, mode="r:", errors="backslashreplace")  # noqa: SIM115
    reached = 0
    while (member := tar.next()) is not None:
        tar.members = []  # else it keeps all of them
        if member.size < 0 or tar.offset <= reached:  # else it would turn in a circle
            raise tarfile.ReadError("a negative size")
        reached = tar.offset
        if not member.isreg() or member.issparse():
            continue
        if member.offset_data + member.size > file.size:
            raise tarfile.ReadError("unexpected end of data")
        key, extension = split_name(member.name)
        if key:
            yield key, extension, member
    # tarfile takes a spoilt header, and a file that is cut between members, for the end.
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("no end of the archive where it should be")


def split_name(name):
    """Key and extension of a member's path as WebDataset splits it; "" without one of the two."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def padded(block):
    """A sample's members as a tar file of their own."""
    return Guarded("", io.BytesIO(block + bytes(-len(block) % BLOCK + 2 * BLOCK)))


class Guarded:
    """A file for tarfile, which in a spoilt header may find any number of bytes to read or skip."""

    def __init__(self, path, file):
        self.path, self.file = path, file
        try:
            self.size = file.seek(0, os.SEEK_END)  # bytes
            file.seek(0)
        except OSError as error:  # a pipe, say
            raise UserError(f"{path}: {first_line(error)}; expected a tar file") from None

    def tell(self):
        """Where the next byte is read."""
        return self.file.tell()

    def seek(self, position):
        """Goes to a byte; tarfile.ReadError where there can be none."""
        if not 0 <= position <= self.size:
            raise tarfile.ReadError("unexpected end of data")
        return self.file.seek(position)

    def read(self, count):
        """So many bytes, or what there is; UserError where the disk or the net fails."""
        if count < 0:
            raise tarfile.ReadError("a negative size")
        try:
            return self.file.read(min(count, self.size))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{self.path}: {first_line(error)}; expected a tar file") from None
