"""Files by their paths, here or remote: which there are, what is in them, whether they changed.

What has no protocol is opened by Python itself; everything else (gs://, s3://, https://, file://)
by fsspec, with the library of that protocol. A remote file that fails is asked for again.
"""

import errno
import glob
import io
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import braceexpand
from fsspec.core import url_to_fs

from mmgem_jax.data.broken import Broken
from mmgem_jax.errors import UserError, first_line

AT_ONCE = 32  # requests to a remote file system, which wait most of their time
WAITS = (0.5, 2.0)  # seconds before a remote file that failed is asked for again
# Of a remote file that is read here and there, in bytes: what is fetched at once, and the gap that
# is fetched too, for a request takes its time.
LITTLE, MUCH, GAP = 1 << 13, 1 << 22, 1 << 18

# Where a path leads to no file that can be read; other errors are the disk's or the net's.
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
ABSENT_NUMBERS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
# What a web server says: no; not now (timeout, too early, too many requests); no bytes there.
REFUSALS, PASSING, EMPTY = range(400, 500), {408, 425, 429}, 416


class Unreachable(UserError):
    """Of a remote file: its server is not there, or refuses."""


def is_remote(path):
    """Whether a path is for fsspec."""
    return "://" in path


def expand(patterns, where):
    """Paths of the files that patterns stand for, sorted, each once (./a is a).

    Args:
      patterns: paths or URLs with *, ?, [...] and with {a,b} or {000..999}.
      where: the field they come from.

    Raises:
      UserError: a pattern without a file, a file that is named and absent, braces that do not
        close, or a protocol whose library is not there or that does not answer.
    """
    found = set()
    for pattern in patterns:
        try:
            named = list(braceexpand.braceexpand(pattern))
            with ThreadPoolExecutor(AT_ONCE) as threads:
                matches = list(threads.map(matching, named))
        except Exception as error:  # of braceexpand, or any that a remote file system may raise
            raise UserError(
                f"{where}: {pattern}: {first_line(error)}; expected a pattern of files that can be "
                "listed"
            ) from None
        for name, paths in zip(named, matches, strict=True):
            if not paths:
                raise UserError(f"{where}: {name}: found no such file; expected one or more")
            found.update(paths)
    return sorted(found)


def matching(path):
    """Paths that match a path with or without *, ? and [...]; none where there is no file."""
    if not is_remote(path):
        found = glob.glob(path, recursive=True) if glob.has_magic(path) else [path]
        return [str(Path(name)) for name in found if os.path.exists(name)]
    if glob.has_magic(path):
        system, inner = url_to_fs(path)
        return [system.unstrip_protocol(name) for name in system.glob(inner)]
    return [path] if exists(path) else []


def exists(path):
    """Whether there is anything at a path; raises what a remote file system does."""
    if not is_remote(path):
        return os.path.exists(path)
    system, inner = url_to_fs(path)
    return system.exists(inner)


def stamps(paths):
    """[size in bytes, when or as what it was written] of files; a file that changes changes them.

    Raises:
      UserError: a file is not there, is none to be read at any place, or of unknown size.
    """
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(stamp, paths))


def stamp(path):
    """Size and time of one file; see `stamps`."""
    try:
        info = reached(path, lambda: local_info(path), lambda system, inner: system.info(inner))
    except FileNotFoundError as error:
        raise UserError(f"{first_line(error)}; expected a file") from None
    if not isinstance(info["size"], int):
        raise UserError(f"{path}: is of unknown size; expected a server that says it")
    # By file system: the local one, Google's, Amazon's, and what the web has.
    keys = ("mtime", "updated", "LastModified", "ETag")
    return [info["size"], str(next((info[key] for key in keys if key in info), ""))]


def local_info(path):
    """Size and time of a regular file here; anything else, such as a pipe, counts as absent."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError("is no regular file")
    return {"size": found.st_size, "mtime": found.st_mtime_ns}


def open_file(path):
    """A file as a binary file object that can seek.

    Raises:
      FileNotFoundError: there is none that can be read.
      UserError: it cannot be opened for another reason; reading may raise both as well.
    """
    if is_remote(path):
        return io.BufferedReader(RemoteFile(path, stamp(path)[0]), LITTLE)
    return reached(path, lambda: open(path, "rb"), None)


def read(path, start=0, end=None):
    """Bytes `start` to `end` of a file, or less where it is shorter; the whole file by default.

    Raises:
      FileNotFoundError: there is none that can be read.
      UserError: it cannot be read for another reason.
    """

    def local():
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    # Not 0 to its end: a web server refuses that of an empty file.
    content = reached(path, local, lambda system, inner: system.cat_file(inner, start or None, end))
    if end is not None and len(content) > end - start:
        raise UserError(
            f"{path}: answers with more bytes than asked for; expected a server with byte ranges"
        )
    return content


def read_whole(path, most):
    """All bytes of a regular file that a record names.

    Raises:
      Broken: there are more than `most`.
      FileNotFoundError: there is none that can be read.
      UserError: it cannot be read for another reason.
    """

    def local():
        size = local_info(path)["size"]
        with open(path, "rb") as file:
            return file.read(min(size, most) + 1)

    content = reached(path, local, lambda system, inner: system.cat_file(inner, None, most + 1))
    if len(content) > most:
        raise Broken("bytes", f"{path}: more than {most} bytes")
    return content


def reached(path, local, remote):
    """What `local()` or `remote(file system, path in it)` returns; errors as of `failure`."""
    if not is_remote(path):
        try:
            return local()
        except Exception as error:
            raise failure(path, error) from None
    for wait in (*WAITS, None):
        try:
            return remote(*url_to_fs(path))
        except Exception as error:  # a remote file system may raise any
            failed, again = failure(path, error), may_pass(error)
        if isinstance(failed, FileNotFoundError) or not again or wait is None:
            raise failed
        time.sleep(wait)


def failure(path, error):
    """What to raise for an error at a path: FileNotFoundError, Unreachable or UserError."""
    # ValueError: a character that no path has, or a protocol that nobody knows.
    absent = isinstance(error, (*ABSENT, ValueError)) or status_of(error) == EMPTY
    if absent or getattr(error, "errno", None) in ABSENT_NUMBERS:
        return FileNotFoundError(f"{path}: {first_line(error)}")
    # aiohttp, which is not always there, has an error with `os_error` where it cannot connect.
    no_server = hasattr(error, "os_error")
    kind = Unreachable if no_server or status_of(error) in REFUSALS else UserError
    return kind(
        f"{path}: {type(error).__name__}: {first_line(error)}; expected a file that can be read"
    )


def may_pass(error):
    """Whether it may help to ask again."""
    refused = status_of(error) in REFUSALS and status_of(error) not in PASSING
    return not refused and not isinstance(error, ImportError)


def status_of(error):
    """The status in a web server's answer that made an error; 0 of other errors."""
    for name in ("status", "code"):  # aiohttp's; Google's
        if isinstance(status := getattr(error, name, None), int):
            return status
    return 0


class RemoteFile(io.RawIOBase):
    """A remote file that fetches what is read: little where reads jump, ever more in a row.

    So of a tar file with large members hardly more than their headers comes, and small members, or
    lines, come many at once.
    """

    def __init__(self, path, size):
        self.path, self.size, self.position = path, size, 0
        self.start, self.held, self.at_once = 0, b"", LITTLE

    def readable(self):
        """Yes."""
        return True

    def seekable(self):
        """Yes."""
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        """Goes to a byte."""
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}
        self.position = origins[whence] + offset
        return self.position

    def readinto(self, buffer):
        """Fills a buffer, or a part of it; errors as of `read`."""
        end = self.start + len(self.held)
        if not self.start <= self.position < end:
            near = 0 <= self.position - end < GAP
            self.at_once = min(2 * self.at_once, MUCH) if near else LITTLE
            until = min(self.position + max(self.at_once, len(buffer)), self.size)
            self.start = self.position
            self.held = read(self.path, self.start, until) if self.start < until else b""
        first = self.position - self.start
        part = memoryview(self.held)[first : first + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)
