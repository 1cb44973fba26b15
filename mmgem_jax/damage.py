"""What can be wrong with a checkpoint: found, put in words, agreed on by all, and moved aside."""

import errno
import gc
import itertools
import logging
import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmgem_jax.errors import UserError, first_line

OTHERS_FAIL = 0.05  # seconds in which readings fail that are under way beside one that has failed


def not_orbax_error(record):
    """A filter of log records, without those of errors that orbax then raises.

    It writes a page in each of the threads that an error passes through.
    """
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was saved; the message says how."""


def attempt(reading):
    """What a function that reads with orbax returns, and None; or None, and why it cannot.

    Where one array cannot be read orbax leaves the others to themselves. They fail in their turn,
    and each would put a page on stderr; and what they hold of the devices is to be free again.
    """
    log, hooks = logging.getLogger("asyncio"), (sys.unraisablehook, sys.excepthook)
    disabled, log.disabled = log.disabled, True
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        try:
            return reading(), None
        except Exception as error:  # orbax and tensorstore have no base class for theirs
            problem = reason_of(error)
        time.sleep(OTHERS_FAIL)
        gc.collect()
        return None, problem
    finally:
        log.disabled, (sys.unraisablehook, sys.excepthook) = disabled, hooks


def agree(problem):
    """Raises Damaged in all processes where one of them has a problem, which is text or None."""
    if jax.process_count() > 1:
        sound = multihost_utils.process_allgather(np.bool_(problem is None))
        if problem is None and not sound.all():
            problem = f"process {np.flatnonzero(~sound)[0]} cannot read it"
    if problem is not None:
        raise Damaged(problem)


def reason_of(error):
    """The words of an error, or of what caused it, that fit in a line: the end says most."""
    while error.__cause__:
        error = error.__cause__
    words = first_line(error).partition(" [tensorstore_spec")[0].partition(" [source loc")[0]
    if not isinstance(error, Damaged | OSError):
        words = f"{type(error).__name__}: {words}"
    return words if len(words) <= 120 else f"... {words[-120:]}"


def system_reason(error):
    """What the system said, such as "No space left on device", if an error comes of that."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    known = map(os.strerror, errno.errorcode)  # tensorstore has it in its text alone
    return next((words for words in known if words in str(error)), None)


def move_aside(directory, damaged, used):
    """Moves damaged steps out of a folder of checkpoints, into `damaged` beside it; says so.

    Args:
      directory: the folder.
      damaged: by step, what is wrong with it.
      used: the step that is used instead.

    Raises:
      UserError: a step cannot be moved.
    """
    for step, reason in damaged.items():
        what = f"checkpoint {directory}: step {step} is damaged ({reason})"
        aside = free_path(directory.parent / "damaged" / str(step))
        try:
            aside.parent.mkdir(exist_ok=True)
            (directory / str(step)).rename(aside)
        except OSError as error:
            raise UserError(f"{what}, and cannot be moved to {aside}: {error.strerror}") from None
        warn(f"{what}; step {used} is used instead, and the damaged one is now {aside}")


def free_path(path):
    """The path, or where it is taken the first of path.1, path.2, ... that is not."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def warn(message):
    """Prints a line on stderr."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
