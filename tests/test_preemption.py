"""SIGTERM ends a run after a step, with all saved, and the same command goes on bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import many_hosts
import numpy as np
import pytest
from stopped_runs import lines_of, parts_of, reproducible, start, state_of

from mmgem_jax import preemption, summary
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.errors import RunEnded

ROOT = many_hosts.ROOT
STEPS = 80
CHANGES = {
    "steps": STEPS,
    "model.vision.depth": 1,
    "model.vision.unroll": 1,
    "model.decoder.depth": 1,
    "model.decoder.unroll": 1,
    "log.every": 1,
    "log.conflict_every": 0,
    "checkpoint.every": 0,  # so what is there, SIGTERM has saved
    "eval.every": 0,
    "eval.final_splits": (),
    "eval.sample_split": "",
    "eval.pixel_floor": False,
}
ENDED = r"SIGTERM: stopped after step (\d+) of \d+, which is saved; the same command goes on\n"


def flags_of(changes):
    """The flags of `mmgem_jax.train` for a run in the folder `run`, with these changes."""
    given = ["--config", str(ROOT / "configs" / "emoji_fixture.py"), "--workdir", "run"]
    return given + [f"--config.{name}={value}" for name, value in changes.items()]


def steps_of(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.steps


def wait_for_lines(workdir, count):
    """Until a run has written so many lines of metrics."""
    path, end = workdir / "metrics.jsonl", time.monotonic() + many_hosts.LIMIT
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- a notice ------------------------------------------------------------------------------------


def test_a_notice_is_heeded_once_it_came_and_gone_at_the_end():
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with preemption.notice() as preempted:
        assert not preempted(1)
        for step in (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert preempted(step) and preempted(step)
    after = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert after == before


def test_without_a_notice_sigterm_ends_the_process():
    program = """
import os, signal, time
from mmgem_jax import preemption
with preemption.notice() as preempted:
    assert not preempted(1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGTERM


# ---- one process ---------------------------------------------------------------------------------


def terminated_by_itself(patch):
    """SIGTERM comes before the step is compiled."""
    show = summary.summary

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return show(*arguments)

    patch.setattr(summary, "summary", terminated)


def test_a_run_that_is_terminated_twice_ends_as_one_that_was_left_alone(
    emoji_config, tmp_path, quick_compilation
):
    """In start-up; then, as the command that a scheduler runs, twice among its steps."""
    config = emoji_config(CHANGES)
    start(config, tmp_path / "alone", 1)

    with pytest.MonkeyPatch.context() as patch:
        terminated_by_itself(patch)
        with pytest.raises(RunEnded) as ended:
            start(config, tmp_path / "run", 1)
    assert re.fullmatch(ENDED, f"{ended.value}\n")[1] == "1" and ended.value.status == 143
    assert steps_of(tmp_path / "run") == [1]

    own = {"data.dir": config.data.dir, "compile_cache": ""}
    command = [sys.executable, "-m", "mmgem_jax.train", *flags_of(CHANGES | own)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "XLA_FLAGS": quick_compilation,
        "NPROC": "32",  # as in conftest.py: how many threads share a product decides its rounding
    }
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=err)
    wait_for_lines(tmp_path / "run", 4)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    assert process.wait(many_hosts.LIMIT) == 143
    stopped = int(re.fullmatch(ENDED, (tmp_path / "err").read_text())[1])
    assert 4 <= stopped < STEPS
    assert steps_of(tmp_path / "run") == [1, stopped]
    assert lines_of(tmp_path / "run")[-1]["step"] == stopped

    start(config, tmp_path / "run", 1)
    alone, found = (tmp_path / name for name in ("alone", "run"))
    assert reproducible(lines_of(found)) == reproducible(lines_of(alone))
    abstract = parts_of(config)[-1]
    states = state_of(found, abstract), state_of(alone, abstract)
    jax.tree.map(np.testing.assert_array_equal, *states)


# ---- several -------------------------------------------------------------------------------------

# The second process alone is terminated, twice, after some steps.
PROGRAM = """
import os, runpy, signal, sys, threading, time

def terminate():
    while not os.path.exists("run/metrics.jsonl") or len(open("run/metrics.jsonl").readlines()) < 3:
        time.sleep(0.05)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

if sys.argv[sys.argv.index("--process_id") + 1] == "1":
    threading.Thread(target=terminate, daemon=True).start()
runpy.run_module("mmgem_jax.train", run_name="__main__")
"""


def test_where_one_host_is_told_all_stop_after_the_same_step(
    emoji_config, tmp_path, quick_compilation
):
    (tmp_path / "program.py").write_text(PROGRAM)
    own = {"data.dir": emoji_config().data.dir, "compile_cache": "", "steps": 100_000}
    command = ["program.py", *flags_of(CHANGES | own)]
    done, _ = many_hosts.run_processes([command] * 2, 1, tmp_path, quick_compilation)
    assert [process.returncode for process in done] == [143, 143], done
    # JAX and orbax log the signal too.
    said = [re.search("SIGTERM: .*\n", process.stderr)[0] for process in done]
    assert said[0] == said[1]
    stopped = int(re.fullmatch(ENDED, said[0])[1])
    assert 3 <= stopped < 100_000 and steps_of(tmp_path / "run") == [stopped]
    assert lines_of(tmp_path / "run")[-1]["step"] == stopped
