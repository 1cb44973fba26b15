"""Compiles kernels alone and prints how long the schedule of each is: a program of its own.

python -m mmgem_jax.preflight.schedules FOLDER TOPOLOGY TPU_OPTIONS
"""

import json
import re
import sys
from pathlib import Path

import jax
from jax import export

from mmgem_jax.preflight.topology import absent_devices

# A line of a schedule's analysis: which part of it an instruction takes.
OF_KERNEL = re.compile(r"([\d.]+) scheduled bundles \([^)]*\): [^\n]*\"tpu_custom_call\"")


def flags(folder):
    """libtpu's flags by which it writes the schedules of what it compiles to a folder."""
    dump = {"to": folder, "llo_text": "true", "llo_pass_label_regex": "final_bundles"}
    return [f"--xla_jf_dump_{name}={value}" for name, value in dump.items()]


def bundles(folder, place, device, tpu_options):
    """Bundles of a step of the kernel in `PLACE.kernel`; None where there is no schedule of it."""
    kernel = export.deserialize(Path(folder, f"{place}.kernel").read_bytes())
    one = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in kernel.in_avals]
    before = set(Path(folder).iterdir())
    jax.jit(kernel.call, compiler_options=tpu_options).lower(*shapes).compile()
    written = set(Path(folder).glob("*schedule-analysis*")) - before
    found = [float(count) for path in written for count in OF_KERNEL.findall(path.read_text())]
    return max(found, default=None)


def main(folder, topology, tpu_options):
    """Prints a JSON list, an entry for each kernel of the folder."""
    device, options = absent_devices(topology)[0], json.loads(tpu_options)
    count = len(list(Path(folder).glob("*.kernel")))
    print(json.dumps([bundles(folder, place, device, options) for place in range(count)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
