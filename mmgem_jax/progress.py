"""How a training is getting on: a bar or lines to look at, and where its time goes."""

import contextlib
import sys
import time

import jax
from tqdm import tqdm

from mmgem_jax import processes, summary


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; and where the time goes."""

    def __init__(self, config, mesh, start):
        self.config, self.step = config, start
        self.devices, self.peak = mesh.size, summary.peak_flops(config, mesh)
        self.bar = None
        if sys.stderr.isatty() and processes.is_first():
            self.bar = tqdm(total=config.steps, initial=start, unit="step", smoothing=0.05)
        self.since, self.waited, self.flops = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """Time within it is time the step waits for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self):
        """Time within it is not training time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def restart(self, step, metrics):
        """Measures from here: the first step, whose results these are, had to be compiled."""
        jax.block_until_ready(metrics)
        if self.bar:
            self.bar.update(step - self.step)
        self.step, self.since, self.waited, self.flops = step, time.perf_counter(), 0.0, 0

    def count(self, flops):
        """A step of so many model FLOPs is under way."""
        self.flops += flops

    def report(self, step, latest):
        """Shows a step; returns its metrics, named for the log, with the speed since the last.

        Args:
          step: steps taken.
          latest: for each source that had a batch since the last report, the newest metrics.
        """
        speed, pace, now = {}, "", time.perf_counter()
        if step > self.step:
            seconds = (now - self.since) / (step - self.step)
            pace = f", {seconds:.2f} s/step"
            rate = self.flops / (now - self.since) / self.devices
            speed = {
                "perf/step_seconds": seconds,
                "perf/images_per_second": self.config.batch_size / seconds,
                "perf/data_wait_share": self.waited / (now - self.since),
                "perf/teraflops_a_device": rate / 1e12,
            }
            if self.peak:
                speed["perf/mfu"] = rate / self.peak
        shown = "; ".join(
            f"{source} {short_losses(metrics)}".strip() for source, metrics in latest.items()
        )
        if self.bar:
            self.bar.update(step - self.step)
            self.bar.set_postfix_str(shown)
        else:
            print(f"step {step}/{self.config.steps}: {shown}{pace}", flush=True)
        self.step, self.since, self.waited, self.flops = step, now, 0.0, 0
        named = {
            "/".join(filter(None, ("train", source, name))): value
            for source, metrics in latest.items()
            for name, value in metrics.items()
        }
        return named | speed

    def say(self, line):
        """A line that does not break the bar."""
        if self.bar:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self):
        """Ends the bar."""
        if self.bar:
            self.bar.close()


def short_losses(metrics):
    """The losses of a step in a few words."""
    names = [name for name in ("loss", "loss_emb", "loss_gen") if name in metrics]
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in names)
