"""What every command line shares: flags, and one line with exit status 2 for a user's mistake."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mmgem_jax.errors import UserError

EXIT_USER_ERROR = 2


def fail(message):
    """Prints one line, without a traceback, and exits with status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def define_config():
    """Declares `--config FILE.py` and `--config.field=value`; returns the flag's holder."""
    return config_flags.DEFINE_config_file("config", None, "path of a config file")


def parse_flags(argv):
    """absl's flags; a config file may import the files beside it."""
    for i, argument in enumerate(argv):
        if argument.startswith("--config=") or argument == "--config":
            path = argument.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if not os.path.isfile(path):
                fail(f"--config: no file {path!r}")
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(flag_message(error))


def flag_message(error):
    """The line of a parsing error that says what is wrong."""
    lines = [line for line in str(error).strip().strip("'\"").splitlines() if line.strip()]
    if lines and lines[0].startswith("Error whilst parsing config file"):
        return f"--config: {lines[-1]}"
    return lines[0] if lines else type(error).__name__


def run(main, choices=()):
    """Parses the flags and calls main; a UserError becomes one line and exit status 2.

    Args:
      main: called without arguments, or, where there are choices, with the one on the command
        line.
      choices: words of which the command line must have one beside the flags.
    """

    def guarded(argv):
        words = argv[1:]
        if len(words) != bool(choices) or (choices and words[0] not in choices):
            expected = f"one of {', '.join(choices)}" if choices else "flags only"
            fail(f"arguments: found {' '.join(words) or 'none'}; expected {expected}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # absl's default shows orbax at work
        try:
            main(*words)
        except UserError as error:
            fail(error)

    app.run(guarded, flags_parser=parse_flags)
