"""A small run that is killed again and again, beside the same run left alone.

Every start is a process of its own, forked from one that has imported all and touched nothing:
so it begins as a new process would, without the seconds that imports take.
"""

import json
import multiprocessing
import os
import random
import time
from multiprocessing import resource_tracker
from pathlib import Path

import jax
import numpy as np
from absl import flags

from mmgem_jax import run, sharding, train_state
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.sharding import path_name
from mmgem_jax.train import train

IMPORTED_LATE = ["mmgem_jax.tensorboard_file", "transformers.models.auto.tokenization_auto"]
LOOKS_EVERY = 0.005  # seconds between two looks at what a run has written
LIMIT = 300  # seconds after which a start is taken to hang
QUICK_COMPILATION = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"

# ---- a start -------------------------------------------------------------------------------------


def begin(config, workdir, workers):
    """Starts, or goes on with, a run in a process of its own; returns the process.

    What it says is in `workdir.log`. Its data workers are in its session, and no one else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmgem_jax.train", *IMPORTED_LATE])
    config = config.copy_and_resolve_references()
    config.data.workers = workers
    process = context.Process(target=train_alone, args=(config, str(workdir)))
    process.start()
    return process


def train_alone(config, workdir):
    """Trains on one CPU device, in a session of its own."""
    os.setsid()
    with open(f"{workdir}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    resource_tracker._resource_tracker._fd = None  # it shall have its own, as a new process has
    os.environ["XLA_FLAGS"] = QUICK_COMPILATION
    flags.FLAGS(["train"])  # grain asks for parsed flags
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    train(config, workdir)


def wait_for_step(process, workdir, step, before):
    """Waits until a start has written metrics of this step, or ends; returns the seconds it took.

    Args:
      before: `metrics_file` as it was before the start.
    """
    began = time.monotonic()
    while last_step(workdir, before) < step and process.is_alive():
        if time.monotonic() - began > LIMIT:
            raise TimeoutError(f"no step {step} in {workdir} after {LIMIT} seconds")
        time.sleep(LOOKS_EVERY)
    return time.monotonic() - began


def finish(process, workdir):
    """Waits for the end of a run that is to end well."""
    process.join(LIMIT)
    if process.exitcode != 0:
        process.kill()
        said = Path(f"{workdir}.log").read_text()[-2000:]
        raise RuntimeError(f"a start ended with {process.exitcode}, not 0:\n{said}")


def processes_of(session):
    """The processes of a session by id, without those that only wait to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


# ---- what it leaves ------------------------------------------------------------------------------


def lines_of(workdir):
    """The whole lines of metrics, without what depends on the clock."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def metrics_file(workdir):
    """Which file holds a run's metrics, or None: every start begins another."""
    path = Path(workdir) / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def last_step(workdir, before):
    """The last step with metrics; 0 where the file is still the one that was there before."""
    if metrics_file(workdir) == before:
        return 0
    return max((line["step"] for line in lines_of(workdir)), default=0)


def saved_step(workdir):
    """The step of the newest complete checkpoint, and the saves that have begun and not ended."""
    paths = list((Path(workdir) / "checkpoints").glob("*"))
    steps = [int(path.name) for path in paths if path.name.isdecimal()]
    unfinished = [path for path in paths if not path.name.isdecimal()]
    return max(steps, default=0), {(path.name, path.stat().st_mtime_ns) for path in unfinished}


def states_of(config, workdirs):
    """The arrays of runs' newest checkpoints by path: parameters, optimizer, counters."""
    config = run.complete(config, run.load_run_tokenizer(config))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model = run.build_model(config.model)
    optimizer, shapes = make_optimizer(config.optimizer), run.batch_shapes(config)
    average = config.average_decay > 0
    abstract = train_state.abstract_state(model, optimizer, average, shapes, mesh)
    found = []
    for workdir in workdirs:
        with Checkpoints(workdir) as checkpoints:
            state = checkpoints.restore_params(abstract)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        found.append({path_name(path): np.asarray(leaf) for path, leaf in leaves})
    return found


def differences(config, one, other):
    """What is not bit for bit the same in two runs: steps of metrics, and arrays of the state."""
    lines, others = lines_of(one), lines_of(other)
    found = [f"step {a['step']}" for a, b in zip(lines, others, strict=False) if a != b]
    if len(lines) != len(others):
        found.append(f"{len(lines)} lines and {len(others)}")
    states = states_of(config, (one, other))
    for name in sorted(set(states[0]) | set(states[1])):
        a, b = (state.get(name) for state in states)
        if a is None or b is None or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            found.append(name)
    return found


# ---- the kills -----------------------------------------------------------------------------------


class Killer:
    """Kills the starts of one run by SIGKILL, and knows what each was about.

    Args:
      pace: seconds of a step that is saved. A start is killed within four of them after its first
        step, so that some are saved and the run gets on, or within half of one after its last.
      seed: of the moments.

    Attributes:
      killed_in: how many were killed in start-up, in a step, while saving and at the end.
      starts: how many there were; of them
      with_workers: how many had a data worker.
      orphaned: the longest that workers have outlived their run, in seconds.
    """

    def __init__(self, config, workdir, pace, seed):
        self.config, self.workdir, self.pace = config, workdir, pace
        self.random = random.Random(seed)
        # Seconds by the number of workers, measured as we go; of a whole run, those of all of it.
        self.startup = {0: 4.0, 1: 8.0}
        self.killed_in = {"start-up": 0, "step": 0, "saving": 0, "end": 0}
        self.starts = self.with_workers = 0
        self.orphaned = 0.0

    def kill(self, moment, workers):
        """Goes on with the run and kills it; returns whether it was still there to be killed.

        Args:
          moment: start-up, before its first step; steps, after that; end, after the last step.
          workers: 0 or 1.
        """
        before, (saved, cut_before) = metrics_file(self.workdir), saved_step(self.workdir)
        began, process = time.monotonic(), begin(self.config, self.workdir, workers)
        self.starts, self.with_workers = self.starts + 1, self.with_workers + workers
        if moment == "start-up":
            process.join(self.random.uniform(0, self.startup[workers]))
        else:
            first = saved + 1 if moment == "steps" else self.config.steps
            seconds = wait_for_step(process, self.workdir, first, before)
            if first == saved + 1:
                self.startup[workers] = seconds
            paces = 4 if moment == "steps" else 0.5
            process.join(self.random.uniform(0, paces * self.pace))
        process.kill()
        process.join()
        self.wait_for_workers(process.pid)
        if process.exitcode >= 0:
            finish(process, self.workdir)
            self.startup[workers] = min(self.startup[workers], time.monotonic() - began)
            return False
        now, cut = saved_step(self.workdir)
        if now < saved:
            raise RuntimeError(f"{self.workdir}: step {saved} was saved and is gone")
        place = "saving" if cut - cut_before else self.place(saved, before)
        self.killed_in[place] += 1
        return True

    def place(self, saved, before):
        """What a start was about that began at step `saved`, of another file of metrics."""
        step = last_step(self.workdir, before)
        if step == self.config.steps:
            return "end"
        return "step" if step > saved else "start-up"

    def wait_for_workers(self, session):
        """Waits until a killed run has no process left."""
        began = time.monotonic()
        while processes_of(session):
            if time.monotonic() - began > LIMIT:
                raise TimeoutError(f"processes of {self.workdir} are left after {LIMIT} seconds")
            time.sleep(LOOKS_EVERY)
        self.orphaned = max(self.orphaned, time.monotonic() - began)


def kill_often(config, folder, kills, seed=0):
    """Kills a run so many times and lets it finish, beside one left alone, both in the folder.

    In turns it is killed in start-up and among its steps, the last tenth at its end; every fifth
    start has a data worker. A run that is whole too early is killed in start-up.

    Args:
      config: of a run of some two steps a kill.
      folder: for both.
      kills: how many.
      seed: of their moments.

    Returns:
      A dict: `kills`, `bitwise_equal`, `differences` of the two, and the Killer's attributes.
    """
    alone, killed = folder / "alone", folder / "killed"
    process = begin(config, alone, 0)
    wait_for_step(process, alone, 1, before=None)
    began = time.monotonic()
    finish(process, alone)
    pace = (time.monotonic() - began) / config.steps
    killer, done = Killer(config, killed, pace, seed), 0
    while done < kills:
        moment = "end" if done >= kills - max(1, kills // 10) else ("steps", "start-up")[done % 2]
        if saved_step(killed)[0] == config.steps:
            moment = "start-up"
        done += killer.kill(moment, int(killer.starts % 5 == 0))
        if killer.starts > 2 * kills:
            raise RuntimeError(f"{done} kills in {killer.starts} starts; expected more")
    finish(begin(config, killed, 0), killed)
    found = differences(config, alone, killed)
    return {
        "kills": done,
        "bitwise_equal": not found,
        "differences": found[:20],
        "steps": config.steps,
        "killed_in": killer.killed_in,
        "starts": killer.starts,
        "with_workers": killer.with_workers,
        "orphaned_seconds": killer.orphaned,
    }
