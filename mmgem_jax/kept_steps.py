"""Which checkpoints are kept for their scores."""

import math

from mmgem_jax.errors import UserError


class BestSteps:
    """Keeps the steps with the best values of a metric; one of orbax's preservation policies.

    Orbax's own reads the metrics of all steps as it opens the folder, and fails if one is damaged.

    Attributes:
      scores: floats by name, by step; to be filled by whoever saves.
    """

    def __init__(self, best, count):
        """Of a metric's name, with "-" before it where the lowest is best, and how many steps."""
        self.metric, self.count, self.scores = best.removeprefix("-"), count, {}
        self.sign = -1 if best.startswith("-") else 1

    def check(self, scores):
        """Raises UserError where there are scores, but not the one that decides."""
        if self.metric and scores and self.metric not in scores:
            raise UserError(
                f"checkpoint.best: no metric {self.metric!r}; expected one of {sorted(scores)}"
            )

    def should_preserve(self, checkpoints, *, context):
        """Whether each of the checkpoints, by their `step`, is kept; of equal ones the newer is."""
        del context
        values = {}
        for checkpoint in checkpoints:
            value = self.scores.get(checkpoint.step, {}).get(self.metric, math.nan)
            if math.isfinite(value):
                values[checkpoint.step] = (self.sign * value, checkpoint.step)
        best = sorted(values, key=values.get, reverse=True)[: self.count]
        return [checkpoint.step in best for checkpoint in checkpoints]
