"""How long a save of a config's state holds up a step, and how long it is written after that."""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from measure import OurStep, row

from mmgem_jax import run
from mmgem_jax.checkpoint import Checkpoints

ROUNDS = 5


class NoData:
    """A data iterator that is nowhere."""

    def get_state(self):
        """As JSON."""
        return {}


def benchmark_checkpoint(config):
    """Rows on saving the state of a config, with random parameters."""
    config = run.complete(config, run.load_run_tokenizer(config))
    shapes = run.batch_shapes(config)
    step = OurStep(config, {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()})
    times = {"blocked": [], "copied": [], "written": []}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=1) as checkpoints:
        for number in range(1, ROUNDS + 2):
            began = time.perf_counter()
            copies = jax.tree.map(lambda x: np.array(x, copy=True), step.state)
            times["copied"].append(time.perf_counter() - began)
            began = time.perf_counter()
            checkpoints.save(number, step.state, NoData())
            times["blocked"].append(time.perf_counter() - began)
            checkpoints.checkpointer.wait()
            times["written"].append(time.perf_counter() - began)
    # The first compiles the checksums.
    found = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    copied = found["copied"], "the copy off the devices"
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(copies))
    return [
        row("state", size / 2**20, "MiB"),
        row("a save holds up a step for", found["blocked"], "s", *copied),
        row("and is on the disk after", found["written"], "s", *copied),
    ]
