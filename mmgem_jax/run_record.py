"""What is written beside a checkpoint's arrays: the run's place in its data, and what they must be.

Text of one line, after its CRC32. Every array's shape, dtype and checksum are in it, by which what
is read from a disk can be told from what was saved.
"""

import asyncio
import functools
import json
import zlib

import jax

from mmgem_jax import processes
from mmgem_jax.checksums import fetched, start_checksums
from mmgem_jax.damage import Damaged
from mmgem_jax.errors import UserError
from mmgem_jax.sharding import path_name


class Record:
    """A dict, fit for JSON, as an item of a checkpoint: what is to be saved, or was read.

    Fields of the dict are step, about (what the run is), scores, data (the iterator's state) and
    arrays: shape, dtype and checksum of each, by its path in the state.
    """

    FILE = "record.json"

    def __init__(self, fields=None, checksums=None):
        """Of fields without the checksums, which `start_checksums` gives; to be read, of none."""
        self.fields, self.checksums = fields, checksums

    async def save(self, directory):
        """Returns what writes the record in the background, as orbax wants it."""

        async def write():
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread(self.write, folder / self.FILE)

        return write()

    def write(self, path):
        """Writes the record, after the checksums have come from the devices."""
        for name, value in fetched(self.checksums).items():
            self.fields["arrays"][name]["checksum"] = value
        text = json.dumps(self.fields)
        path.write_text(f"{zlib.crc32(text.encode()):08x} {text}")

    async def load(self, directory):
        """Returns what reads the record, as orbax wants it; it raises Damaged or what it meets."""

        async def read():
            found = await asyncio.to_thread((directory / self.FILE).read_bytes)
            crc, _, text = found.partition(b" ")
            if crc != b"%08x" % zlib.crc32(text):
                raise Damaged(f"its {self.FILE} is not what was written")
            self.fields = json.loads(text)

        return read()


def described(tree):
    """Shape and dtype of every leaf, by path, fit for JSON."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        path_name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in leaves
    }


def check_arrays(where, saved, abstract, partial):
    """Raises UserError where the arrays of a record are not those that are wanted.

    Args:
      where: the checkpoint's folder.
      saved: the record's arrays.
      abstract: the tree that is wanted.
      partial: arrays that are saved, but not wanted, do not matter.
    """
    wanted = described(abstract)
    for name in wanted if partial else wanted | saved:
        here, there = wanted.get(name), saved.get(name)
        ours, theirs = here and tuple(here["shape"]), there and tuple(there["shape"])
        if ours == theirs:
            ours, theirs = here["dtype"], there["dtype"]
        if ours != theirs:
            raise UserError(
                f"checkpoint {where}: {name} is {'absent' if theirs is None else theirs}; "
                f"this config has {'none' if ours is None else ours}"
            )


def check_version(folder, what):
    """Raises UserError where a step is of a version of this code that wrote no record.

    Args:
      folder: the step's.
      what: the step, for the error.
    """
    if not (folder / "run").exists():
        items = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        if "run" not in items:  # else the record was lost
            raise UserError(
                f"{what} was written by an earlier version of this code, of {sorted(items)}; "
                "expected one with its run's record"
            )


def check_sums(saved, state):
    """Raises Damaged where arrays are not those of a record.

    Args:
      saved: the record's arrays.
      state: the tree that was read; all of its arrays are in the record.
    """
    for name, value in fetched(start_checksums(state)).items():
        if value != saved[name]["checksum"]:
            raise Damaged(f"{name} is not what was saved")


def whole_state(state):
    """The states of the data iterators of all processes as one; call it in all.

    Args:
      state: this process's; as JSON.
    """
    return functools.reduce(merged, processes.gathered(state))


def merged(one, other):
    """Two JSON values as one: objects have the entries of both; all else is the first's."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    shared = {key: merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return one | other | shared
