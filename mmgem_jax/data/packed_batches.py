"""Batches of packed rows (mmgem_jax/data/packing.py), through grain.

Group a of every batch is made of a stream of its own: the examples a, a + A, a + 2 A, ... of a
source. It follows from the stream's examples and its position alone, so neither hosts nor workers
change it; and the position travels in the batch.
"""

import grain
import numpy as np

from mmgem_jax.data.packing import Packing, assemble, candidate_of, check_packing, plan_group
from mmgem_jax.data.worker_processes import prepare
from mmgem_jax.errors import UserError


def packing_of(config, data, regions, where):
    """The Packing of a source; None where rows are padded.

    Args:
      config: the whole config.
      data: the source's (`sources` of mmgem_jax/data/sources.py).
      regions: R, at most of an image of it.
      where: what to call the source in an error.

    Raises:
      UserError: sizes that do not fit the batch or the longest texts, or not all sources' alike.
    """
    images = config.data.packing.images
    if data.packing.images != images:
        raise UserError(f"{where}.packing.images: is for all sources; expected data.packing.images")
    if images < 0 or (images and config.batch_size % images):
        raise UserError(
            f"data.packing.images: {images}; expected a divisor of batch_size "
            f"{config.batch_size}, or 0"
        )
    if not images:
        return None
    packing = Packing(**data.packing, visual_tokens=config.model.generation_grid**2)
    check_packing(packing, regions, data.text_length, data.caption_length, where)
    return packing


class Stream:
    """One stream of a source's examples, as the groups that are made of it.

    Args:
      examples: a grain MapDataset of the source's examples.
      packing: the source's Packing.
      first: number of its first example in the source, and
      step: how many further on each next one is.
      position: a row of `data_position`, as a list, to go on from; None: the beginning.
    """

    def __init__(self, examples, packing, first, step, position=None):
        self.examples, self.packing, self.first, self.step = examples, packing, first, step
        self.taken, *waiting = position or [0]
        self.waiting = [self.candidate(number) for number in waiting if number >= 0]

    def candidate(self, number):
        """The Candidate of that number in the stream."""
        example = self.examples[self.first + number * self.step]
        return candidate_of(number, example, self.packing.visual_tokens)

    def draw(self):
        """The next Candidate."""
        self.taken += 1
        return self.candidate(self.taken - 1)

    @property
    def position(self):
        """Where the stream is, as a row of `data_position`."""
        waiting = [candidate.number for candidate in self.waiting]
        return [self.taken, *waiting, *[-1] * (self.packing.waiting - len(waiting))]

    def group(self):
        """The arrays of the next group."""
        placed, self.waiting = plan_group(self.packing, self.waiting, self.draw)
        return assemble(self.packing, placed) | {"data_position": np.int32([self.position])}


class PackedGroups(grain.IterDataset):
    """The groups of batch after batch; of each batch those of the streams that are asked for.

    Args:
      sources: for each source's name a MapDataset of its examples and its Packing.
      order: a MapDataset of the place, among the sources, of each batch's.
      streams: numbers of the streams.
      count: A, of how many they are.
      state: of PackedBatches, where to begin.
    """

    def __init__(self, sources, order, streams, count, state):
        super().__init__([examples for examples, _ in sources.values()])
        self.names, self.order = list(sources), order
        self.packings = [packing for _, packing in sources.values()]
        self.streams, self.count = list(streams), count
        self.state = state

    def set_slice(self, sl, sequential_slice=False):
        """Keeps a slice of the streams alone: how grain gives each of its workers a part."""
        self.streams = self.streams[sl]

    def __iter__(self):
        taken = self.state["batches"] * len(self.streams)
        return GroupIterator(self, {"groups": taken, "streams": self.state["streams"]})


class GroupIterator(grain.DatasetIterator):
    """The groups of a PackedGroups one by one: its streams in turn, of one source a batch."""

    def __init__(self, groups, state):
        super().__init__()
        self.groups = groups
        self.set_state(state)

    def __next__(self):
        groups = self.groups
        batch, turn = divmod(self.taken, len(groups.streams))
        source, number = groups.order[batch], groups.streams[turn]
        name = groups.names[source]
        stream = self.streams.get((name, number))
        if stream is None:  # only now: what waits in it takes time to make again
            position = self.positions.get(name, {}).get(str(number))
            stream = Stream(
                groups.parents[source], groups.packings[source], number, groups.count, position
            )
            self.streams[name, number] = stream
        self.taken += 1
        return stream.group()

    def get_state(self):
        """The number of groups taken, and the positions of the streams that have moved."""
        positions = {name: dict(known) for name, known in self.positions.items()}
        for (name, number), stream in self.streams.items():
            positions.setdefault(name, {})[str(number)] = stream.position
        return {"groups": self.taken, "streams": positions}

    def set_state(self, state):
        """Goes on from a state of `get_state`."""
        self.taken, self.positions, self.streams = state["groups"], state["streams"], {}


class PackedBatches:
    """An endless, resumable iterator of a share of the packed batches.

    Args:
      sources: see PackedGroups.
      weights: by which the batches are drawn from the sources.
      config: the whole config.
      share: which share; one after the other they are the batch, whatever their number.
      shares: how many there are.
    """

    def __init__(self, sources, weights, config, share, shares):
        numbers = [grain.MapDataset.source([place]).repeat() for place in range(len(sources))]
        self.sources, self.order = sources, grain.MapDataset.mix(numbers, weights)
        self.count = config.batch_size // config.data.packing.images
        own = self.count // shares
        self.streams = range(share * own, (share + 1) * own)
        # As many workers as get an equal part of the streams each.
        workers = range(min(config.data.workers, own) + 1)
        self.workers = max(n for n in workers if n == 0 or own % n == 0)
        self.prefetch = config.data.prefetch
        self.start({"batches": 0, "streams": {}})

    def start(self, state):
        """Sets out from a state, as `get_state` gives it."""
        own = {str(number) for number in self.streams}
        self.batches, self.positions = state["batches"], {}
        for name, known in state["streams"].items():
            self.positions[name] = {key: row for key, row in known.items() if key in own}
        groups = PackedGroups(self.sources, self.order, self.streams, self.count, self.get_state())
        if self.workers:
            ahead = max(1, self.prefetch * len(own) // self.workers)
            groups = groups.mp_prefetch(
                grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=ahead),
                worker_init_fn=prepare,
            )
        self.groups = iter(groups)

    def __next__(self):
        parts = [next(self.groups) for _ in self.streams]
        # Copies: what comes from a worker lies in memory shared with it.
        batch = {
            name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]
        }
        self.batches += 1
        name = tuple(self.sources)[batch["source"][0]]
        rows = batch["data_position"].tolist()
        self.positions[name] = {str(a): row for a, row in zip(self.streams, rows, strict=True)}
        return batch

    def get_state(self):
        """Where the batches are that were handed out; what was made ahead does not count.

        Returns:
          `batches`, how many they are, and `streams`: by the source's name and the stream's number
          the rows of `data_position`, as far as they have moved. The states of all shares, merged,
          are the whole one, which is the same for any number of shares and workers; as JSON.
        """
        streams = {name: dict(known) for name, known in self.positions.items()}
        return {"batches": self.batches, "streams": streams}

    def set_state(self, state):
        """Goes on from a whole state."""
        self.close()
        self.start(state)

    def close(self):
        """Ends the workers."""
        self.groups.close()
