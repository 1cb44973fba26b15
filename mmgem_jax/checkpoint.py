"""Checkpoints: the state and the data's position in one atomic step. Only this file knows orbax."""

import asyncio
import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mmgem_jax.errors import UserError
from mmgem_jax.sharding import path_name


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`; a context manager that waits at exit."""

    def __init__(self, workdir, every=1, keep=None):
        """Keeps the `keep` newest steps (None: all), saving at multiples of `every` (0: none)."""
        self.every = every
        policy = ocp.training.preservation_policies.LatestN(keep) if keep else None
        self.checkpointer = ocp.training.Checkpointer(
            str((Path(workdir) / "checkpoints").absolute()),
            preservation_policy=policy,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.checkpointer.close()

    @property
    def steps(self):
        """The complete steps that there are, the newest last."""
        return [checkpoint.step for checkpoint in self.checkpointer.checkpoints]

    @property
    def latest_step(self):
        """The newest complete step, or None."""
        latest = self.checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step, state, batches, last=False):
        """Saves in the background when it is time to, or in any case where it is the last.

        Args:
          step: steps taken.
          state: the TrainState; it may be donated right after.
          batches: the data iterator, whose position is saved. In all processes, since of packed
            rows each knows of its own streams alone.
        """
        if not last and (not self.every or step % self.every):
            return
        position = json.dumps(whole_state(batches.get_state()))
        items = {"state": state, "data": Position(batches, position)}
        self.checkpointer.save_checkpointables_async(step, items, force=True)

    def save_params(self, step, params):
        """Saves parameters alone, from which a training may start; they are there on return.

        Little memory is taken beside the parameters' own: they are written one after the other.
        """
        context = ocp.Context()
        at_once = max(leaf.nbytes for leaf in jax.tree.leaves(params)) + 1  # below it, orbax says
        context.memory_options.deepcopy_host_arrays = False
        context.array_options.saving.storage_options.chunk_byte_size = 8 * 2**20
        context.memory_options.transfer_concurrent_bytes = at_once
        context.memory_options.write_concurrent_bytes = at_once
        with context:
            self.checkpointer.save_checkpointables(step, {"state": {"params": params}})

    def restore(self, abstract, batches):
        """The newest state, laid out as `abstract` says; moves `batches` to its position.

        Raises:
          UserError: the checkpoint's arrays are not those of this config.
        """
        self.check_shapes(abstract)
        items = {"state": abstract, "data": Position(batches)}
        return self.checkpointer.load_checkpointables(None, items)["state"]

    def restore_params(self, abstract, step=None):
        """Part of a state, for evaluation: of the newest step, or of the one given.

        Args:
          abstract: a TrainState, or a dict of some of its fields; nothing else is read.
          step: one of `steps`.
        """
        self.check_shapes(abstract, step)
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            return self.checkpointer.load_checkpointables(step, {"state": abstract})["state"]

    def check_shapes(self, abstract, step=None):
        """Compares shapes with the checkpoint's own record, whose error would fill pages."""
        metadata = self.checkpointer.checkpointables_metadata(step).metadata["state"]
        found = shapes(metadata)
        for name, shape in shapes(abstract).items():
            if found.get(name) != shape:
                raise UserError(
                    f"checkpoint {self.checkpointer.directory}: {name} is "
                    f"{found.get(name, 'absent')}; this config has {shape}"
                )


class Position:
    """Where a data iterator is, which holds for all processes, however many go on with the run."""

    FILE = "process_0-of-1.json"  # grain's name for that of a process which is the only one

    def __init__(self, batches, position=None):
        """Of an iterator: what is to be saved, its whole state as text; to be moved, none."""
        self.batches, self.position = batches, position

    async def save(self, directory):
        """Returns what writes the position, as orbax wants it."""

        async def write():
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / self.FILE).write_text, self.position)

        return write()

    async def load(self, directory):
        """Returns what moves the iterator to the position in the folder."""

        async def read():
            text = await asyncio.to_thread((directory / self.FILE).read_text)
            self.batches.set_state(json.loads(text))

        return read()


def whole_state(state):
    """The states of the data iterators of all processes as one; call it in all.

    Args:
      state: this process's; as JSON.
    """
    if jax.process_count() == 1:
        return state
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    texts = multihost_utils.process_allgather(padded)
    states = [
        json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)
    ]
    return functools.reduce(merged, states)


def merged(one, other):
    """Two JSON values as one: objects have the entries of both; all else is the first's."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    shared = {key: merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return one | other | shared


def shapes(tree):
    """The shape of every leaf, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
