"""Batches of padded rows, through grain: the position is a count of batches, and nothing else."""

import grain

from mmgem_jax.data.worker_processes import prepare


class PaddedBatches:
    """An endless, resumable iterator of a share of the padded batches.

    Args:
      examples: for each source an endless grain MapDataset of its examples.
      weights: by which the batches are drawn from the sources.
      config: the whole config.
      share: which share; one after the other they are the batch, whatever their number.
      shares: how many there are.
    """

    def __init__(self, examples, weights, config, share, shares):
        size = config.batch_size // shares
        mixed = [e.batch(size, drop_remainder=True)[share::shares] for e in examples]
        self.dataset = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights)
        self.workers, self.prefetch = config.data.workers, config.data.prefetch
        threads = config.data.read_threads
        self.reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 1))
        self.start({"batches": 0})

    def start(self, state):
        """Sets out from a state, as `get_state` gives it."""
        self.count = state["batches"]
        dataset = self.dataset[self.count :].to_iter_dataset(self.reading)
        if self.workers:
            options = grain.MultiprocessingOptions(
                self.workers, per_worker_buffer_size=self.prefetch
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=prepare)
        self.batches = iter(dataset)

    def __next__(self):
        batch = next(self.batches)
        self.count += 1
        return batch

    def get_state(self):
        """How many batches were handed out, as JSON; what was made ahead does not count."""
        return {"batches": self.count}

    def set_state(self, state):
        """Goes on from a state."""
        self.close()
        self.start(state)

    def close(self):
        """Ends the workers."""
        self.batches.close()
