"""Metrics of a run: metrics.jsonl and TensorBoard, one set of names in both."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricWriter:
    """Writes flat dicts of floats; only process 0 should have one."""

    def __init__(self, workdir, resume_step):
        """Opens `workdir/metrics.jsonl`; what was written after `resume_step` is taken back."""
        workdir = Path(workdir)
        self.path = workdir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # A line cut short by a crash is later than every checkpoint that could be resumed.
        kept = [line for line in lines if line.endswith("}")]
        kept = [line for line in kept if json.loads(line)["step"] <= resume_step]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.tensorboard.close()

    def write(self, step, metrics):
        """One JSON object a line, `step` first, and the same scalars for TensorBoard."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
