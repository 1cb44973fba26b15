"""In which order records are seen: endless, every epoch all of them, a function of the seed alone.

Any place of an order is computed without those before it, so that a run goes on anywhere, and every
process and worker takes its own share.
"""

import functools
import sys

import grain
import numpy as np


def shuffled(count, seed):
    """All of `count` records shuffled as one: an endless MapDataset of their numbers."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def shuffled_by_shard(counts, window, seed):
    """Shards shuffled, and records among their neighbours: reads stay within a few shards.

    Args:
      counts: records of each shard; their numbers run through shard after shard.
      window: so many records in a row are shuffled among themselves, whatever shards they are of.
      seed: the order's.

    Returns:
      An endless MapDataset of record numbers.
    """
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(ShardOrder(counts, window, seed))


class ShardOrder:
    """Place in an endless order to record number; see `shuffled_by_shard`.

    Holds the orders of the shards and windows used last; pickled, its arguments alone.
    """

    def __init__(self, counts, window, seed):
        self.counts = np.asarray(counts, np.int64)
        self.window, self.seed, self.total = window, seed, int(self.counts.sum())
        self.prepare()

    def prepare(self):
        """Sets up what is not pickled."""
        self.firsts = np.cumsum(self.counts) - self.counts  # number of each shard's first record
        self.of_epoch = functools.lru_cache(maxsize=2)(self.shard_order)
        self.of_window = functools.lru_cache(maxsize=2)(permutation)

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("counts", "window", "seed", "total")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.prepare()

    def __call__(self, place):
        epoch, place = divmod(place, self.total)
        number, within = divmod(place, self.window)
        size = min(self.window, self.total - number * self.window)  # the last one may be shorter
        place += int(self.of_window(size, self.seed, epoch, 1 + number)[within]) - within
        shards, ends = self.of_epoch(epoch)
        turn = int(np.searchsorted(ends, place, side="right"))  # skips shards without records
        shard = shards[turn]
        return int(self.firsts[shard] + place - (ends[turn] - self.counts[shard]))

    def shard_order(self, epoch):
        """The shards in an epoch's order, and where in the epoch each of them ends."""
        shards = permutation(len(self.counts), self.seed, epoch, 0)
        return shards, np.cumsum(self.counts[shards])


def permutation(count, *seeds):
    """A permutation of range(count), int64 [count], by numbers that are not below 0."""
    # Not numpy's own, which may be another in its next version; the generator's bits may not.
    return np.argsort(np.random.PCG64(seeds).random_raw(count), kind="stable")
