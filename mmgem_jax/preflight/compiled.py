"""Compiles a Program, and keeps what the compiler said: a refusal for want of memory, warnings."""

import contextlib
import os
import re
import resource
import sys
import tempfile
import time
from dataclasses import dataclass

import jax

from mmgem_jax import sharding
from mmgem_jax.errors import UserError, first_line

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
OUT_OF_MEMORY = (
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
)


@dataclass(frozen=True)
class Compiled:
    """What became of a Program."""

    executable: object  # of jax; None where the chip's memory does not hold it
    needed: int | None  # bytes of HBM a chip that it would need, where it does not fit
    warnings: tuple[str, ...]  # what the partitioner regrets
    seconds: float
    host_bytes: int  # largest memory of this process so far


def compile_program(program, mesh):
    """The Compiled of a Program for the devices of the mesh.

    Raises:
      UserError: the compiler fails for another reason than the chip's memory.
    """
    began, executable, needed = time.perf_counter(), None, None
    with captured_stderr() as said:
        try:
            with sharding.use_mesh(mesh):
                executable = program.function.lower(*program.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = bytes_needed(str(error))
            if needed is None:
                raise UserError(
                    f"{program.name}: the compiler fails: {first_line(error)[:400]}; expected a "
                    "config that it takes"
                ) from None
    seconds = time.perf_counter() - began
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Compiled(executable, needed, regrets(said.text), seconds, host_bytes)


def bytes_needed(message):
    """Bytes of HBM that an error of the compiler says are needed; None where it is about else."""
    for pattern in OUT_OF_MEMORY:
        found = re.search(pattern, message)
        if found:
            return int(float(found[1]) * UNITS[found[2]])
    return None


def regrets(text):
    """The partitioner's warnings that it copies an array to every chip, each once."""
    found = re.findall(r"Involuntary full rematerialization\..*", text)
    return tuple(dict.fromkeys(line[:300] for line in found))


class Said:
    """What was written to standard error."""

    text = ""


@contextlib.contextmanager
def captured_stderr():
    """Within it, what is written to file descriptor 2 is kept; XLA's C++ writes its log there.

    Where an exception ends it, the log is shown after all.
    """
    sys.stderr.flush()
    own, said = os.dup(2), Said()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        except BaseException:
            os.dup2(own, 2)
            file.seek(0)
            os.write(2, file.read())
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
