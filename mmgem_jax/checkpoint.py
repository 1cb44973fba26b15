"""Checkpoints: a state and the record of its run in one atomic step. Only this file knows orbax."""

import contextlib
import shutil
from pathlib import Path

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from mmgem_jax import processes
from mmgem_jax.checksums import checksums_on_host, start_checksums
from mmgem_jax.damage import (
    NO_PLACE,
    TROUBLE,
    Damaged,
    move_aside,
    not_orbax_error,
    read_by_all,
    system_reason,
    warn,
)
from mmgem_jax.errors import RunEnded, UserError, writing
from mmgem_jax.kept_steps import BestSteps
from mmgem_jax.run_record import (
    Record,
    check_arrays,
    check_sums,
    check_version,
    described,
    whole_state,
)

HALF_WRITTEN = ".orbax-checkpoint-tmp"  # end of the names of folders of saves under way


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`; a context manager that waits at exit.

    A save is written in the background. An error of it comes up at the next step or at exit.
    """

    def __init__(self, workdir, every=1, keep=None, keep_every=0, best="", keep_best=1, about=None):
        """Opens the folder, which is made where there is none.

        Args:
          workdir: of the run; shared by all processes.
          every: multiples of it are saved; 0: none.
          keep: how many of the newest steps are kept; None or 0: all.
          keep_every: steps that are multiples of it are kept too; 0: no others.
          best: a metric of `save`'s scores; the steps with its highest values are kept too. With
            "-" before it, the lowest; "": none.
          keep_best: how many of those.
          about: a dict, fit for JSON, of what the run is; it becomes part of every step's record.

        Raises:
          UserError: the folder cannot be made, or another process sees other steps there.
        """
        self.directory = Path(workdir).absolute() / "checkpoints"
        self.every, self.about, self.saving = every, about, None
        self.best = BestSteps(best, keep_best)
        logging.get_absl_logger().addFilter(not_orbax_error)
        with writing(f"checkpoint {self.directory}"):
            self.directory.mkdir(parents=True, exist_ok=True)
        policy = preservation_policy(keep, keep_every, self.best)
        self.checkpointer = ocp.training.Checkpointer(
            str(self.directory), preservation_policy=policy
        )
        processes.check_same(f"the steps in {self.directory}", self.steps)
        if best:
            self.best.scores |= self.saved_scores()

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        try:
            with self.writing(self.saving):
                self.checkpointer.close()
        except UserError as failure:
            if error is None or isinstance(error, RunEnded):  # which says that all is saved
                raise
            if str(error) != str(failure):  # else a save has said it
                warn(failure)

    @property
    def steps(self):
        """The complete steps that there are, the newest last."""
        return [checkpoint.step for checkpoint in self.checkpointer.checkpoints]

    @property
    def latest_step(self):
        """The newest complete step, or None."""
        return max(self.steps, default=None)

    def name(self, step):
        """What an error calls a step."""
        return f"checkpoint {self.directory}: step {step}"

    def saved_scores(self):
        """The scores of every step that has them; the same in all processes."""
        scores = {}
        for step in self.steps:
            with contextlib.suppress(Damaged):  # it has none
                scores[step] = self.record(step)["scores"]
        return scores

    # ---- saving ----------------------------------------------------------------------------------

    def save(self, step, state, batches, last=False, scores=None):
        """Saves in the background when it is time to, or in any case where it is the last.

        Call it after every step: an error of the save before comes up as soon as that has ended. It
        waits for the save before and for the copy off the devices, not for the disk.

        Args:
          step: steps taken.
          state: the TrainState; it may be donated right after.
          batches: the data iterator, whose position is saved. In all processes, since of packed
            rows each knows of its own streams alone.
          scores: floats by name, of this step's evaluation, if there was one.

        Raises:
          UserError: this step or the one before cannot be written, or no score is named as `best`;
            then the step is saved.
        """
        due = last or (self.every and step % self.every == 0)
        if due or not self.checkpointer.is_saving_in_progress():
            with self.writing(self.saving):
                self.checkpointer.wait()
        if not due:
            return
        scores = {name: float(value) for name, value in (scores or {}).items()}
        self.saving, self.best.scores[step] = step, scores
        data, checksums = whole_state(batches.get_state()), start_checksums(state)
        items = self.items(step, state, checksums, data, scores)
        with self.writing(step):
            processes.on_first(lambda: self.make_ready(step))
            self.checkpointer.save_checkpointables_async(step, items, force=True)
        self.best.check(scores)

    def save_params(self, step, params):
        """Saves parameters alone, from which a training may start; they are there on return.

        Little memory is taken beside the parameters' own: they are written one after the other.
        """
        state = {"params": params}
        items = self.items(step, state, checksums_on_host(state))
        context = ocp.Context()
        at_once = max(leaf.nbytes for leaf in jax.tree.leaves(params)) + 1  # below it, orbax says
        context.memory_options.deepcopy_host_arrays = False
        context.array_options.saving.storage_options.chunk_byte_size = 8 * 2**20
        context.memory_options.transfer_concurrent_bytes = at_once
        context.memory_options.write_concurrent_bytes = at_once
        with context, self.writing(step):
            self.checkpointer.save_checkpointables(step, items)

    def items(self, step, state, checksums, data=None, scores=None):
        """What a step holds."""
        record = {"step": step, "about": self.about, "scores": scores or {}, "data": data}
        record["arrays"] = described(state)
        return {"state": state, "run": Record(record, checksums)}

    def make_ready(self, step):
        """Removes what saves that were killed have left, and tries whether the step can be begun.

        Orbax would find out too late: its threads, and with them the process, wait minutes for the
        step's folder. No save is under way here; a reader removes nothing, for in a run it may be.
        """
        for path in self.directory.glob("*" + HALF_WRITTEN):
            shutil.rmtree(path, ignore_errors=True)
        probe = self.directory / f"{step}{HALF_WRITTEN}"
        probe.mkdir()
        probe.rmdir()

    @contextlib.contextmanager
    def writing(self, step):
        """Within it an error that the system gave as the step was written becomes a UserError."""
        try:
            yield
        except Exception as error:
            if not (reason := system_reason(error, TROUBLE + NO_PLACE)):
                raise
            self.checkpointer.reload()  # orbax has struck off what was to give way to the step
            newest = f"the newest whole one is step {self.latest_step}"
            raise UserError(
                f"{self.name(step)} could not be written: {reason}; "
                f"{newest if self.steps else 'there is no whole one'}"
            ) from error

    # ---- restoring -------------------------------------------------------------------------------

    def restore(self, abstract, batches):
        """The newest whole state; moves `batches` to its position.

        A step that cannot be read, or holds other values than were saved, is damaged: the one
        before is taken, and a line on stderr says so. Damaged ones are then moved to
        `workdir/damaged`, where nothing is in the way of saving those steps again.

        Args:
          abstract: a TrainState of shapes, dtypes and shardings: how the state is to be laid out.
          batches: the data iterator.

        Returns:
          The state, and the step it is of.

        Raises:
          UserError: the arrays are not those of this config, there is no whole step, or the system
            does not let one be read; then nothing is moved.
        """
        damaged = {}
        for step in reversed(self.steps):
            try:
                state, record = self.read(step, abstract)
                break
            except Damaged as reason:
                damaged[step] = str(reason)
        else:
            reason = f"all damaged; the newest: {max(damaged.items())[1]}" if damaged else "none"
            raise UserError(
                f"checkpoint {self.directory}: expected a whole step; of {self.steps} {reason}"
            )
        if damaged:
            processes.on_first(lambda: move_aside(self.directory, damaged, step))
            self.checkpointer.reload()
        batches.set_state(record["data"])
        return state, step

    def restore_params(self, abstract, step=None):
        """Part of a state, for evaluation: of the newest step, or of the one given.

        Args:
          abstract: a TrainState, or a dict of some of its fields; nothing else is read.
          step: one of `steps`.

        Raises:
          UserError: there is no such step, it is damaged, or its arrays are not `abstract`'s.
        """
        step = self.latest_step if step is None else step
        if step not in self.steps:
            raise UserError(
                f"checkpoint {self.directory}: no such complete step; there are {self.steps}"
            )
        try:
            return self.read(step, abstract, partial=True)[0]
        except Damaged as reason:
            earlier = [self.directory / str(other) for other in self.steps if other < step]
            instead = (
                f"the one before it is {earlier[-1]}" if earlier else "there is none before it"
            )
            raise UserError(f"{self.name(step)} is damaged ({reason}); {instead}") from None

    def read(self, step, abstract, partial=False):
        """The state of a step and its record; call it in all processes, and all come to the same.

        Raises:
          Damaged: for one of the processes it is not what was saved.
          UserError: the arrays are not those of `abstract`, or for one the system failed.
        """
        what, record = self.name(step), self.record(step)
        check_arrays(self.directory, record["arrays"], abstract, partial)
        state = read_by_all(what, lambda: self.load(step, {"state": abstract}, partial))["state"]
        read_by_all(what, lambda: check_sums(record["arrays"], state))
        return state, record

    def record(self, step):
        """The record of a step, as a dict; call it in all processes. It raises as `read` does."""
        return read_by_all(self.name(step), lambda: self.own_record(step))

    def own_record(self, step):
        """The same as one process reads it."""
        check_version(self.directory / str(step), self.name(step))
        record = self.load(step, {"run": Record()})["run"].fields
        if record["step"] != step:
            raise Damaged(f"it is step {record['step']}")
        return record

    def load(self, step, items, partial=False):
        """Items of a step, as orbax reads them.

        Without orbax's barriers: for one process that fails to read the others would wait minutes.
        """
        context = ocp.Context()
        context.pytree_options.loading.partial_load = partial
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
        with context:
            return self.checkpointer.load_checkpointables(step, items)


def preservation_policy(keep, keep_every, best_steps):
    """Orbax's policy for what `Checkpoints` says is kept, or None for all."""
    policies = ocp.training.preservation_policies
    if not keep:
        return None
    kept = [policies.LatestN(keep), best_steps]
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    return policies.AnyPreservationPolicy(kept)
