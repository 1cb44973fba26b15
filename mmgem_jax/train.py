"""Trains MM-GEM: one straight line from a config to checkpoints, metrics and results.

    python -m mmgem_jax.train --config configs/emoji.py --workdir workdirs/emoji

The same command again resumes where the run stopped, or was stopped: SIGTERM ends it after a step,
with a checkpoint and exit status 143. On several hosts it is run on each of them
(mmgem_jax/processes.py), with a workdir that all of them share.
"""

import contextlib
from pathlib import Path

import jax
from absl import flags

from mmgem_jax import (
    command_line,
    preemption,
    processes,
    run,
    run_folder,
    sharding,
    summary,
    train_state,
    trained_run,
)
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.data.counted_batches import skipped_metrics
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.sources import sources
from mmgem_jax.errors import RunEnded
from mmgem_jax.evaluation.suite import Evaluator, final_evaluation, results_table
from mmgem_jax.flops import train_flops
from mmgem_jax.in_flight import InFlight
from mmgem_jax.metric_writer import MetricWriter
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.param_table import param_table
from mmgem_jax.profiler import Profiler
from mmgem_jax.progress import Progress
from mmgem_jax.run_record import whole_state
from mmgem_jax.saved_program import fingerprint_of, load_program
from mmgem_jax.train_step import (
    compile_step,
    compiler_options,
    make_conflict_probe,
    make_train_step,
)

DIVERGED = 1  # exit status of a run whose updates are skipped again and again


def train(config, workdir):
    """Trains to `config.steps`, from the newest checkpoint in `workdir` if there is one.

    Returns:
      The results that are also in `workdir/results.json`.

    Raises:
      RunEnded: the run was asked to stop, or skips its updates; all is saved.
    """
    # ---- mesh, tokenizer, model, optimizer -----------------------------------------------------
    tokenizer = run.load_run_tokenizer(config, workdir)
    config = run.complete(config, tokenizer)
    run.keep_programs(config)
    mesh = sharding.make_mesh(config.mesh)
    run.check_mesh(config, mesh)
    model = run.build_model(config.model)
    optimizer = make_optimizer(config.optimizer)

    # ---- data ----------------------------------------------------------------------------------
    batches = training_batches(config, tokenizer, *sharding.process_share(mesh))
    evaluator = Evaluator(config, model, tokenizer, mesh)

    # ---- shapes of the state, a compiled step if one was kept, the folder ------------------------
    shapes = run.batch_shapes(config)
    keep_average = config.average_decay > 0
    abstract = train_state.abstract_state(model, optimizer, keep_average, shapes, mesh)
    table = param_table(train_state.boxed_params(model, shapes), mesh)
    fingerprint = fingerprint_of(config, shapes, mesh)
    loaded = config.compiled_step and load_program(config.compiled_step, fingerprint, mesh)
    if config.init_from and not run_folder.has_begun(workdir):
        trained_run.check_start(config, tokenizer)  # before the folder is claimed

    with sharding.use_mesh(mesh), contextlib.ExitStack() as whole_run:
        whole_run.enter_context(run_folder.held(workdir))
        about = run_folder.claim_workdir(workdir, config, tokenizer)
        with contextlib.ExitStack() as stack:
            # The first to be entered, so the last to be left: until all is saved and closed.
            preempted = stack.enter_context(preemption.notice())
            in_flight = InFlight(config.data.ahead, config.faults.stop_after)
            position = Position(batches, in_flight)
            stack.callback(batches.close)  # ends the workers
            checkpoints = stack.enter_context(
                Checkpoints(workdir, **config.checkpoint, about=about)
            )

            # ---- state: resumed or made, each shard on its own device ----------------------------
            if checkpoints.steps:
                state, start = checkpoints.restore(abstract, position)
            elif config.init_from:
                params = trained_run.params_to_start_from(config, tokenizer, abstract.params)
                state, start = train_state.init_state_from(params, optimizer, abstract), 0
            else:
                state = train_state.init_state(model, optimizer, abstract, shapes, config.seed)
                start = 0
            writer = whole_run.enter_context(MetricWriter(workdir, start, config.steps))
            print(table, end="\n\n")
            print(summary.summary(config, mesh, abstract, start), flush=True)

            # ---- steps ---------------------------------------------------------------------------
            train_step = loaded or compile_step(
                make_train_step(model, optimizer, config),
                train_state.shardings_of(abstract),
                mesh,
                config.tpu_options,
            )
            options = compiler_options(config.tpu_options, mesh)
            probe = jax.jit(make_conflict_probe(model, config), compiler_options=options)
            log = config.log
            profiler = Profiler(Path(workdir) / "profile", log.profile_from, log.profile_steps)
            stack.callback(profiler.close)
            progress = stack.enter_context(contextlib.closing(Progress(config, mesh, start)))
            both = config.loss.embedding_weight and config.loss.generation_weight
            probe_every = log.conflict_every if both else 0
            latest, flops, names = position.latest, {}, tuple(sources(config.data))
            for step in range(start + 1, config.steps + 1):
                last = step == config.steps
                with progress.waiting():
                    rows = next(batches)
                    source, taken = names[rows["source"][0]], batches.last
                    batch = sharding.to_global(rows, mesh)
                conflict = probe(state.params, batch) if due(step, probe_every) else {}
                with jax.transfer_guard("disallow"), profiler.step(step):
                    state, metrics = train_step(state, batch)
                in_flight.add(step, metrics, taken)
                profiler.after(step, metrics)
                latest[source] = metrics | conflict
                if source not in flops:  # each has batches of its own shape
                    flops[source] = sum(train_flops(config, batch).values())
                    progress.restart(step, metrics)
                else:
                    progress.count(flops[source])
                if due(step, log.every) or last or conflict:
                    skipped = skipped_metrics(whole_state(batches.counts()))
                    writer.write(step, progress.report(step, jax.device_get(latest)) | skipped)
                    latest.clear()
                scores = {}
                if due(step, config.eval.every) and not last:
                    scores = evaluate(evaluator, state, config.eval.splits, writer, progress, step)
                stop = preempted(step)
                # Last: a run that resumes here finds all that was written of this step.
                ending = last or stop or in_flight.reason is not None
                checkpoints.save(step, state, position, last=ending, scores=scores)
                if in_flight.reason:
                    path = in_flight.report(workdir, step, batches.names)
                    raise RunEnded(
                        f"{in_flight.reason}; step {step} is saved, the records are in {path}",
                        DIVERGED,
                    )
                if stop:
                    raise RunEnded(
                        f"SIGTERM: stopped after step {step} of {config.steps}, which is saved; "
                        "the same command goes on",
                        preemption.STATUS,
                    )
            rows = batch = None  # lets go of the memory that the last batch shares with its worker

        # ---- the end: nothing is lost any more, and SIGTERM ends it at once ----------------------
        results = final_evaluation(evaluator, state.eval_params, workdir, config.steps)
        for split, found in results["splits"].items():
            scores = {f"eval/{split}/{k}": v for k, v in found["metrics"].items()}
            writer.write(config.steps, scores)
    print(results_table(results), flush=True)
    return results


class Position:
    """Where a run is beside its state: in the data, and in what it has not yet written.

    Args:
      batches: the data's iterator.
      in_flight: the steps under way.
    """

    def __init__(self, batches, in_flight):
        self.batches, self.in_flight = batches, in_flight
        self.latest = {}  # of every source since the last line of metrics its newest, on devices

    def get_state(self):
        """As JSON; of a process, to be merged with those of the others."""
        self.in_flight.settle()
        latest = {
            source: {name: float(value) for name, value in metrics.items()}
            for source, metrics in jax.device_get(self.latest).items()
        }
        more = {"latest": latest, "skipped": self.in_flight.skipped}
        return self.batches.get_state() | more

    def set_state(self, state):
        """Goes on from the merged states."""
        self.batches.set_state(state)
        self.latest.update(state["latest"])
        self.in_flight.skipped = state["skipped"]


def evaluate(evaluator, state, splits, writer, progress, step):
    """The scores of splits during training, by their names in the metrics, where they are written.

    Args:
      evaluator: an Evaluator.
      state: the TrainState.
      splits: names.
      writer: a MetricWriter.
      progress: a Progress, whose clock stands still meanwhile.
      step: steps taken.
    """
    scores = {}
    with progress.paused():
        for split in splits:
            found = evaluator.evaluate(state.eval_params, split)
            named = {f"eval/{split}/{k}": v for k, v in found.items()}
            writer.write(step, named)
            scores |= named
            progress.say(f"step {step} {split}: {short_scores(found)}")
    return scores


def due(step, every):
    """Whether something that happens every so many steps (0: never) happens now."""
    return every > 0 and step % every == 0


def short_scores(scores):
    """The handful of scores worth a line."""
    names = ("retrieval/image_to_text_r1", "retrieval/text_to_image_r1", "caption/exact_match")
    names += ("region_retrieval/text_to_region_r1", "region_caption/exact_match")
    return ", ".join(f"{name} {scores[name]:.3f}" for name in names if name in scores)


if __name__ == "__main__":
    CONFIG = command_line.define_config()
    WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    PROCESS = processes.define_flags()

    def main():
        """Trains, as one of the run's processes."""
        with processes.joined(**PROCESS(), heeds_sigterm=True):
            train(CONFIG.value, WORKDIR.value)

    command_line.run(main)
