"""What a user is told when the input is wrong."""


class UserError(ValueError):
    """A mistake in the input, not in the program.

    The message is one line: the field or file, what was found, what was expected. Every command
    line prints it without a traceback and exits with status 2 (`mmgem_jax.command_line`).
    """


def first_line(error):
    """The first line of what another library's error says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunEnded(Exception):
    """A run that ended before its last step, for a reason that is no mistake; its state is saved.

    Attributes:
      status: the exit status, by which a scheduler can tell why.
    """

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status
