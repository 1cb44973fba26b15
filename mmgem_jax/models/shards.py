"""Functions that say themselves what each device does and what devices send each other."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def axes_of(name):
    """Axes of the mesh in use over which a logical axis is split in two or more; () for none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    (entry,) = nn.logical_to_mesh_axes((name,))
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def axis_size(axis):
    """How many devices there are along an axis of the mesh in use."""
    return jax.sharding.get_abstract_mesh().shape[axis]


def on_shards(run, in_names, out_names):
    """`run` on each device's parts of its arguments; on the whole of them where no mesh is in use.

    It is for kernels, which the compiler does not look into, and for what communicates by itself:
    within both halves of a `jax.custom_vjp`, where what devices send each other on the way back is
    as plain to see as on the way there.

    Args:
      run: a function of arrays, or trees of them, that communicates by the axes of `axes_of`.
      in_names: for each argument, the logical names of the axes of its arrays.
      out_names: those of the result; where there are several, a list.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    in_specs = tuple(map(nn.logical_to_mesh_axes, in_names))
    several = isinstance(out_names, list)
    out_specs = map(nn.logical_to_mesh_axes, out_names if several else [out_names])
    out_specs = tuple(out_specs) if several else next(out_specs)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def around(visit, own, visitors, nothing, merge, most):
    """A visit of all rows of the batch to each device's own, the next on their way meanwhile.

    The largest mesh axis that splits the batch is a ring; over the others the visitors are gathered
    first. What a device finds for visitors travels one step behind them. So neither waits for the
    work of the step in which it is sent.

    Args:
      visit: `jax.lax.scan`'s function of `own` and a chunk [C, ...] of visitors, which returns
        `own` and results [C, ...] for the chunk; all zeros are to mean no visitor.
      own: tree of arrays that stay where they are, as each visit leaves them.
      visitors: tree of arrays [M, ...], this device's rows.
      nothing: results of no visit for one visitor, a tree of arrays.
      merge: of two trees of results for the same visitors, one.
      most: visitors in a chunk, at most.

    Returns:
      `own` after all visits, and the results [M, ...] for this device's rows.
    """
    *rest, ring = sorted(axes_of("batch"), key=axis_size) or [None]
    gathered = visitors
    if rest:
        gather = functools.partial(jax.lax.all_gather, axis_name=tuple(rest), tiled=True)
        gathered = jax.tree.map(gather, visitors)
    rows = len(jax.tree.leaves(gathered)[0])
    chunks = -(-rows // most)
    chunk = -(-rows // chunks)
    gathered = jax.tree.map(lambda x: in_chunks(x, chunks, chunk), gathered)
    if ring is None:
        own, results = jax.lax.scan(visit, own, gathered)
    else:
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (chunks, chunk, *x.shape)), nothing)
        own, results = along_ring(visit, own, gathered, start, merge, ring)
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], results)
    if rest:
        results = at_home(results, tuple(rest), merge)
    return own, results


def along_ring(visit, own, visitors, results, merge, ring):
    """What `around` does along one axis of the mesh, with all visitors and results in chunks."""
    size = axis_size(ring)
    neighbours = [(place, (place + 1) % size) for place in range(size)]

    def send(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, ring, neighbours), tree)

    def step(carry, _):
        own, present, behind = carry
        coming, behind = send(present), send(behind)
        own, results = jax.lax.scan(visit, own, present)
        return (own, coming, merge(behind, results)), None

    (own, _, behind), _ = jax.lax.scan(step, (own, visitors, results), length=size)
    return own, send(behind)  # a last step, and they are at home


def in_chunks(x, chunks, chunk):
    """[N, ...] as [chunks, chunk, ...], with zeros for the rows that are missing."""
    missing = [(0, chunks * chunk - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, missing).reshape(chunks, chunk, *x.shape[1:])


def at_home(results, axes, merge):
    """Results [G * M, ...] of each of G devices, merged, and of them the M of this device's."""
    parts = math.prod(axis_size(axis) for axis in axes)
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    results = jax.tree.map(lambda x: swap(x).reshape(parts, -1, *x.shape[1:]), results)
    of_each = [jax.tree.map(lambda x, part=part: x[part], results) for part in range(parts)]
    return functools.reduce(merge, of_each)


# ---- matrices split along their width ------------------------------------------------------------


def whole_width(matrix, axis):
    """The part of this device, of a matrix of which the axis is `embed`, whole along it."""
    for mesh_axis in axes_of("embed"):
        matrix = jax.lax.all_gather(matrix, mesh_axis, axis=axis, tiled=True)
    return matrix


def split_width(gradient, axis):
    """The sum over the batch of what every device has for such a matrix, of it this one's part."""
    embed = axes_of("embed")
    for mesh_axis in embed:
        gradient = jax.lax.psum_scatter(gradient, mesh_axis, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(gradient, [other for other in axes_of("batch") if other not in embed])
