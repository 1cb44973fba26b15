"""Word that the machine will be taken away: SIGTERM, which training heeds at the end of a step.

A scheduler sends it some seconds before it kills, to one host or to all. Of several processes all
stop after the same step, whichever of them were told: JAX's preemption service agrees on it.
"""

import contextlib
import signal
from multiprocessing import resource_tracker

from jax.experimental import multihost_utils

from mmgem_jax import processes

STATUS = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM has ended


@contextlib.contextmanager
def notice():
    """Within it SIGTERM does not end the process; it yields a function that heeds it.

    `preempted(step)`, called by all processes after every step, says whether to stop after this
    one. Any number of SIGTERMs are as one, and one that came before the first step counts. Call it
    in the main thread, before data workers are started: these are born deaf to SIGTERM, for it may
    be sent to them too.
    """
    resource_tracker.ensure_running()  # now, for it unblocks SIGTERM as it starts
    told = []
    # Of several processes JAX's service has a handler of its own, which sees to them all.
    alone = processes.count() == 1
    before = signal.getsignal(signal.SIGTERM)
    if alone:
        signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    # A child inherits what is blocked, but no handler. Another thread may still take the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def preempted(step):
        if not alone:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(told) or signal.SIGTERM in signal.sigpending()

    try:
        yield preempted
    finally:
        # What has not been heeded goes: the steps are over.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTERM, before)
