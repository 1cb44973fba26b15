"""Workers end when the process that trains ends them or is gone, and at no one else's word."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import processes_of

# Takes batches from two workers; then does what its argument says.
PROGRAM = """
import os, signal, sys, time
import grain
import numpy as np
from absl import flags
from mmgem_jax import command_line
from mmgem_jax.data import worker_processes

def batch(number):
    return np.full(100_000, number)  # large enough to come in shared memory

def main(preempted):
    flags.FLAGS(["program"])
    dataset = grain.MapDataset.range(100).map(batch).repeat().to_iter_dataset()
    options = grain.MultiprocessingOptions(2)
    dataset = dataset.mp_prefetch(options, worker_init_fn=worker_processes.prepare)
    batches = iter(dataset)
    assert [int(next(batches)[0]) for _ in range(4)] == [0, 1, 2, 3]
    print("ready", flush=True)
    {act}

if __name__ == "__main__":
    {guard}
"""
PLAIN = "main(None)"
HEEDS = """
    from mmgem_jax import preemption
    with preemption.notice() as preempted:
        main(preempted)
"""
TAKE = "while time.sleep(0.01) is None: next(batches)"


@pytest.fixture
def started(tmp_path):
    """`started(act, guard)`: a program that acts so, in a session of its own, which it ends."""
    running = []

    def start(act, guard=PLAIN):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(act=act, guard=guard))
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, path], stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)
        process.communicate()


def wait_until_ready(process):
    assert process.stdout.readline() == "ready\n", process.stderr.read()


def workers_of(process):
    """Its workers, but not the process by which Python cleans up after all of them."""
    command = "multiprocessing.spawn"
    found = []
    for number in processes_of(process.pid):
        if command in Path(f"/proc/{number}/cmdline").read_text():
            found.append(number)
    return found


def assert_none_left(process, seconds=3.0):
    end = time.monotonic() + seconds
    while left := processes_of(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("act", "status"),
    [("batches.close()", 0), ("raise ValueError('of the program')", 1)],
)
def test_none_is_left_when_the_program_ends(started, act, status):
    process = started(act)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert ("of the program" in said) == bool(status)
    assert "leaked" not in said or "close" not in act  # shared memory
    assert_none_left(process)


def test_none_outlives_a_program_that_is_killed(started):
    process = started("kept = next(batches); time.sleep(600)")
    wait_until_ready(process)
    assert len(workers_of(process)) == 2
    time.sleep(0.5)
    shared = set(re.findall("/dev/shm/psm_.*", Path(f"/proc/{process.pid}/maps").read_text()))
    assert shared
    process.kill()
    process.wait()
    assert_none_left(process)
    assert not [name for name in shared if os.path.exists(name)]


def test_a_worker_that_is_killed_is_one_error(started):
    act = f"""
    with worker_processes.deaths_are_told():
        {TAKE}
"""
    guard = "flags.FLAGS(['program']); command_line.run(lambda: main(None))"
    process = started(act, guard)
    wait_until_ready(process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said
    assert errors[0].startswith("error: data.workers: a worker process died with exit status -9 (")
    assert_none_left(process)


def test_sigterm_to_all_leaves_the_workers_to_the_program(started):
    """From before they are there: it comes again and again while they start."""
    act = "assert preempted(1); [next(batches) for _ in range(20)]; batches.close(); os._exit(0)"
    process = started(act, HEEDS)
    while process.poll() is None and not workers_of(process):
        time.sleep(0.01)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    assert_none_left(process)
