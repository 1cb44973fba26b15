"""Where the records of large files are: found once, kept in a folder, mapped into memory.

An index is two files in that folder. NAME.places is int64 [records, 2], offset and size in bytes,
file after file in the order of their paths; NAME.json, written last, says how many records each
file has and which files are damaged. NAME is a hash of the paths with the files' sizes and times: a
file that changes has another index.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmgem_jax import processes
from mmgem_jax.data import files
from mmgem_jax.errors import UserError

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
        self.paths = list(paths)
        what = json.dumps([scan.__module__, self.paths, files.stamps(self.paths)])
        self.base = Path(folder).absolute() / hashlib.sha256(what.encode()).hexdigest()[:32]
        processes.on_first(lambda: self.find() or make(self.paths, scan, self.base))
        if not self.find():  # the folder is not one for all hosts, but each host's own
            make(self.paths, scan, self.base)
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
        """int64 [records, 2]: offset and size in bytes, mapped from the disk."""
        return np.memmap(self.base.with_suffix(".places"), PLACE, "r", shape=(len(self), 2))

    def place(self, number):
        """Path, offset and size of a record."""
        path = self.paths[int(np.searchsorted(self.ends, number, side="right"))]
        return path, *self.places[number].tolist()


def make(paths, scan, base):
    """Writes an index of files under a name; see RecordIndex. Both files come to be whole."""
    counts, damaged = [], {}
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
            written = Path(scratch) / base.name
            with open(written.with_suffix(".places"), "wb") as file:
                for path, (places, trouble) in zip(paths, scanned(paths, scan), strict=True):
                    file.write(np.asarray(places, PLACE).tobytes())
                    counts.append(len(places))
                    if trouble:
                        damaged[path] = trouble
            what = {"counts": counts, "damaged": damaged}
            written.with_suffix(".json").write_text(json.dumps(what))
            for suffix in (".places", ".json"):
                written.with_suffix(suffix).replace(base.with_suffix(suffix))
    except OSError as error:
        raise UserError(
            f"data.index_dir: {base.parent}: {error.strerror}; expected a folder to write to"
        ) from None


def scanned(paths, scan):
    """What `scan` returns for each path, in their order; many are shared among processes."""
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds between lines in a log
    show = functools.partial(
        tqdm,
        total=len(paths),
        desc="index",
        unit="file",
        mininterval=interval,
        disable=len(paths) < SHOWN_FROM,
    )
    workers = min(os.cpu_count(), len(paths) // FILES_A_PROCESS)
    if workers < 2:
        yield from show(map(scan, paths))
        return
    # Not forked: this process has JAX's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from show(pool.map(scan, paths))
