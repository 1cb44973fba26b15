"""Files by their paths, here or remote: which there are, what is in them, whether they changed.

What has no protocol is opened by Python itself; everything else (gs://, s3://, https://, file://)
by fsspec, with the library of that protocol.
"""

import errno
import glob
import os
from concurrent.futures import ThreadPoolExecutor

import braceexpand
from fsspec.core import url_to_fs

from mmgem_jax.errors import UserError, first_line

AT_ONCE = 32  # requests to a remote file system, which wait most of their time

# Where a path leads to no file that can be read; other errors are the disk's or the net's.
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
ABSENT_NUMBERS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


def is_remote(path):
    """Whether a path is for fsspec."""
    return "://" in path


def expand(patterns, where):
    """Paths of the files that patterns stand for, sorted, each once.

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
        if glob.has_magic(path):
            return glob.glob(path, recursive=True)
        return [path] if os.path.exists(path) else []
    system, inner = url_to_fs(path)
    if glob.has_magic(path):
        return [system.unstrip_protocol(name) for name in system.glob(inner)]
    return [path] if system.exists(inner) else []


def stamps(paths):
    """[size in bytes, when or as what it was written] of files; a file that changes changes them.

    Raises:
      UserError: a file is not there.
    """
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(stamp, paths))


def stamp(path):
    """Size and time of one file; see `stamps`."""
    try:
        if not is_remote(path):
            found = os.stat(path)
            return [found.st_size, str(found.st_mtime_ns)]
        system, inner = url_to_fs(path)
        info = system.info(inner)
    except Exception as error:  # a remote file system may raise any
        raise UserError(f"{path}: {first_line(error)}; expected a file") from None
    # By file system: the local one, Google's, Amazon's, and what the web has.
    keys = ("mtime", "updated", "LastModified", "ETag")
    return [info["size"], str(next((info[key] for key in keys if key in info), ""))]


def open_file(path):
    """A file as a binary file object that can seek.

    Raises:
      FileNotFoundError: there is none that can be read.
      UserError: it cannot be opened for another reason.
    """
    return reached(path, lambda: open(path, "rb"), lambda system, inner: system.open(inner, "rb"))


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
    return reached(path, local, lambda system, inner: system.cat_file(inner, start or None, end))


def reached(path, local, remote):
    """What `local()` or `remote(file system, path in it)` returns; errors as of `read`."""
    try:
        return remote(*url_to_fs(path)) if is_remote(path) else local()
    except Exception as error:  # a remote file system may raise any
        # ValueError: a character that no path has, or a protocol that nobody knows.
        absent = isinstance(error, (*ABSENT, ValueError))
        if absent or getattr(error, "errno", None) in ABSENT_NUMBERS:
            raise FileNotFoundError(f"{path}: {first_line(error)}") from None
        raise UserError(
            f"{path}: {type(error).__name__}: {first_line(error)}; expected a file that can be read"
        ) from None
