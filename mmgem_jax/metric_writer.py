"""Metrics of a run: metrics.jsonl and TensorBoard, one set of names in both."""

import json
import math
from pathlib import Path

from mmgem_jax import processes
from mmgem_jax.damage import warn
from mmgem_jax.errors import writing


class MetricWriter:
    """Writes flat dicts of floats; of several processes the first alone does.

    What is written is on the disk on return. It raises UserError where that cannot be.
    """

    def __init__(self, workdir, resume_step, last_step=None):
        """Opens `workdir/metrics.jsonl`; what will be written again is taken back.

        That is all after `resume_step`, and the evaluation after `last_step`'s checkpoint.
        """
        self.writes = processes.is_first()
        if not self.writes:
            return
        # Here, for data workers import this module: see there.
        from mmgem_jax.tensorboard_file import TensorBoardFile

        self.path, self.folder = Path(workdir) / "metrics.jsonl", Path(workdir) / "tensorboard"
        with writing(self.path):
            kept = kept_lines(self.path, resume_step, last_step)
            # Written whole and then named, so that a kill here loses nothing.
            written = self.path.with_suffix(".jsonl.new")
            written.write_text("".join(json.dumps(record) + "\n" for record in kept))
            written.replace(self.path)
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.shown = TensorBoardFile(self.folder, resume_step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.writes:
            with writing(self.folder):
                self.shown.close()

    def write(self, step, metrics):
        """One JSON object a line, `step` first, and the same scalars for TensorBoard.

        What is not finite is null there.
        """
        if not self.writes:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        # JSON has no name for what is not finite.
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        with writing(self.folder):
            self.shown.write(step, metrics)


def kept_lines(path, resume_step, last_step):
    """The lines of metrics that will not be written again; of a damaged one stderr says so."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["step"] <= resume_step and not is_final(record, last_step):
                kept.append(record)
        except (ValueError, TypeError, KeyError):
            # The last was cut short by a crash, later than any checkpoint that could be resumed.
            if number < len(lines):
                warn(f"{path} line {number}: no metrics of a step; it is dropped")
    return kept


def is_final(record, last_step):
    """Whether a line of metrics is of the evaluation at the end of the run."""
    return record["step"] == last_step and any(name.startswith("eval/") for name in record)
