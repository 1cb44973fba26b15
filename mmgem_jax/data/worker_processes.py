"""The processes that make batches: they live and die as the process that trains says."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading

from mmgem_jax.errors import UserError


def prepare(index, count):
    """What a worker does first; grain's `mp_prefetch(..., worker_init_fn=prepare)`.

    A scheduler's SIGTERM and a terminal's Ctrl-C reach all processes of a group: the worker
    leaves them to the process that trains, which ends it when it is done. It ends by itself when
    that process is gone, however that was killed.

    Args:
      index: of this worker, and
      count: of all; neither matters here.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Not prctl(PR_SET_PDEATHSIG): it would go by the thread that started the worker, not the
    # process, and grain starts some of them in threads that end soon.
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(parent):
    """Waits for the end of the process that trains, and ends this one."""
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def deaths_are_told():
    """Within it a worker that was killed is a UserError instead of grain's RuntimeError.

    Raises:
      UserError: a worker died without an error of its own.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"Worker process was terminated .* exit code (-?\d+)", str(error))
        if not found:
            raise
        raise UserError(
            f"data.workers: a worker process died with exit status {found[1]} (-9: it was killed, "
            "as the system does where memory runs out); expected it to live: fewer workers, or a "
            "smaller data.prefetch, take less memory"
        ) from None
