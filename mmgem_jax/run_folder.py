"""The folder of a run: what claims it, whose it is, and what may change between its parts."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path

import jax

from mmgem_jax import processes
from mmgem_jax.damage import warn
from mmgem_jax.data.tokenizer import fingerprint
from mmgem_jax.errors import UserError, writing

# What may change between the parts of a run; the rest of the config makes the run. The tokenizer
# is compared by its fingerprint; what the run began from is not looked at again.
FREE = {"eval", "log", "checkpoint", "mesh", "compile_cache", "init_from"}
FREE |= {"accumulation_steps", "compiled_step", "tpu_options"}
FREE |= {
    f"model.{tower}.{field}"
    for tower in ("vision", "decoder")
    for field in ("remat", "unroll", "attention")
}
FREE |= {"data.dir", "data.tokenizer", "data.index_dir", "data.workers", "data.prefetch"}
FREE |= {"data.read_threads", "data.ahead", "data.max_broken_share", "data.max_bytes"}
FREE |= {"faults.stop_after"}

PATIENCE = 120  # seconds for which a run waits for another to leave its folder
UNTIL_EXIT = []  # locks of runs that failed
TAKEN = (errno.EAGAIN, errno.EACCES)  # what the system says of a lock that another has
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # and where there are none


def find_run(folder):
    """The workdir of a run, and the step that `folder` names or None.

    Raises:
      UserError: there is no run.
    """
    folder, step = Path(folder), None
    workdir, inner = folder.absolute(), folder.absolute().parent
    if folder.name.isdecimal() and inner.name == "checkpoints":
        workdir, step = inner.parent, int(folder.name)
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        return workdir, step
    raise UserError(
        f"checkpoint {folder}: no config.json and checkpoints/ there; expected a workdir of "
        "training, or a step of it (WORKDIR/checkpoints/STEP)"
    )


def has_begun(workdir):
    """Whether there is a run in the folder, with or without a checkpoint."""
    return (Path(workdir) / "config.json").exists()


@contextlib.contextmanager
def held(workdir):
    """Within it no other run comes into the folder: two would each remove what the other saves.

    The first of several processes holds a lock of the system's, which goes with it, however it
    ends. Between hosts it holds where the folder's file system shares its locks among them.

    Raises:
      UserError: the folder cannot be written, or another run is in it and stays.
    """
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: lock(Path(workdir) / "lock", stack))
        try:
            yield
        except BaseException:
            if processes.count() > 1:  # the others may write until they hear of it
                UNTIL_EXIT.append(stack.pop_all())
            raise
        processes.on_first(lambda: None)  # when all are here


def lock(path, stack):
    """Locks a file until `stack` is left, or waits for another's lock; raises as `held` does."""
    with writing(f"workdir {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    end, told = time.monotonic() + PATIENCE, False
    while not locked(path, stack):
        who = "a run"
        with contextlib.suppress(OSError, ValueError):
            who = path.read_text().strip() or who
        found = f"workdir {path.parent}: {who} is at work in it"
        if time.monotonic() > end:
            raise UserError(f"{found}; expected no other run there")
        if not told:
            warn(f"{found}; waiting up to {PATIENCE} seconds for its end")
            told = True
        time.sleep(0.2)


def locked(path, stack):
    """Whether a file could be locked, until `stack` is left; then it says by whom."""
    with writing(path), contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("ab", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            if error.errno not in NO_LOCKS:
                raise
            warn(f"{path}: {error.strerror}; so see to it that no other run is in the folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}\n".encode())
        stack.push(opened.pop_all())
    return True


def claim_workdir(workdir, config, tokenizer):
    """Makes the run's folder, or checks that it holds a run of this config; saves both there.

    Of several processes the first does it for all.

    Returns:
      What is saved: the config, and the fingerprint of the tokenizer, as JSON.

    Raises:
      UserError: the folder cannot be written, holds another config's run, or is not the same folder
        in every process; or the config is not the same.
    """
    ours = json.loads(json.dumps(config.to_dict())) | {"tokenizer": fingerprint(tokenizer)}
    processes.check_same("config", ours)
    processes.on_first(lambda: write_config(workdir, ours, tokenizer))
    check_shared(workdir, ours)
    return ours


def check_shared(workdir, config, seconds=60):
    """Raises UserError where this process does not see the config that the first has written.

    File systems of a network may take so many seconds to show a new file.
    """
    path, end = Path(workdir) / "config.json", time.monotonic() + seconds
    while not (path.is_file() and json.loads(path.read_text()) == config):
        if time.monotonic() > end:
            raise UserError(
                f"workdir {workdir}: process {jax.process_index()} finds no config.json of this "
                "run there; expected a folder that all hosts share"
            )
        time.sleep(1)


def write_config(workdir, ours, tokenizer):
    """Writes what `claim_workdir` saves, after it has looked for another run; see there."""
    path, folder = Path(workdir) / "config.json", Path(workdir) / "tokenizer"
    with writing(f"workdir {workdir}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_run(path, ours)
        # Written whole and then named: a run that is killed here can still be resumed.
        written = path.with_suffix(".json.new")
        written.write_text(json.dumps(ours, indent=2) + "\n")
        written.replace(path)
    with writing(folder):
        folder.mkdir(exist_ok=True)
        tokenizer.save_pretrained(folder)


def check_run(path, ours):
    """Raises UserError where there is a config.json that is no run's, or another run's."""
    try:
        changed = differences(json.loads(path.read_text()), ours) if path.exists() else []
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"workdir {path.parent}: config.json is no run's; expected one") from None
    if changed:
        raise UserError(
            f"workdir {path.parent} holds another config's run: {'; '.join(changed[:5])}; "
            "expected the same config or an empty folder"
        )


def differences(theirs, ours, prefix=""):
    """Fields that differ, outside FREE, as `field: theirs there, ours here`.

    Of a source of a mixture the same fields are free as of `data`.
    """
    found = []
    for key in sorted(theirs.keys() | ours):
        if re.sub(r"^data\.mixture\.[^.]+", "data", prefix + key) in FREE:
            continue
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return found
