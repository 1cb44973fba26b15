"""Steps under way: how far the host may run ahead, and what it learns when one is done."""

import json
from collections import deque
from pathlib import Path

import jax

from mmgem_jax import processes
from mmgem_jax.errors import writing
from mmgem_jax.faults import reason_to_stop
from mmgem_jax.run_record import whole_state

LOOKED_AT = ("loss", "grad_norm", "update_skipped", "updates_skipped_in_a_row")


class InFlight:
    """The steps that the devices are still at, and the last that they skipped.

    Attributes:
      reason: why the run should end, in one line; None where it should not.
      skipped: by step, as JSON has them, the last whose update was skipped: its source, loss and
        gradient norm, and the numbers of this process's records.
    """

    def __init__(self, ahead, stop_after):
        """Of none.

        Args:
          ahead: steps that may be under way when the next batch is made; 0: none.
          stop_after: skipped updates in a row that are too many.
        """
        self.ahead, self.stop_after = ahead, stop_after
        self.steps, self.skipped, self.reason = deque(), {}, None

    def add(self, step, metrics, taken):
        """Adds a step; waits until no more than `ahead` are under way.

        Args:
          step: its number.
          metrics: its metrics, on the devices.
          taken: what its batch was taken from: a source's name, and numbers of records.
        """
        self.steps.append((step, metrics, taken))
        self.settle(self.ahead)

    def settle(self, left=0):
        """Waits until so many steps are left."""
        while len(self.steps) > left:
            step, metrics, (source, numbers) = self.steps.popleft()
            jax.block_until_ready(metrics)
            found = jax.device_get({name: metrics[name] for name in LOOKED_AT})
            if found["update_skipped"]:
                self.skipped[str(step)] = {
                    "source": source,
                    "loss": float(found["loss"]),
                    "grad_norm": float(found["grad_norm"]),
                    "records": {str(jax.process_index()): numbers.tolist()},
                }
                self.skipped = dict(list(self.skipped.items())[-self.stop_after :])
            self.reason = self.reason or reason_to_stop(found, self.stop_after)

    def report(self, workdir, step, names_of):
        """Writes the last skipped steps with the names of their records; call it in all processes.

        Args:
          workdir: of the run.
          step: the run's.
          names_of: function from a source's name and numbers of records to names.

        Returns:
          Where it stands.
        """
        of_all, path = whole_state(self.skipped), Path(workdir) / "faults" / f"{step}.json"

        def write():
            for found in of_all.values():
                numbers = [number for part in found["records"].values() for number in part]
                found["records"] = names_of(found["source"], numbers)
                for name in ("loss", "grad_norm"):  # JSON has no name for what is not finite
                    found[name] = str(found[name])
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(of_all, indent=2) + "\n")

        processes.on_first(write)
        return path
