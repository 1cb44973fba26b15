"""The mesh, and the one table from logical axis names to mesh axes.

The only file that names mesh axes. `pjit` of older JAX is `jax.jit` with shardings today.
"""

import contextlib

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmgem_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("activation", None),
    # parameters; those of a stack have a leading axis
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("projection", None),
    ("pixels", None),
    ("positions", None),
    ("norm", None),
)


def make_mesh(sizes, devices=None):
    """The mesh of the given sizes.

    Args:
      sizes: mapping from every name of MESH_AXES to a size; one may be -1, for the rest.
      devices: the devices to use; all by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    shape = [sizes[axis] for axis in MESH_AXES]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if min(shape) < 1 or int(np.prod(shape)) != count:
        asked = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
        raise UserError(f"mesh: {asked} does not multiply to the {count} devices there are")
    # Linen's logical constraints need Auto axes: with Explicit ones initialisation fails.
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


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
    return mesh.shape["data"] * mesh.shape["fsdp"]


def head_shards(mesh):
    """Into how many parts the mesh splits the heads of attention."""
    return mesh.shape["tensor"]


def to_global(batch, mesh):
    """This process's share of a batch (numpy, dict) as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
