"""What every command line shares: flags, and one line with exit status 2 for a user's mistake."""

import os
import re
import runpy
import sys
import textwrap
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mmgem_jax.errors import RunEnded, UserError

EXIT_USER_ERROR = 2


def report(message):
    """Prints an error as one line, without a traceback."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message):
    """Prints one line and exits with status 2."""
    report(message)
    sys.exit(EXIT_USER_ERROR)


def define_config(required=True):
    """Declares `--config FILE.py` and `--config.field=value`; returns the flag's holder."""
    holder = config_flags.DEFINE_config_file("config", None, "path of a config file")
    if required:
        flags.mark_flag_as_required("config")
    return holder


def parse_flags(argv):
    """absl's flags; a config file may import the files beside it."""
    for i, argument in enumerate(argv):
        if argument.startswith("--config=") or argument == "--config":
            path = argument.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if not os.path.isfile(path):
                fail(f"--config: no file {path!r}")
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
            check_overrides(load_config_file(path), argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)


def load_config_file(path):
    """What the file's `get_config()` returns; whatever goes wrong in it becomes one line."""
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):  # the file at fault is in no frame
            frames.append((error.filename, error.lineno))
        folder = os.path.dirname(os.path.abspath(path))
        ours = [f for f in frames if os.path.dirname(os.path.abspath(f[0])) == folder]
        place = "{}, line {}".format(*ours[-1]) if ours else path
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        fail(f"--config: {place}: {reason}")
    if not isinstance(config, ConfigDict):
        fail(f"--config: {path}: get_config() gives a {type(config).__name__}; expected ConfigDict")
    return config


def check_overrides(config, argv):
    """Ends where a `--config.field=value` names no field; ml_collections would not say where."""
    for argument in argv:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        node = config
        for name in override[1].split(".") if override else ():
            if not isinstance(node, ConfigDict) or name not in node:
                known = ", ".join(node) if isinstance(node, ConfigDict) else "none"
                fail(f"--config.{override[1]}: no field {name!r}; expected one of: {known}")
            node = node[name]


def run(main, choices=()):
    """Parses the flags and calls main; a UserError becomes one line and exit status 2.

    RunEnded becomes one line too, with the exit status that it brings.

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
        except RunEnded as ended:
            print(ended, file=sys.stderr)
            sys.exit(ended.status)

    app.run(guarded, flags_parser=parse_flags)
