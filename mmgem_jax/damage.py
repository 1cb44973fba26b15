"""What can be wrong with a checkpoint: found, put in words, agreed on by all, and moved aside."""

import errno
import gc
import itertools
import logging
import os
import sys
import time

from mmgem_jax import processes
from mmgem_jax.errors import UserError, first_line

# What the system says when a disk, a network or itself fails: nothing of what is in a file.
TROUBLE = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
TROUBLE += (errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ENODEV, errno.ENOLCK, errno.EREMOTEIO)
TROUBLE += (errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED)
TROUBLE += (errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
# And when there is nowhere to write.
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_PLACE += (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # so JAX says it of a device

OTHERS_FAIL = 0.05  # seconds in which readings fail that are under way beside one that has failed


def not_orbax_error(record):
    """A filter of log records, without those of errors that orbax then raises.

    It writes a page in each of the threads that an error passes through.
    """
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was saved; the message says how."""


def read_by_all(what, reading):
    """What a function returns that reads with orbax; call it in all processes.

    Args:
      what: the step that it reads, for an error.
      reading: the function.

    Raises:
      Damaged: in all processes, where it fails for one of them of what is there.
      UserError: in all processes, where it says so, or fails for one of them of the system, which
        says nothing of what is there.
    """
    found, problem = attempt(what, reading)
    kinds = (type(None), Damaged, UserError)  # the worst decides
    own = kinds.index(type(problem))
    of_all = processes.gathered(own)
    if own < max(of_all):
        other = f"process {of_all.index(max(of_all))} cannot read it"
        damaged = kinds[max(of_all)] is Damaged
        problem = Damaged(other) if damaged else UserError(f"{what}: {other}; expected all to")
    if problem:
        raise problem
    return found


def attempt(what, reading):
    """What a function that reads with orbax returns, and None; or None, and the error it is.

    Where one array cannot be read orbax leaves the others to themselves. They fail in their turn,
    and each would put a page on stderr; and what they hold of the devices is to be free again.
    """
    log, hooks = logging.getLogger("asyncio"), (sys.unraisablehook, sys.excepthook)
    disabled, log.disabled = log.disabled, True
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        try:
            return reading(), None
        except UserError as error:
            problem = UserError(str(error))
        except Exception as error:  # orbax and tensorstore have no base class for theirs
            problem = Damaged(reason_of(error))
            if reason := system_reason(error, TROUBLE):
                problem = UserError(f"{what}: {reason}; nothing was moved; expected to read it")
        time.sleep(OTHERS_FAIL)
        gc.collect()
        return None, problem
    finally:
        log.disabled, (sys.unraisablehook, sys.excepthook) = disabled, hooks


def reason_of(error):
    """The words of an error, or of what caused it, that fit in a line: the end says most."""
    error = causes(error)[-1]
    words = first_line(error).partition(" [tensorstore_spec")[0].partition(" [source loc")[0]
    if not isinstance(error, Damaged | OSError):
        words = f"{type(error).__name__}: {words}"
    return words if len(words) <= 120 else f"... {words[-120:]}"


def system_reason(error, numbers):
    """What the system said, such as "Input/output error", if an error comes of that; else None.

    Args:
      error: an exception, of orbax mostly. Tensorstore has what the system said in its text alone.
      numbers: of the system's errors that count; memory that was not to be had does always.
    """
    for cause in causes(error):
        if isinstance(cause, MemoryError) or OUT_OF_MEMORY in str(cause):
            return first_line(cause)[:120]
        for number in numbers:
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return os.strerror(number)
    return None


def causes(error):
    """An error, what it was raised from, what that was raised from, and so on."""
    return [error, *causes(error.__cause__)] if error.__cause__ else [error]


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
