"""Batches as the model is given them, and what was skipped on the way, counted over the run."""

from collections import Counter

import numpy as np

from mmgem_jax import processes
from mmgem_jax.data.broken import CAUSES
from mmgem_jax.data.sources import contents_of, sources, where_is
from mmgem_jax.data.worker_processes import deaths_are_told
from mmgem_jax.errors import UserError

HOST_ONLY = ("record", "skipped", "skipped_record")  # see TrainingExample
WINDOW = 10_000  # examples of a share of the batches in which what is broken is judged
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
        self.contents = {name: contents_of(source) for name, source in records.items()}
        # Else hosts would share batches that are not the same.
        processes.check_same("data", self.contents)
        self.limits = {name: own.max_broken_share for name, own in sources(data).items()}
        self.seen = {name: no_counts() for name in records}
        # Of the window: so that what breaks late is not outweighed by all that was whole before.
        self.judged = dict.fromkeys(records, 0)
        self.broken = {name: Counter() for name in records}
        self.named = {name: [] for name in records}
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
        seen, used, found = self.seen[source], len(self.last[1]), skipped.sum(axis=0).tolist()
        seen[USED] += used
        for cause, number in zip(CAUSES, found, strict=True):
            seen[cause] += number
        if self.judged[source] >= WINDOW:
            self.judged[source], self.broken[source] = 0, Counter()
        broken = self.broken[source]
        self.judged[source] += used + sum(found)
        broken.update(dict(zip(CAUSES, found, strict=True)))
        self.named[source] += first[first >= 0].tolist()
        del self.named[source][:-NAMED]
        if broken.total() <= self.limits[source] * WINDOW:
            return
        names = ", ".join(map(self.records[source].name_of, self.named[source]))
        raise UserError(
            f"{where_is(source)}: {broken.total()} of the last {self.judged[source]} examples are "
            f"broken {dict(+broken)}, such as {names}; expected at most a share of "
            f"{self.limits[source]:g} (max_broken_share) of {WINDOW}"
        )

    def names(self, source, numbers):
        """What to call records of a source, such as those of `last`."""
        return [self.records[source].name_of(int(number)) for number in numbers]

    def counts(self):
        """By source how many examples were used and skipped by this share, under its number."""
        return {str(self.share): {name: dict(seen) for name, seen in self.seen.items()}}

    def get_state(self):
        """Where the batches are; the states of all shares, merged, are the whole one. As JSON."""
        return self.batches.get_state() | {"contents": self.contents, "seen": self.counts()}

    def set_state(self, state):
        """Goes on from a whole state.

        Raises:
          UserError: it is of other data.
        """
        for name, contents in self.contents.items():
            found = state["contents"].get(name)
            if found != contents:
                raise UserError(
                    f"{where_is(name)}: files with {contents}; expected {found}, as when the run "
                    "began: others would come in another order"
                )
        # What was counted so far goes on as the first share's.
        before = summed(state["seen"]) if self.share == 0 else {}
        self.seen = {name: no_counts() | before.get(name, {}) for name in self.records}
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
