"""A trace of chosen steps, by jax.profiler, for TensorBoard or Perfetto."""

import contextlib

import jax


class Profiler:
    """Traces `count` steps from step `first` on; each process writes its own part."""

    def __init__(self, folder, first, count):
        """For 0 steps there is no trace, and no folder."""
        self.folder, self.steps = str(folder), range(first, first + count)
        self.tracing = False

    @contextlib.contextmanager
    def step(self, number):
        """Within it a step is dispatched."""
        if self.steps and number == self.steps[0]:
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number, results):
        """Ends the trace after its last step, whose results these are."""
        if self.tracing and number == self.steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self):
        """Ends the trace, where the run ends before it."""
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
