"""Steps under way: how far the host may run ahead, and what it learns when one is done."""

import json
from collections import deque
from pathlib import Path

import jax

from mmgem_jax import processes
from mmgem_jax.faults import reason_to_stop

LOOKED_AT = ("loss", "grad_norm", "update_skipped", "updates_skipped_in_a_row")


class InFlight:
    """The steps that the devices are still at, and the last that they skipped.

    Args:
      ahead: steps that may be under way when the next batch is made; 0: none.
      stop_after: skipped updates in a row that are too many.
    """

    def __init__(self, ahead, stop_after):
        self.ahead, self.stop_after = ahead, stop_after
        self.steps, self.skipped = deque(), deque(maxlen=stop_after)

    def add(self, step, metrics, taken):
        """Adds a step; waits until no more than `ahead` are under way.

        Args:
          step: its number.
          metrics: its metrics, on the devices.
          taken: what its batch was taken from: a source's name, and numbers of records.

        Returns:
          Why the run should end, in one line, or None.
        """
        self.steps.append((step, metrics, taken))
        return self.settle(self.ahead)

    def settle(self, left=0):
        """Waits until so many steps are left; returns as `add` does."""
        reason = None
        while len(self.steps) > left:
            step, metrics, (source, numbers) = self.steps.popleft()
            jax.block_until_ready(metrics)
            found = jax.device_get({name: metrics[name] for name in LOOKED_AT})
            if found["update_skipped"]:
                self.skipped.append((step, source, numbers, found))
            reason = reason_to_stop(found, self.stop_after) or reason
        return reason

    def report(self, workdir, step, names_of, gathered):
        """Writes the last skipped steps with the names of their records; returns the file.

        Args:
          workdir: of the run.
          step: the run's.
          names_of: function from a source's name and numbers of records to names.
          gathered: function from JSON of a process to that of all, merged.
        """
        ours = {
            str(at): {
                "source": source,
                "loss": str(found["loss"]),
                "grad_norm": str(found["grad_norm"]),
                "records": {str(jax.process_index()): names_of(source, numbers)},
            }
            for at, source, numbers, found in self.skipped
        }
        of_all, path = gathered(ours), Path(workdir) / "faults" / f"{step}.json"
        if processes.is_first():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(of_all, indent=2) + "\n")
        return path
