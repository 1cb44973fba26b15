"""A config on a topology: compiled, weighed and timed. The result is a dict, as JSON has it."""

import functools
import importlib.metadata
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax import run, sharding, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.param_table import param_table
from mmgem_jax.preflight import cost, hlo, kernels
from mmgem_jax.preflight.collectives import find_collectives, summary
from mmgem_jax.preflight.compiled import compile_program
from mmgem_jax.preflight.memory import memory_row
from mmgem_jax.preflight.program import complete, programs
from mmgem_jax.preflight.topology import absent_devices, chip_of_topology
from mmgem_jax.saved_program import fingerprint_of, save_program

CALIBRATION_SIZE = 8192

PREDICTED = (
    "Predicted, not measured: cycles as the TPU compiler estimates them, loops by their trips, at "
    "the chip's clock, kernels written by hand by the length of their schedules, and what "
    "collectives need at the links' bandwidth beyond the compute beside them. Not modelled: what "
    "is listed as not estimated, lookups and reshapes, for which the compiler has no estimate, "
    "stalls within kernels, collectives that share links or the compute that hides them, waiting "
    "for data and the host, stalls between chips. Useful tokens are those of captions as long as "
    "in mmgem_jax/data/caption_lengths.py."
)


def preflight(config, topology, slices, what):
    """Compiles what a run would, and reports on it.

    Args:
      config: a config as `get_config()` gives it.
      topology: such as `v5e:16x16`, of a slice.
      slices: how many.
      what: `train`, `eval` or `decode`.

    Returns:
      The report (see `report_of`), and the compiled executables by program name.

    Raises:
      UserError: the config or the topology is wrong, or they do not fit together.
    """
    chip = chip_of_topology(topology)
    devices = absent_devices(topology, slices)
    config = complete(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    model = run.build_model(config.model)
    rows, executables = [], {}
    for program in programs(what, config, mesh):
        compiled = compile_program(program, mesh)
        schedules, problems = {}, []
        if compiled.executable is not None:
            with sharding.use_mesh(mesh):
                traced = program.function.trace(*program.arguments)
            found = kernels.find_kernels(traced.jaxpr.jaxpr)
            options = config.tpu_options.to_dict()
            schedules, problems = kernels.bundles_of(found, topology, options)
        rows.append(report_of_program(program, compiled, schedules, mesh, chip))
        rows[-1]["problems"] += problems
        if compiled.executable is not None:
            executables[program.name] = compiled.executable
    return {
        "what": what,
        "parameters": param_table(train_state.boxed_params(model, run.batch_shapes(config)), mesh),
        "topology": topology,
        "slices": slices,
        "chips": mesh.size,
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "fits": all(row["fits"] for row in rows),
        "programs": rows,
        "calibration": calibration(chip, topology),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "predicted": PREDICTED,
    }, executables


def save_step(path, executables, config, topology, slices, what):
    """Keeps the compiled train step of `preflight` in a file, from which training starts.

    Raises:
      UserError: there is none, or the file cannot be written.
    """
    if "train step" not in executables:
        raise UserError(f"--save: {path}: there is no compiled train step to save (--what {what})")
    config = complete(config)
    mesh = sharding.make_mesh(config.mesh, absent_devices(topology, slices))
    fingerprint = fingerprint_of(config, run.batch_shapes(config), mesh)
    save_program(path, executables["train step"], fingerprint)


def report_of_program(program, compiled, schedules, mesh, chip):
    """What there is to say of one program: memory, and where it fits, time."""
    memory = memory_row(program, compiled, chip)
    whole = sum(program.flops.values())
    report = {
        "name": program.name,
        "fits": compiled.executable is not None and not memory["exceeds_by"],
        "batch": program.images,
        "batch_per_chip": program.images / mesh.size,
        "memory": memory,
        "flops": {"by_part": program.flops, "total": whole, "an_image": whole / program.images},
        "problems": list(compiled.warnings),
        "compile_seconds": compiled.seconds,
        "peak_host_bytes": compiled.host_bytes,
    }
    if compiled.executable is None:
        return report
    computations, entry = hlo.parse(compiled.executable.as_text())
    regions = hlo.regions(computations, entry)
    spent = cost.costs(regions, chip, schedules)
    found = find_collectives(regions, computations, mesh, chip, cost.seconds_of(spent))
    report["problems"] += whole_gathers(found, program.held["params"])
    return report | time_report(program, regions, found, spent, mesh, chip)


def time_report(program, regions, collectives, spent, mesh, chip):
    """The predicted time of a program that fits, and what it is made of."""
    compute = sum(c.seconds for c in spent)
    exposed = sum(c.exposed * c.trips for c in collectives)
    unknown = cost.not_estimated(regions, spent, chip.flops)
    least = sum(row["least_seconds"] or 0.0 for row in unknown)
    step = compute + exposed + least
    useful = program.useful_flops
    ideal = sum(program.flops.values()) / mesh.size / chip.flops
    again = sum(c.seconds for c in spent if c.phase == "recomputed")
    return {
        "prediction": {
            "seconds": step,
            "compute_seconds": compute,
            "exposed_collective_seconds": exposed,
            "kernel_least_seconds": least,
            "ideal_seconds": ideal,
            "recomputed_seconds": again,
            "mfu": ideal / step,
            "useful_mfu": useful and useful / mesh.size / chip.flops / step,
            "at_most": bool(unknown),  # what is not estimated takes time, too
            "images_per_second": program.images / step,
            "loops_of_unknown_trips": sum(not region.known for region in regions),
        },
        "time": [
            {"part": part, "phase": phase, "seconds": seconds, "share": seconds / step}
            for part, phases in cost.by_part(spent).items()
            for phase, seconds in phases.items()
        ],
        "costliest": cost.costliest(spent, 10),
        "kernels": cost.kernels(spent, regions),
        "not_estimated": unknown,
        "collectives": summary(collectives),
    }


def whole_gathers(collectives, params):
    """Problems: all-gathers that bring all layers of a stack of parameters to a chip at once.

    Only a layer at a time is needed. An array whose first axis is all layers, with as many entries
    as the whole stack, or as a part of it that other axes split, is taken for the stack.
    """
    stacks = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        if "/blocks/" in name and leaf.ndim > 2:
            stacks[name] = leaf
    found = []
    for c in collectives:
        for name, leaf in stacks.items() if c.kind == "all-gather" else ():
            split = mesh_axes_of(leaf.sharding)
            kept = math.prod(size for axis, size in split.items() if axis not in c.axes)
            entries = [math.prod(sizes) for _, sizes in c.arrays if sizes[:1] == leaf.shape[:1]]
            if set(split) & set(c.axes) and leaf.size // kept in entries:
                found.append(
                    f"all-gather of every layer of {name} at once over {'+'.join(c.axes)} "
                    f"({c.size / 2**20:,.0f} MiB), from {cost.short(c.op_name) or 'unknown'}"
                )
                break
    return found


def mesh_axes_of(split):
    """The mesh axes, with their sizes, over which an array is split."""
    axes = [axis for entry in split.spec if entry for axis in np.atleast_1d(entry)]
    return {str(axis): split.mesh.shape[axis] for axis in axes}


@functools.cache
def calibration(chip, topology):
    """One large bf16 matmul, compiled for the chip: the compiler's estimate beside the peak."""
    N, device = CALIBRATION_SIZE, absent_devices(topology)[0]
    one = jax.sharding.SingleDeviceSharding(device)
    matrix = jax.ShapeDtypeStruct((N, N), jnp.bfloat16, sharding=one)
    compiled = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    regions = hlo.regions(*hlo.parse(compiled.as_text()))
    seconds = sum(c.seconds for c in cost.costs(regions, chip, {}))
    return {
        "matmul": f"{N} x {N} x {N}, bf16",
        "seconds": seconds,
        "flops_per_second": 2 * N**3 / seconds,
        "peak_flops_per_second": chip.flops,
        "share_of_peak": 2 * N**3 / seconds / chip.flops,
    }
