"""Batches as the model is given them, and what was skipped on the way, counted over the run."""

import numpy as np

from mmgem_jax.data.broken import CAUSES
from mmgem_jax.data.sources import sources, where_is
from mmgem_jax.data.worker_processes import deaths_are_told
from mmgem_jax.errors import UserError

HOST_ONLY = ("record", "skipped", "skipped_record")  # see TrainingExample
FEWEST = 1000  # examples that a share is of: fewer say little
NAMED = 5  # broken records that an error names
USED = "used"  # counted beside the causes


class CountedBatches:
    """A resumable iterator of batches without the entries that are for the host.

    Args:
      batches: PaddedBatches or PackedBatches, with those entries.
      records: the sources by name.
      data: `config.data`.
      share: which share of the batches they are.

    Attributes:
      last: the source of the last batch, and the numbers of its records in this share.
    """

    def __init__(self, batches, records, data, share):
        self.batches, self.records, self.share = batches, records, share
        self.limits = {name: own.max_broken_share for name, own in sources(data).items()}
        self.seen = {name: no_counts() for name in records}
        self.broken = {name: [] for name in records}
        self.last = "", np.zeros(0, np.int64)

    def __next__(self):
        with deaths_are_told():
            batch = next(self.batches)
        # Copies: what comes from a worker lies in memory shared with it.
        record, skipped, first = (np.array(batch[name]) for name in HOST_ONLY)
        self.last = list(self.records)[batch["source"][0]], record[record >= 0]
        self.count(self.last[0], skipped, first)
        return {name: value for name, value in batch.items() if name not in HOST_ONLY}

    def count(self, source, skipped, first):
        """Adds a batch to the counts; raises UserError where too much of its source is broken."""
        seen = self.seen[source]
        seen[USED] += len(self.last[1])
        for cause, number in zip(CAUSES, skipped.sum(axis=0).tolist(), strict=True):
            seen[cause] += number
        self.broken[source] += first[first >= 0].tolist()[: NAMED - len(self.broken[source])]
        broken = broken_of(seen)
        total, limit = seen[USED] + broken, self.limits[source]
        if broken <= limit * max(total, FEWEST):
            return
        causes = {cause: seen[cause] for cause in CAUSES if seen[cause]}
        names = ", ".join(map(self.records[source].name_of, self.broken[source]))
        raise UserError(
            f"{where_is(source)}: {broken} of {total} examples are broken {causes}, such as "
            f"{names}; expected at most max_broken_share {limit:g}"
        )

    def names(self, source, numbers):
        """What to call records of a source, such as those of `last`."""
        return [self.records[source].name_of(number) for number in numbers.tolist()]

    def counts(self):
        """By source how many examples were used and skipped by this share, under its number."""
        return {str(self.share): {name: dict(seen) for name, seen in self.seen.items()}}

    def get_state(self):
        """Where the batches are; the states of all shares, merged, are the whole one. As JSON."""
        sizes = {name: len(records) for name, records in self.records.items()}
        return self.batches.get_state() | {"records": sizes, "seen": self.counts()}

    def set_state(self, state):
        """Goes on from a whole state.

        Raises:
          UserError: it is of other data.
        """
        for name, records in self.records.items():
            found = state["records"].get(name)
            if found != len(records):
                raise UserError(
                    f"{where_is(name)}: has {len(records)} records; expected {found}, as when the "
                    "run began: others would come in another order"
                )
        # What was counted so far goes on as the first share's.
        before = summed(state["seen"]) if self.share == 0 else {}
        self.seen = {name: before.get(name, no_counts()) for name in self.records}
        self.batches.set_state(state)

    def close(self):
        """Ends the workers."""
        self.batches.close()


def no_counts():
    """Of nothing seen."""
    return dict.fromkeys((USED, *CAUSES), 0)


def broken_of(seen):
    """How many examples of a source were skipped."""
    return sum(seen[cause] for cause in CAUSES)


def summed(counts):
    """The counts of all shares together, by source."""
    shares = list(counts.values())
    return {
        name: {key: sum(share[name][key] for share in shares) for key in shares[0][name]}
        for name in shares[0]
    }


def skipped_metrics(counts):
    """Metrics of the run so far, from the counts of all shares: examples skipped, by cause.

    A cause that has not occurred is left out.
    """
    metrics = {}
    for name, seen in summed(counts).items():
        prefix, broken = "/".join(filter(None, ("data", name))), broken_of(seen)
        metrics[f"{prefix}/examples"] = seen[USED]
        metrics[f"{prefix}/skipped_share"] = broken / max(broken + seen[USED], 1)
        metrics |= {f"{prefix}/skipped_{c}": seen[c] for c in CAUSES if seen[c]}
    return metrics
