"""Metrics of a run: metrics.jsonl and TensorBoard, one set of names in both."""

import json
import math
from pathlib import Path

from tensorboardX import SummaryWriter

from mmgem_jax import processes


class MetricWriter:
    """Writes flat dicts of floats; of several processes the first alone does."""

    def __init__(self, workdir, resume_step, last_step=None):
        """Opens `workdir/metrics.jsonl`; what will be written again is taken back.

        That is all after `resume_step`, and the evaluation after `last_step`'s checkpoint.
        """
        self.writes = processes.is_first()
        if not self.writes:
            return
        workdir = Path(workdir)
        self.path = workdir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # A line cut short by a crash is later than every checkpoint that could be resumed.
        records = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [r for r in records if r["step"] <= resume_step and not is_final(r, last_step)]
        # Written whole and then named, so that a kill here loses nothing.
        written = self.path.with_suffix(".jsonl.new")
        written.write_text("".join(json.dumps(record) + "\n" for record in kept))
        written.replace(self.path)
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resume_step + 1,
            filename_suffix=f".{resume_step}",  # else a restart within a second takes its file
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.writes:
            self.file.close()
            self.tensorboard.close()

    def write(self, step, metrics):
        """One JSON object a line, `step` first, and the same scalars for TensorBoard.

        What is not finite is null there.
        """
        if not self.writes:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        # JSON has no name for what is not finite.
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step} | line) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)


def is_final(record, last_step):
    """Whether a line of metrics is of the evaluation at the end of the run."""
    return record["step"] == last_step and any(name.startswith("eval/") for name in record)
