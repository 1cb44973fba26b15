"""A folder that is there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from mmgem_jax.errors import UserError


@contextlib.contextmanager
def new_folder(path):
    """Gives a folder to write to, beside `path`; it becomes `path` at the end, or goes on an error.

    Raises:
      UserError: `path` exists and is not an empty folder, or cannot be made.
    """
    path = Path(path).resolve()
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--out {path}: exists already; expected a new or an empty folder")
        if os.path.ismount(path):
            raise UserError(f"--out {path}: is a mount point; expected a folder within it")
        path.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; expected a folder") from None
    try:
        yield written
        written.chmod(0o777 & ~umask())  # mkdtemp's is for its maker alone
        written.replace(path)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else's file is in it by now
                parent.rmdir()
        raise


def umask():
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
