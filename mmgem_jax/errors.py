"""What a user is told when the input is wrong, or the system does not do what it is asked."""

import contextlib


class UserError(ValueError):
    """A mistake in the input, not in the program.

    The message is one line: the field or file, what was found, what was expected. Every command
    line prints it without a traceback and exits with status 2 (`mmgem_jax.command_line`).
    """


def first_line(error):
    """The first line of what another library's error says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def writing(path):
    """Within it what the system says, as something is written there, becomes a UserError.

    That is an OSError; libraries in Rust say the same as `No space left on device (os error 28)`.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: {reason}; expected what can be written") from error


class RunEnded(Exception):
    """A run that ended before its last step, for a reason that is no mistake; its state is saved.

    Attributes:
      status: the exit status, by which a scheduler can tell why.
    """

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status
