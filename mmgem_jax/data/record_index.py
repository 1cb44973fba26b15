"""Where the records of large files are: found once, kept in a folder, mapped into memory.

An index is two files in that folder. NAME.places is int64 [records, 2], offset and size in bytes,
file after file in the order of their paths; NAME.json, written last, says how many records each
file has and which files are damaged. NAME is a hash of the paths with the files' sizes and times: a
file that changes has another index.

What is found in one file is kept too, under files/ and a hash of that file alone: whatever ends the
work, and whichever file changes, the others are not read again. It takes 16 bytes a record.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmgem_jax import processes
from mmgem_jax.data import files
from mmgem_jax.data.worker_processes import prepare
from mmgem_jax.errors import UserError, first_line

FILES_A_PROCESS = 16  # of fewer, starting another process takes longer than they do
SHOWN_FROM = 16  # files; fewer need no progress bar
PLACE = np.dtype("<i8")


class RecordIndex:
    """Places of records in files.

    Attributes:
      paths: of the files.
      counts: records of each file.
      damaged: what is wrong with a file, by its path; what is whole in it is in the index.
    """

    def __init__(self, paths, scan, folder):
        """Finds the index, or makes it: on the first process, and where another does not see it.

        Args:
          paths: of the files.
          scan: a function of a module, path -> int64 [records, 2], and what is wrong or "". It
            raises UserError for what is no damage, such as a file that cannot be read.
          folder: where indices are kept.

        Raises:
          UserError: of `scan`; the folder cannot be written to, or there are no records at all.
        """
        if files.is_remote(str(folder)):
            raise UserError(f"data.index_dir: {folder}; expected a folder here, not a URL")
        self.paths = list(paths)
        stamps = files.stamps(self.paths)
        self.base = Path(folder).absolute() / hashed(scan.__module__, self.paths, stamps)
        processes.on_first(lambda: self.find() or make(self.paths, stamps, scan, self.base))
        if not self.find():  # the folder is not one for all hosts, but each host's own
            make(self.paths, stamps, scan, self.base)
        if not self.find():
            raise UserError(f"data.index_dir: {folder}: what was written there is gone")
        if not len(self):
            found = f"{self.paths[0]} ({self.damaged.get(self.paths[0], 'empty')})"
            raise UserError(
                f"data.files: found no records in {len(self.paths)} files such as {found}; "
                "expected one or more"
            )

    def find(self):
        """Whether the whole index is there; if so, it is read."""
        try:
            found = json.loads(self.base.with_suffix(".json").read_bytes())
            self.counts, self.damaged = found["counts"], found["damaged"]
            self.ends = np.cumsum(self.counts, dtype=np.int64)
            size = self.base.with_suffix(".places").stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return size == 2 * PLACE.itemsize * len(self)

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        # Workers map the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "places"}

    @functools.cached_property
    def places(self):
        """int64 [records, 2]: offset and size in bytes, mapped from the disk; UserError."""
        path = self.base.with_suffix(".places")
        try:
            return np.memmap(path, PLACE, "r", shape=(len(self), 2))
        except (OSError, ValueError) as error:  # absent; shorter
            raise UserError(
                f"data.index_dir: {path}: {first_line(error)}; expected what was written there"
            ) from None

    def place(self, number):
        """Path, offset and size of a record."""
        path = self.paths[int(np.searchsorted(self.ends, number, side="right"))]
        return path, *self.places[number].tolist()


def hashed(*what):
    """A name for what is fit for JSON."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def make(paths, stamps, scan, base):
    """Writes an index of files under a name; see RecordIndex. Both files come to be whole."""
    folder = base.parent / "files"
    parts = [folder / hashed(scan.__module__, *one) for one in zip(paths, stamps, strict=True)]
    part_of = dict(zip(paths, parts, strict=True))
    counts, damaged = [], {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [path for path in paths if found_in(part_of[path]) is None]
        for path, (places, trouble) in scanned(missing, scan):
            head = json.dumps({"records": len(places), "trouble": trouble})
            with whole(part_of[path]) as file:
                file.write(head.encode() + b"\n" + np.asarray(places, PLACE).tobytes())
        with whole(base.with_suffix(".places")) as file:
            for path in paths:
                places, trouble = found_in(part_of[path])
                file.write(places)
                counts.append(len(places) // (2 * PLACE.itemsize))
                if trouble:
                    damaged[path] = trouble
        with whole(base.with_suffix(".json")) as file:
            file.write(json.dumps({"counts": counts, "damaged": damaged}).encode())
    except OSError as error:
        raise UserError(
            f"data.index_dir: {base.parent}: {error.strerror}; expected a folder to write to"
        ) from None


def found_in(part):
    """What is kept of one file: places as bytes, and what is wrong or ""; None if not whole."""
    try:
        head, _, places = part.read_bytes().partition(b"\n")
        head = json.loads(head)
        size, trouble = 2 * PLACE.itemsize * head["records"], head["trouble"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (places, trouble) if len(places) == size else None


@contextlib.contextmanager
def whole(path):
    """A file to write to, which is at its path only when all is written."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        with open(written, "wb") as file:
            yield file
        written.replace(path)


def scanned(paths, scan):
    """(path, what `scan` returns) as they are done; many are shared among processes."""
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds between lines in a log
    show = functools.partial(
        tqdm,
        total=len(paths),
        desc="index",
        unit="file",
        mininterval=interval,
        disable=len(paths) < SHOWN_FROM,
    )
    # Remote files keep them waiting.
    most = files.AT_ONCE if paths and files.is_remote(paths[0]) else os.cpu_count()
    workers = min(most, len(paths) // FILES_A_PROCESS)
    if workers < 2:
        for path in show(paths):
            yield path, scan(path)
        return
    others = set(multiprocessing.active_children())
    # Not forked: this process has JAX's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(0, workers))
    try:
        path_of = {pool.submit(scan, path): path for path in paths}
        for done in show(as_completed(path_of)):
            yield path_of.pop(done), done.result()
    except BrokenProcessPool:
        raise UserError(
            "data.files: a process that looks for their records died, as one does that the system "
            "kills where memory runs out; expected it to live"
        ) from None
    finally:
        # Whatever ended this, no one waits for a large file that is no longer wanted; and a pool's
        # own way to end its processes is SIGTERM, which they leave to this one.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown()
