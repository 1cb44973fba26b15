"""Several real processes of this machine as the hosts of one run, on CPU devices."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds after which a run is taken to hang
GLOO = (
    r"\[Gloo\] Rank ",
    r"\d",
    " is connected to ",
    r" peer ranks\. ",
    "Expected number of connected peer ranks is : ",
)


def free_port():
    with socket.create_server(("localhost", 0)) as found:
        return found.getsockname()[1]


def run_processes(commands, devices, folder, xla_flags=""):
    """Runs one command a process, all at once; returns what they said, in their order.

    Args:
      commands: arguments of Python, one list a process; the flags of processes.py are added.
      devices: virtual devices of each.
      folder: where they run, and leave what they print.
      xla_flags: XLA_FLAGS of all.

    Returns:
      CompletedProcess of each, and the seconds until the last ended.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # see `run.keep_programs`
        "XLA_FLAGS": xla_flags,
        "NPROC": "32",  # as in conftest.py
    }
    began, port, running = time.monotonic(), free_port(), []
    for process, command in enumerate(commands):
        own = ["--coordinator", f"localhost:{port}", "--process_id", str(process)]
        own += ["--process_count", str(len(commands))]
        out, err = ((folder / f"{name}.{process}").open("w") for name in ("out", "err"))
        arguments = [sys.executable, *map(str, command), *own]
        with out, err:
            running.append(
                subprocess.Popen(arguments, cwd=folder, env=environment, stdout=out, stderr=err)
            )
    try:
        for process in running:
            process.wait(LIMIT)
    finally:
        for process in running:
            process.kill()
    done = [
        subprocess.CompletedProcess(
            process.args,
            process.wait(),
            without_gloo((folder / f"out.{number}").read_text()),
            (folder / f"err.{number}").read_text(),
        )
        for number, process in enumerate(running)
    ]
    return done, time.monotonic() - began


def without_gloo(text):
    """What a process printed, without the lines of the collectives of CPU devices.

    Gloo writes such a line piece by piece, and two of its threads at once mix theirs, so that one
    line has the pieces of both and the other none.
    """
    line = rf"^(?:{'|'.join(GLOO)})*(?:\n|\Z)"
    lines = text.count("[Gloo] Rank ")
    return re.sub(line, "", text, count=lines, flags=re.MULTILINE) if lines else text
