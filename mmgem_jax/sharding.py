"""The mesh, and the one table from logical axis names to mesh axes.

The only file that names mesh axes. `pjit` of older JAX is `jax.jit` with shardings today.
"""

import contextlib

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmgem_jax.errors import UserError

# `slice` runs over the network of the data centre, the others over the links between chips; what
# moves the most bytes the most often comes last, where neighbours are nearest.
MESH_AXES = ("slice", "data", "fsdp", "tensor")

RULES = (
    # activations
    ("batch", ("slice", "data", "fsdp")),
    ("length", None),
    ("activation", None),
    # parameters; those of a stack have a leading axis
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    # The kernels that lead back to the residual stream are split along their first axis alone: XLA
    # sums the gradient of a kernel [5632, 2048] split along its second whole on every chip.
    ("heads_in", ("tensor", "fsdp")),
    ("mlp_in", ("tensor", "fsdp")),
    ("residual", None),
    ("vocab", "tensor"),
    ("projection", None),
    ("pixels", None),
    ("positions", None),
    ("norm", None),
)


def make_mesh(sizes, devices=None):
    """The mesh of the given sizes, its devices in an order that keeps neighbours near.

    Args:
      sizes: mapping from every name of MESH_AXES to a size; one may be -1, for the rest.
      devices: the devices to use; all by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or a slice of the mesh is no
        slice of the devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = [sizes[axis] for axis in MESH_AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if min(shape) < 1 or int(np.prod(shape)) != count:
        asked = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
        if shape.count(-1) > 1:
            raise UserError(f"mesh: {asked}; expected -1, the rest of the devices, at most once")
        raise UserError(f"mesh: {asked} does not multiply to the {count} devices there are")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Devices that are no TPUs are in one slice, whatever they stand for.
    if slices != shape[0] and (slices > 1 or devices[0].platform == "tpu"):
        raise UserError(f"mesh: slice={shape[0]}; expected {slices}, as the devices are in so many")
    # Linen's logical constraints need Auto axes: with Explicit ones initialisation fails.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(in_order(shape, devices, slices), MESH_AXES, axis_types=auto)


def in_order(shape, devices, slices):
    """The devices as an array of this shape: mesh axes on axes of the chips' torus, if they fit."""

    def arrange(split):
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]),
            (slices, *(1 for _ in shape[1:])),
            devices,
            allow_split_physical_axes=split,
        )

    try:
        return arrange(split=False)
    except NotImplementedError:  # an axis of the mesh is no axis of the torus
        return arrange(split=True)


@contextlib.contextmanager
def use_mesh(mesh):
    """Within it, the model's logical constraints mean this mesh (`with mesh:` would drop them)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def partition_spec(names):
    """The mesh axes of an array whose axes have these logical names.

    Raises:
      KeyError: a name is not in the table (Linen would replicate it without a word).
      ValueError: two axes of the array land on one mesh axis.
    """
    rules = dict(RULES)
    spec = [None if name is None else rules[name] for name in names]
    used = [axis for entry in spec if entry for axis in np.atleast_1d(entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(names)} need a mesh axis twice: {spec}")
    return PartitionSpec(*spec)


def param_shardings(boxed_params, mesh):
    """Shardings of parameters that carry their logical names (Linen's boxes, not yet removed).

    Raises:
      UserError: the mesh does not divide a parameter.
    """

    def sharding(path, box):
        if not isinstance(box, nn.LogicallyPartitioned):
            raise ValueError(f"{path_name(path)} has no logical axis names")
        result = NamedSharding(mesh, partition_spec(box.names))
        try:
            result.shard_shape(box.value.shape)
        except ValueError as error:
            raise UserError(
                f"mesh: {dict(mesh.shape)} does not divide {path_name(path)} of shape "
                f"{box.value.shape}, split as {result.spec}"
            ) from error
        return result

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree_util.tree_map_with_path(sharding, boxed_params, is_leaf=is_box)


def state_shardings(state, params_shardings, mesh):
    """Shardings of a whole train state: what has a parameter's path and shape is split like it.

    Moments and averages live under paths that end in their parameter's path; anything else
    (counters, scalars) is replicated.

    Args:
      state: abstract train state with a field `params`.
      params_shardings: tree of shardings like `state.params`.
      mesh: the mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    known = {
        tuple(path_name(path).split("/")): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(params_shardings), strict=True)
    }

    def sharding(path, leaf):
        keys = tuple(path_name(path).split("/"))
        for start in range(len(keys)):
            shape, found = known.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def layer_sharding(stacked):
    """How one layer lies on the mesh, of a stack [layers, ...] that lies like `stacked`."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def path_name(path):
    """A tree path as `vision/blocks/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh):
    """How a batch lies on the mesh: its first axis split over all that is not tensor."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def batch_shards(mesh):
    """Into how many parts the mesh splits a batch."""
    return int(np.prod([mesh.shape[axis] for axis in dict(RULES)["batch"]]))


def head_shards(mesh):
    """Into how many parts the mesh splits the heads of attention."""
    return mesh.shape["tensor"]


def rows_of_processes(mesh, size):
    """The rows of a batch of that size that each process holds: int [n], ascending, by process."""
    rows = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((size,)).items():
        rows.setdefault(device.process_index, []).append(np.arange(size)[part])
    return {process: np.unique(np.concatenate(parts)) for process, parts in rows.items()}


def own_rows(mesh, size):
    """The rows of a batch of that size that this process holds: int [n], ascending."""
    return rows_of_processes(mesh, size)[jax.process_index()]


def process_share(mesh):
    """Which share of a batch this process holds, and how many shares there are.

    Processes between which a mesh splits no batch, but heads, hold the same share.

    Raises:
      UserError: shares of two processes differ in size or overlap.
    """
    parts = batch_shards(mesh)
    of_processes = {
        process: tuple(rows.tolist()) for process, rows in rows_of_processes(mesh, parts).items()
    }
    shares = sorted(set(of_processes.values()))
    if len({len(own) for own in shares}) > 1 or sum(map(len, shares)) != parts:
        raise UserError(
            f"mesh: {dict(mesh.shape)} gives the {len(of_processes)} processes unequal or "
            "overlapping parts of a batch; expected axes that divide the devices of a process or "
            "are multiples of them"
        )
    return shares.index(of_processes[jax.process_index()]), len(shares)


def to_global(batch, mesh):
    """This process's rows of a batch (numpy, dict; `own_rows`) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def from_whole(batch, mesh):
    """A batch (numpy, dict) that every process has whole, as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda place, a=array: a[place])
        for name, array in batch.items()
    }


def to_host(tree):
    """Arrays on the mesh as whole numpy arrays, the same in every process; call it in all."""

    def whole(array):
        if jax.process_count() == 1 or array.is_fully_replicated:
            return jax.device_get(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)
