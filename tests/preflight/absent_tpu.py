"""Small programs compiled for TPUs that are not there; what the pre-flight reads, as JSON.

A process of its own, because libtpu must not meet the 8 CPU devices of the tests.
"""

import json
import os

from mmgem_jax.preflight.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmgem_jax import sharding
from mmgem_jax.chips import CHIPS
from mmgem_jax.models.row_attention import FAST_MEMORY, fast_memory, whole_rows
from mmgem_jax.models.splash import blockwise_attention
from mmgem_jax.preflight import cost, hlo
from mmgem_jax.preflight.check import calibration, whole_gathers
from mmgem_jax.preflight.collectives import find_collectives, summary
from mmgem_jax.preflight.compiled import compile_program
from mmgem_jax.preflight.kernels import bundles_of, find_kernels
from mmgem_jax.preflight.program import Program, complete, programs
from mmgem_jax.preflight.topology import absent_devices, slice_of


def mesh_of(topology, shape, names, slices=1):
    """A mesh over the devices of a topology, slice by slice and row by row of the torus."""
    place = lambda device: (slice_of(device), tuple(device.coords))  # noqa: E731
    devices = np.array(sorted(absent_devices(topology, slices), key=place)).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def array(mesh, shape, *spec, dtype=jnp.float32):
    """The shape of an array split like this."""
    split = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)


def compiled(mesh, function, *arguments):
    """The Compiled of a function."""
    return compile_program(Program("", jax.jit(function), {}, arguments, 1, {}), mesh)


def read(mesh, function, *arguments, chip="v5e"):
    """The regions and collectives of a function's program."""
    text = compiled(mesh, function, *arguments).executable.as_text()
    computations, entry = hlo.parse(text)
    regions = hlo.regions(computations, entry)
    seconds = cost.seconds_of(cost.costs(regions, CHIPS[chip], {}))
    return regions, find_collectives(regions, computations, mesh, CHIPS[chip], seconds)


def collectives():
    """A sum over one axis of the mesh, a gather over the other."""
    mesh = mesh_of("v5e:4x4", (4, 4), ("rows", "columns"))
    P = PartitionSpec

    def both(x):
        def local(x):
            return jax.lax.psum(x, "rows"), jax.lax.all_gather(x, "columns", tiled=True)

        specs = {"in_specs": P("rows", "columns"), "out_specs": (P(None, "columns"), P("rows"))}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(x)

    return summary(read(mesh, both, array(mesh, (1024, 2048), "rows", "columns"))[1])


def between_slices():
    """A sum over two slices."""
    mesh = mesh_of("v5e:2x2", (2, 4), ("slice", "chips"), slices=2)
    total = lambda x: jnp.sum(x, axis=0)  # noqa: E731
    return summary(read(mesh, total, array(mesh, (2, 1024, 1024), "slice", "chips"))[1])


def matmuls():
    """Seconds of one matmul, and of a loop of six, each in a loop's body."""
    mesh = mesh_of("v5e:2x2", (4,), ("chips",))
    weights = lambda n: array(mesh, (n, 2048, 2048), dtype=jnp.bfloat16)  # noqa: E731
    x = array(mesh, (2048, 2048), dtype=jnp.bfloat16)

    def seconds(n):
        loop = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]  # noqa: E731
        regions, _ = read(mesh, loop, x, weights(n))
        own = cost.costs(regions, CHIPS["v5e"], {})
        return sum(c.seconds for c in own if "dot_general" in c.op_name)

    return [seconds(3), seconds(12)]


def regrets():
    """What the partitioner says of a layout that it cannot reach but by copying all."""
    mesh = mesh_of("v5e:4x4", (4, 4), ("data", "fsdp"))
    layout = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def turned(x):
        x = jax.lax.with_sharding_constraint(jnp.sin(x), layout("data", "fsdp"))
        return jax.lax.with_sharding_constraint(jnp.sin(x), layout(None, ("data", "fsdp")))

    bad = compiled(mesh, turned, array(mesh, (24, 40), "data")).warnings
    good = compiled(mesh, jnp.sin, array(mesh, (32, 32), "data")).warnings
    return [bad, good]


def gathers():
    """Problems of a loop over layers, gathered all before it, and one by one."""
    mesh = mesh_of("v5e:4x4", (4, 4), ("data", "fsdp"))
    kernel = array(mesh, (6, 512, 512), None, "fsdp")
    whole = NamedSharding(mesh, PartitionSpec())

    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

    def at_once(x, w):
        return jax.lax.scan(layer, x, jax.lax.with_sharding_constraint(w, whole))[0]

    def one_by_one(x, w):
        return jax.lax.scan(layer, x, w)[0]

    x = array(mesh, (1024, 512), ("data", "fsdp"))
    params = {"tower": {"blocks": {"kernel": kernel}}}
    loops = (at_once, one_by_one)
    return [whole_gathers(read(mesh, loop, x, kernel)[1], params) for loop in loops]


def kernels():
    """A kernel written by hand, in a loop of five: with and without a count of its FLOPs."""
    mesh = Mesh(np.array(absent_devices("v5e:2x2")[:1]), ("chips",))

    def double(read, write):
        write[...] = read[...] * 2

    def loop(known, x):
        estimate = pl.CostEstimate(flops=197_000_000, transcendentals=0, bytes_accessed=8)
        call = pl.pallas_call(double, out_shape=x, cost_estimate=estimate if known else None)
        return jax.lax.fori_loop(0, 5, lambda _, x: call(x), x)

    found = []
    for known in (True, False):
        regions, _ = read(mesh, lambda x, known=known: loop(known, x), array(mesh, (128, 128)))
        found.append(cost.not_estimated(regions, [], CHIPS["v5e"].flops))
    return found


def schedules():
    """Seconds of a kernel of 8 and of 16 products of 512 x 512 in a loop of 5, by its schedule."""
    mesh = Mesh(np.array(absent_devices("v5e:2x2")[:1]), ("chips",))

    def product(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def seconds(n):
        block = pl.BlockSpec((512, 512), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((512 * n, 512), jnp.float32)
        specs = {"grid": (n,), "in_specs": [block, block], "out_specs": block}
        call = pl.pallas_call(product, out_shape=shape, name="product", **specs)

        def loop(x, y):
            turn = lambda _, x: call(x, y).astype(jnp.bfloat16)  # noqa: E731
            return jax.lax.fori_loop(0, 5, turn, x)

        x = array(mesh, (512 * n, 512), dtype=jnp.bfloat16)
        regions, _ = read(mesh, loop, x, x)
        found = find_kernels(jax.jit(loop).trace(x, x).jaxpr.jaxpr)
        known, problems = bundles_of(found, "v5e:2x2", {})
        assert not problems
        spent = cost.costs(regions, CHIPS["v5e"], known)
        (row,) = cost.kernels(spent, regions)
        return len(found), row["count"], row["seconds"], cost.not_estimated(regions, spent, 1.0)

    return [seconds(8), seconds(16)]


def attention():
    """The largest rows that are allowed, and a long one by blocks, compile for the oldest chip."""
    one = jax.sharding.SingleDeviceSharding(absent_devices("v4:2x2x1")[0])
    cases = (
        *((whole_rows, 640, 16, 16, 64, jnp.bfloat16), (whole_rows, 384, 32, 4, 64, jnp.bfloat16)),
        *((whole_rows, 384, 32, 8, 128, jnp.bfloat16), (whole_rows, 256, 32, 4, 64, jnp.float32)),
        (blockwise_attention, 1088, 32, 4, 64, jnp.bfloat16),
    )
    needed = []
    for attend, T, N, K, C, dtype in cases:
        array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)  # noqa: E731
        shapes = [array(2, T, heads, C, dtype=dtype) for heads in (N, K, K)]
        if K < N:
            shapes.append((array(2, T, C, dtype=jnp.float32),) * 2)
            shapes.append(array(2, T, dtype=jnp.int32))
        total = lambda *x, attend=attend: attend(*x).astype(jnp.float32).sum()  # noqa: E731
        jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
        needed.append(fast_memory(T, N // K, jnp.dtype(dtype).itemsize, K < N))
    return [needed[:-1], FAST_MEMORY]


def evaluation():
    """Whether each program of an evaluation gives what the next is compiled to take."""
    config = complete(tiny.config({"mesh.fsdp": 2, "mesh.data": 4, "eval.batch_size": 16}))
    mesh = sharding.make_mesh(config.mesh, absent_devices("v5e:2x4"))
    made = programs("eval", config, mesh)
    feature_map = compile_program(made[0], mesh).executable.output_shardings
    (visual,) = (x for x in programs("decode", config, mesh)[0].arguments[1:2])
    pooled = compile_program(made[1], mesh).executable.output_shardings[1]
    return [
        feature_map.is_equivalent_to(made[1].arguments[1].sharding, 4),
        pooled.is_equivalent_to(visual.sharding, 3),
    ]


def calibrations():
    """The share of the peak that the compiler expects of a large matmul on each chip."""
    topologies = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
    return {name: calibration(CHIPS[name], of)["share_of_peak"] for name, of in topologies.items()}


if __name__ == "__main__":
    parts = (collectives, between_slices, matmuls, regrets, gathers, kernels, schedules)
    print(
        json.dumps(
            {part.__name__: part() for part in (*parts, attention, evaluation, calibrations)}
        )
    )
