"""The processes of one run: how they find each other, what the first does for all, and their end.

A run on several hosts is the same program started on each of them. On TPU VMs the processes find
each other by themselves; elsewhere the flags say where:

    --coordinator HOST:PORT --process_id I --process_count N

All of them run the same lines in the same order, for what one sends the others wait for. Where one
fails, the others would wait for good: so each watches for word from the others, and all end.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback

import jax
from absl import flags
from jax._src import distributed  # the store of keys and values has no public name

from mmgem_jax.command_line import EXIT_USER_ERROR, report
from mmgem_jax.errors import RunEnded, UserError, first_line

OPTIONS = {
    "coordinator": (str, "HOST:PORT where the first of several processes listens"),
    "process_id": (int, "which of the processes this is, from 0"),
    "process_count": (int, "how many processes the run has"),
}

A_DAY = 24 * 60 * 60 * 1000  # milliseconds
LOOKS_EVERY = 0.5  # seconds between two looks for word of a process that has failed
GRACE = 2.0  # seconds in which a process may fail by itself, of what another has failed of
PATIENCE = 10.0  # seconds that a process which has failed waits for the others to hear of it

LEFT = "mmgem_jax/left"  # where those that leave say why

CALLS = itertools.count()  # of `on_first` and `gathered`; the same in every process
GATHERED = []  # names of what was gathered, until all have read it
ENDING = threading.Lock()  # is held by the thread that ends this process


def define_flags():
    """Declares the flags; returns the function that gives their values."""
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
    holders = {name: define[kind](name, None, what) for name, (kind, what) in OPTIONS.items()}
    return lambda: {name: holder.value for name, holder in holders.items()}


def add_arguments(parser):
    """Declares the same for argparse."""
    add = parser.add_argument_group("one of several processes").add_argument
    for name, (kind, what) in OPTIONS.items():
        add(f"--{name}", type=kind, help=what)


@contextlib.contextmanager
def joined(coordinator=None, process_id=None, process_count=None, heeds_sigterm=False):
    """Within it this process is one of its run's; call it before JAX is asked for its devices.

    Without arguments, and not on a TPU VM, it is the only one, and nothing happens here. Of several
    only the first prints. Where the body raises, all processes end: this one with status 2 after a
    UserError and 1 after anything else, the others, unless they fail of it themselves, with 1. But
    RunEnded, which is to be raised by all alike, is left to the caller when all have come to it.

    Args:
      coordinator: HOST:PORT, a free port of the first process's host.
      process_id: from 0.
      process_count: of the whole run.
      heeds_sigterm: the body asks `preemption.notice`; else SIGTERM ends the process at once.

    Raises:
      UserError: some of the arguments are missing or wrong, or the others cannot be reached.
    """
    join(coordinator, process_id, process_count, heeds_sigterm)
    if count() == 1:
        yield
        return
    ended, run_ended = threading.Event(), None
    threading.Thread(target=watch, args=(ended,), daemon=True).start()
    try:
        with only_first_prints():
            try:
                yield
            except RunEnded as error:
                run_ended = error
        # Whoever comes here first still hears of the others' failures.
        on_first(lambda: None)
        ended.set()
    except BaseException as error:
        ended.set()
        with ENDING:
            leave(*told(error))
    if run_ended:
        raise run_ended


def join(coordinator, process_id, process_count, heeds_sigterm=False):
    """Finds the other processes, if there are any."""
    given = {"coordinator": coordinator, "process_id": process_id, "process_count": process_count}
    missing = [name for name, value in given.items() if value is None]
    # It takes SIGTERM for a notice: where none is heeded, the process would not end by it.
    jax.config.update("jax_enable_preemption_service", heeds_sigterm)
    if len(missing) == len(given):
        if on_tpu_vm():
            join_on_tpu_vm()
        return
    if missing:
        raise UserError(
            f"--{missing[0]}: found none; expected --coordinator, --process_id and "
            "--process_count together, or none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator: found {coordinator!r}; expected HOST:PORT")
    if process_count < 1:
        raise UserError(f"--process_count: found {process_count}; expected 1 or more")
    if not 0 <= process_id < process_count:
        raise UserError(f"--process_id: found {process_id}; expected 0 to {process_count - 1}")
    try:  # JAX would crash of a port that is taken, and wait minutes for a host that is none
        if process_id == 0:
            socket.create_server(("", int(port))).close()
        else:
            socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise UserError(
            f"--coordinator {coordinator}: {first_line(error)}; expected the host of process 0, "
            "and a free port there"
        ) from None
    jax.distributed.initialize(coordinator, process_count, process_id)


def on_tpu_vm():
    """Whether JAX has found TPU chips as it was imported, and is to use them."""
    wanted = platforms()
    found = os.environ.get("TPU_ML_PLATFORM") == "JAX"
    return found and (not wanted or "tpu" in wanted.split(","))


def platforms():
    """What JAX is told to run on, such as tpu,cpu; nothing where it chooses."""
    return jax.config.jax_platforms


def join_on_tpu_vm():
    """Joins the processes of a slice, or of several: JAX asks the VM, or GKE, for them."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        # Chips that nobody says belong to a slice: those of one host.
        if "coordinator_address should be defined" not in str(error):
            raise


@contextlib.contextmanager
def only_first_prints():
    """Within it what other processes than the first print is dropped; errors are not."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def count():
    """Of the run's processes."""
    return distributed.global_state.num_processes


def is_first():
    """Whether this is the process that writes and prints, which the only one is too."""
    return distributed.global_state.process_id == 0


def on_first(function):
    """What a function returns, or its UserError, in every process; it runs in the first alone.

    It begins when all processes have come here, and they go on when it has ended.

    Args:
      function: without arguments; what it returns is to be fit for JSON.
    """
    if count() == 1:
        return function()
    client, name = distributed.global_state.client, f"mmgem_jax/on_first/{next(CALLS)}"
    client.wait_at_barrier(name, A_DAY)
    if is_first():
        try:
            outcome = {"value": function()}
        except UserError as error:
            outcome = {"error": str(error)}
        client.key_value_set(name, json.dumps(outcome))
    outcome = json.loads(client.blocking_key_value_get(name, A_DAY))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def gathered(value):
    """What each process has, in their order; call it in all.

    The devices have no part in it. There it would wait for the steps under way; and on CPUs, what
    is sent for two programs at once can be taken for one another's.

    Args:
      value: fit for JSON.
    """
    if count() == 1:
        return [value]
    state, name = distributed.global_state, f"mmgem_jax/gathered/{next(CALLS)}"
    state.client.key_value_set(f"{name}/{state.process_id}", json.dumps(value))
    state.client.wait_at_barrier(name, A_DAY)  # all have read what was gathered before
    if is_first():
        while GATHERED:
            state.client.key_value_delete(GATHERED.pop())
        GATHERED.append(name)
    found = dict(state.client.key_value_dir_get(name))
    return [json.loads(found[f"{name}/{process}"]) for process in range(count())]


def check_same(what, value):
    """Raises UserError in a process that has another value, fit for JSON, than the first."""
    first = on_first(lambda: value)
    if json.loads(json.dumps(value)) != json.loads(json.dumps(first)):
        process = distributed.global_state.process_id
        raise UserError(
            f"{what}: not the same in process {process} as in the first; expected one command, "
            "one config and the same files on every host"
        )


# ---- the end of all ------------------------------------------------------------------------------


def told(error):
    """Tells the user of an error; returns a line for the other processes, and the exit status."""
    state = distributed.global_state
    who = f"process {state.process_id} of {state.num_processes} failed"
    if isinstance(error, UserError):
        report(error)
        return f"{who}: {error}", EXIT_USER_ERROR
    if isinstance(error, SystemExit):
        return f"{who}: exit status {error.code}", error.code if isinstance(error.code, int) else 1
    traceback.print_exc()
    return f"{who}: {type(error).__name__}: {first_line(error)}", 1


def watch(ended):
    """Ends this process when it hears that another has failed, unless it has `ended` by then."""
    while not ended.wait(LOOKS_EVERY):
        try:
            lines = those_that_left()
        except Exception:  # the first process, which holds the store, is gone without a word
            lines = ["the first process is gone"]
        if lines and not ended.wait(GRACE):
            with ENDING:
                report(lines[0])
                leave(lines[0], 1)


def leave(line, status):
    """Ends this process at once, after all others have heard the line that says why.

    The exit that JAX provides for waits for the others: for minutes where they wait for this one.
    """
    state = distributed.global_state
    with contextlib.suppress(Exception):  # the first process, which holds the store, may be gone
        state.client.key_value_set(f"{LEFT}/{state.process_id}", line)
        end = time.monotonic() + PATIENCE
        while len(those_that_left()) < state.num_processes and time.monotonic() < end:
            time.sleep(LOOKS_EVERY / 2)
        if is_first():
            time.sleep(2 * LOOKS_EVERY)  # the others still look into it
    for child in multiprocessing.active_children():  # those that make batches
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def those_that_left():
    """The lines of the processes that have left: each says which was the first to fail, and why."""
    return [line for _, line in distributed.global_state.client.key_value_dir_get(LEFT)]
