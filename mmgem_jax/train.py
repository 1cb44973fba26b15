"""Trains MM-GEM: one straight line from a config to checkpoints, metrics and results.

    python -m mmgem_jax.train --config configs/emoji.py --workdir workdirs/emoji

The same command again resumes where the run stopped. On several hosts it is run on each of them
(mmgem_jax/processes.py), with a workdir that all of them share.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from mmgem_jax import (
    command_line,
    processes,
    run,
    run_folder,
    sharding,
    summary,
    train_state,
    trained_run,
)
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.data.pipeline import sources, training_batches
from mmgem_jax.evaluation.suite import Evaluator, final_evaluation, results_table
from mmgem_jax.flops import train_flops
from mmgem_jax.metric_writer import MetricWriter
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.param_table import param_table
from mmgem_jax.profiler import Profiler
from mmgem_jax.saved_program import fingerprint_of, load_program
from mmgem_jax.train_step import (
    compile_step,
    compiler_options,
    make_conflict_probe,
    make_train_step,
)


def train(config, workdir):
    """Trains to `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The results that are also in `workdir/results.json`.
    """
    # ---- mesh, tokenizer, model, optimizer -----------------------------------------------------
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", config.compile_cache)
    tokenizer = run.load_run_tokenizer(config, workdir)
    config = run.complete(config, tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    run.check_mesh(config, mesh)
    model = run.build_model(config.model)
    optimizer = make_optimizer(config.optimizer)

    # ---- data ----------------------------------------------------------------------------------
    batches = training_batches(config, tokenizer, *sharding.process_share(mesh))
    evaluator = Evaluator(config, model, tokenizer, mesh)

    # ---- state: shapes first, then resumed or made, each shard on its own device -----------------
    shapes = run.batch_shapes(config)
    keep_average = config.average_decay > 0
    abstract = train_state.abstract_state(model, optimizer, keep_average, shapes, mesh)
    shardings = train_state.shardings_of(abstract)
    table = param_table(train_state.boxed_params(model, shapes), mesh)
    fingerprint = fingerprint_of(config, shapes, mesh)
    loaded = config.compiled_step and load_program(config.compiled_step, fingerprint, mesh)
    if config.init_from and not run_folder.has_begun(workdir):
        trained_run.check_start(config, tokenizer)  # before the folder is claimed
    run_folder.claim_workdir(workdir, config, tokenizer)

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)  # ends the workers
        stack.enter_context(sharding.use_mesh(mesh))
        checkpoints = stack.enter_context(
            Checkpoints(workdir, config.checkpoint.every, config.checkpoint.keep)
        )
        start = checkpoints.latest_step or 0
        if start:
            state = checkpoints.restore(abstract, batches)
        elif config.init_from:
            params = trained_run.params_to_start_from(config, tokenizer, abstract.params)
            state = train_state.init_state_from(params, optimizer, abstract)
        else:
            state = train_state.init_state(model, optimizer, abstract, shapes, config.seed)
        writer = stack.enter_context(MetricWriter(workdir, start, config.steps))
        print(table, end="\n\n")
        print(summary.summary(config, mesh, abstract, start), flush=True)

        # ---- loop --------------------------------------------------------------------------------
        train_step = loaded or compile_step(
            make_train_step(model, optimizer, config), shardings, mesh, config.tpu_options
        )
        options = compiler_options(config.tpu_options, mesh)
        probe = jax.jit(make_conflict_probe(model, config), compiler_options=options)
        both = config.loss.embedding_weight and config.loss.generation_weight
        probe_every = config.log.conflict_every if both else 0
        log = config.log
        profiler = Profiler(Path(workdir) / "profile", log.profile_from, log.profile_steps)
        stack.callback(profiler.close)
        progress = Progress(config, mesh, start)
        before, latest, flops, names = None, {}, {}, tuple(sources(config.data))
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                rows = next(batches)
                source = names[rows["source"][0]]
                batch = sharding.to_global(rows, mesh)
            conflict = probe(state.params, batch) if due(step, probe_every) else {}
            with jax.transfer_guard("disallow"), profiler.step(step):
                state, metrics = train_step(state, batch)
            # The host runs one step ahead and no more: else it would wait for data it need not.
            jax.block_until_ready(before)
            before = metrics
            profiler.after(step, metrics)
            latest[source] = metrics | conflict
            if source not in flops:  # each has batches of its own shape
                flops[source] = sum(train_flops(config, batch).values())
                progress.restart(step, metrics)
            else:
                progress.count(flops[source])
            if due(step, config.log.every) or step == config.steps or conflict:
                writer.write(step, progress.report(step, jax.device_get(latest)))
                latest = {}
            if due(step, config.eval.every) and step < config.steps:
                with progress.paused():
                    for split in config.eval.splits:
                        scores = evaluator.evaluate(state.eval_params, split)
                        writer.write(step, {f"eval/{split}/{k}": v for k, v in scores.items()})
                        progress.say(f"step {step} {split}: {short_scores(scores)}")
            # Last: a run that resumes here finds all that was written of this step.
            checkpoints.save(step, state, batches, last=step == config.steps)
            if due(step, config.checkpoint.every):
                latest = {}  # as in a run that resumes here
        rows = batch = None  # lets go of the memory that the last batch shares with its worker
        progress.close()

        # ---- the end -----------------------------------------------------------------------------
        results = final_evaluation(evaluator, state.eval_params, workdir, config.steps)
        for split, found in results["splits"].items():
            scores = {f"eval/{split}/{k}": v for k, v in found["metrics"].items()}
            writer.write(config.steps, scores)
    print(results_table(results), flush=True)
    return results


def due(step, every):
    """Whether something that happens every so many steps (0: never) happens now."""
    return every > 0 and step % every == 0


def short_scores(scores):
    """The handful of scores worth a line."""
    names = ("retrieval/image_to_text_r1", "retrieval/text_to_image_r1", "caption/exact_match")
    names += ("region_retrieval/text_to_region_r1", "region_caption/exact_match")
    return ", ".join(f"{name} {scores[name]:.3f}" for name in names if name in scores)


def short_losses(metrics):
    """The losses of a step in a few words."""
    names = [name for name in ("loss", "loss_emb", "loss_gen") if name in metrics]
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in names)


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

        Raises:
          FloatingPointError: a loss is not finite.
        """
        for metrics in latest.values():
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {step}")
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


if __name__ == "__main__":
    CONFIG = command_line.define_config()
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    PROCESS = processes.define_flags()

    def main():
        """Trains, as one of the run's processes."""
        with processes.joined(**PROCESS()):
            train(CONFIG.value, WORKDIR.value)

    command_line.run(main)
