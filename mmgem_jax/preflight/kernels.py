"""Kernels written by hand (Pallas): what a call of one takes, by the schedule made of it.

The compiled text has no estimate of them, but the compiler writes schedules down where it is asked
to: how many instruction bundles, of a cycle each, a step of the kernel's grid has. Its flags are
read once a process, so the kernels are compiled in another one (schedules.py), each alone.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from jax import export

from mmgem_jax.preflight import schedules
from mmgem_jax.preflight.hlo import size_in_bytes

DTYPES = {"bfloat16": "bf16", "float32": "f32", "int32": "s32", "int8": "s8", "bool": "pred"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a kernel on one chip: on what, and in how many steps."""

    name: str
    arguments: tuple  # (dtype, sizes) of each
    results: tuple
    steps: int
    shared: bool  # whether the cores of a chip share the steps
    exported: bytes = dataclasses.field(compare=False, repr=False)

    def is_called_by(self, instruction):
        """Whether an instruction of the compiled text is a call of it."""
        return self.name in instruction.op_name and tuple(instruction.arrays) == self.results

    def seconds(self, bundles, chip):
        """What a call takes: by its schedule, or moving its arrays in and out of HBM.

        The schedule has each branch once, taken or not, and neither waits nor stalls.
        """
        steps = self.steps / (chip.cores if self.shared else 1)
        moved = size_in_bytes((*self.arguments, *self.results))
        return max(steps * bundles / chip.clock, moved / chip.hbm_bandwidth)


def find_kernels(jaxpr):
    """The distinct Kernels in a jaxpr and those within it."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            kernel = kernel_of(equation)
            found[kernel] = kernel
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner) and equation.primitive.name != "pallas_call":
                found |= {kernel: kernel for kernel in find_kernels(getattr(inner, "jaxpr", inner))}
    return list(found)


def is_jaxpr(x):
    """Whether it is a jaxpr, closed or not."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def kernel_of(equation):
    """The Kernel of a call in a jaxpr."""

    def call(*arguments):
        return equation.primitive.bind(*arguments, **equation.params)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    texts = [[text_of(v.aval) for v in side] for side in (equation.invars, equation.outvars)]
    meaning = getattr(equation.params["compiler_params"], "dimension_semantics", None) or ()
    return Kernel(
        equation.params["name"],
        *map(tuple, texts),
        math.prod(equation.params["grid_mapping"].grid),
        any("parallel" in str(kind).lower() for kind in meaning),
        export.export(jax.jit(call), platforms=["tpu"])(*shapes).serialize(),
    )


def text_of(aval):
    """(dtype, sizes) as the compiled text has them."""
    return DTYPES.get(str(aval.dtype), str(aval.dtype)), tuple(aval.shape)


def bundles_of(kernels, topology, tpu_options):
    """Bundles of a step of each kernel, None where there is no schedule of it; and what went wrong.

    Args:
      kernels: of `find_kernels`.
      topology: such as `v5e:16x16`.
      tpu_options: those that the program is compiled with.

    Returns:
      A dict by kernel, and a list of lines, empty where all went well.
    """
    if not kernels:
        return {}, []
    with tempfile.TemporaryDirectory() as folder:
        for place, kernel in enumerate(kernels):
            Path(folder, f"{place}.kernel").write_bytes(kernel.exported)
        flags = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *schedules.flags(folder)])
        done = subprocess.run(
            [sys.executable, "-m", schedules.__name__, folder, topology, json.dumps(tpu_options)],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags.strip()},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return dict.fromkeys(kernels), [f"no schedules of kernels: {reason[:300]}"]
    return dict(zip(kernels, json.loads(done.stdout.splitlines()[-1]), strict=True)), []
