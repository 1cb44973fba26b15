"""The mesh, and the table from logical axis names to mesh axes."""

import ast
import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh, PartitionSpec

import mmgem_jax
from mmgem_jax import objective, sharding
from mmgem_jax.errors import UserError

# ---- the mesh --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((1, 2, -1, 2), (1, 2, 2, 2)),
        ((1, 1, 8, -1), (1, 1, 8, 1)),
        ((2, 2, 1, 2),) * 2,
        ((-1, 2, 2, 1), (2, 2, 2, 1)),
    ],
)
def test_mesh_sizes_and_the_rest_rule(asked, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, asked, strict=True)))
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.MESH_AXES, shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.batch_shards(mesh) == shape[0] * shape[1] * shape[2]
    assert sharding.process_share(mesh) == (0, 1)


@pytest.mark.parametrize(
    "asked", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (8, 8, 1), (-2, -4, 1), (-1, 0, 1)]
)
@pytest.mark.parametrize("slices", [1, 2])
def test_mesh_sizes_that_do_not_fit_are_a_user_s_error(asked, slices):
    data, fsdp, tensor = asked
    with pytest.raises(UserError) as error:
        sharding.make_mesh({"slice": slices, "data": data, "fsdp": fsdp, "tensor": tensor})
    expected = " does not multiply to the 8 devices there are"
    if asked.count(-1) > 1:
        expected = "; expected -1, the rest of the devices, at most once"
    sizes = f"mesh: slice={slices}, data={data}, fsdp={fsdp}, tensor={tensor}"
    assert str(error.value) == sizes + expected


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (2, 1, 2, 2)])
@pytest.mark.parametrize("place", [sharding.to_global, sharding.from_whole])
def test_a_batch_is_split_over_all_but_tensor(shape, place):
    mesh = tiny.mesh_of(shape)
    batch = {"x": np.arange(24).reshape(8, 3), "flags": np.arange(8) % 2 == 0}
    placed = place(batch, mesh)
    for name, array in batch.items():
        assert placed[name].sharding.shard_shape(array.shape)[0] == 2
        assert len(placed[name].sharding.device_set) == 8
        np.testing.assert_array_equal(sharding.to_host(placed)[name], array)


# ---- devices of several slices and processes -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """All that a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(count=8, a_process=2, a_slice=8):
    return [Device(i, i // a_process, i // a_slice) for i in range(count)]


def mesh_of_devices(shape, devices):
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)), devices)


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (2, -1, 1, 2), (2, 1, 1, 4)])
def test_a_slice_of_the_mesh_is_a_slice_of_the_devices(shape):
    shuffled = np.random.default_rng(0).permutation(np.asarray(devices(a_slice=4))).tolist()
    mesh = mesh_of_devices(shape, shuffled)
    for place, of_slice in enumerate(mesh.devices):
        assert {device.slice_index for device in of_slice.flat} == {place}


@pytest.mark.parametrize("slices", [1, 4, 8])
def test_as_many_slices_of_the_mesh_as_of_the_devices(slices):
    message = rf"^mesh: slice={slices}; expected 2, as the devices are in so many$"
    with pytest.raises(UserError, match=message):
        mesh_of_devices((slices, -1, 1, 1), devices(a_slice=4))


def shares_of(mesh, monkeypatch):
    """`process_share` in every process."""
    found = []
    for process in sorted({device.process_index for device in mesh.devices.flat}):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(sharding.process_share(mesh))
    return found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 1, 1), [0, 1, 2, 3]),
        ((1, 2, 4, 1), [0, 1, 2, 3]),
        ((1, 4, 1, 2), [0, 1, 2, 3]),  # heads are split within a process
        ((1, 1, 2, 4), [0, 0, 1, 1]),  # and here between two
        ((1, 1, 1, 8), [0, 0, 0, 0]),
    ],
)
def test_processes_between_which_only_heads_are_split_share_their_rows(
    shape, expected, monkeypatch
):
    mesh = mesh_of_devices(shape, devices())
    count = max(expected) + 1
    assert shares_of(mesh, monkeypatch) == [(share, count) for share in expected]
    rows = sharding.rows_of_processes(mesh, 24)
    for process, share in enumerate(expected):
        own = np.arange(24).reshape(count, -1)[share]
        np.testing.assert_array_equal(rows[process], own)


def test_rows_of_a_process_need_not_be_neighbours(monkeypatch):
    order = np.asarray(devices(a_process=4)).reshape(2, 4).T.reshape(1, 8, 1, 1)
    mesh = Mesh(order, sharding.MESH_AXES)
    assert shares_of(mesh, monkeypatch) == [(0, 2), (1, 2)]
    np.testing.assert_array_equal(sharding.rows_of_processes(mesh, 8)[1], [1, 3, 5, 7])


def test_shares_that_overlap_or_differ_are_a_user_s_error(monkeypatch):
    overlapping = mesh_of_devices((1, 3, 1, 2), devices(6, a_process=3))
    unequal = mesh_of_devices((1, 8, 1, 1), devices(a_process=5))
    for mesh in (overlapping, unequal):
        with pytest.raises(UserError, match="gives the 2 processes unequal or overlapping parts"):
            sharding.process_share(mesh)


# ---- the table of logical axes ---------------------------------------------------------------


def test_specs_follow_the_table():
    spec = sharding.partition_spec
    assert spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert spec(("batch", "length", "activation")) == PartitionSpec(
        ("slice", "data", "fsdp"), None, None
    )
    assert spec((None, "vocab")) == PartitionSpec(None, "tensor")
    assert spec(()) == PartitionSpec()


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="haeds"):
        sharding.partition_spec(("embed", "haeds"))


@pytest.mark.parametrize("names", [("heads", "mlp"), ("batch", "embed"), ("embed", "embed")])
def test_two_axes_on_one_mesh_axis_are_an_error(names):
    with pytest.raises(ValueError, match="need a mesh axis twice"):
        sharding.partition_spec(names)


def used_names():
    """(where, names) of every call in the package that names logical axes."""
    found = []
    for path in sorted(Path(mmgem_jax.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else None
            name = call.func.id if isinstance(call.func, ast.Name) else name
            where = f"{path.name}:{call.lineno}"
            if name in ("with_logical_constraint", "linear", "project"):
                axes = call.args[2 if name == "project" else 1]
                axes = constants.get(axes.id, axes) if isinstance(axes, ast.Name) else axes
                if isinstance(axes, ast.Tuple):
                    found.append((where, [element.value for element in axes.elts]))
            elif name == "named":
                axes = call.args[1:]
                if all(isinstance(axis, ast.Constant) for axis in axes):
                    found.append((where, [axis.value for axis in axes]))
    return found


def test_every_name_in_the_sources_is_in_the_table_and_the_table_has_no_others():
    """Linen takes an unknown name for a replicated axis, without a word."""
    calls = used_names()
    assert len(calls) > 20
    for where, names in calls:
        assert set(names) - {None} <= set(dict(sharding.RULES)), where
        sharding.partition_spec(names)
    used = {name for _, names in calls for name in names} | {"layers"}  # nn.scan's own
    assert used - {None} == set(dict(sharding.RULES))


@functools.cache
def boxed_params():
    setup = tiny.setup()
    make = functools.partial(objective.init_params, setup.model, setup.batch)
    return jax.eval_shape(make, jax.random.key(0))


def test_every_parameter_has_a_spec():
    boxes = jax.tree.leaves(boxed_params(), is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(sharding.partition_spec(box.names)) == box.value.ndim
        assert (box.names[:1] == ("layers",)) == (box.value.ndim > 0 and box.value.shape[0] == 2)


def test_a_parameter_without_names_is_an_error():
    with pytest.raises(ValueError, match="a/b has no logical axis names"):
        sharding.param_shardings({"a": {"b": jnp.zeros(3)}}, tiny.mesh_of((1, 1, 1)))


def test_a_parameter_that_the_mesh_does_not_divide_is_a_user_s_error():
    setup = tiny.setup({"model.vision.width": 36})
    make = functools.partial(objective.init_params, setup.model, setup.batch)
    boxed = jax.eval_shape(make, jax.random.key(0))
    sharding.param_shardings(boxed, tiny.mesh_of((2, 4, 1)))
    message = r"mesh: .*'fsdp': 8.* does not divide region_projection/kernel of shape \(36, 16\)"
    with pytest.raises(UserError, match=message):
        sharding.param_shardings(boxed, tiny.mesh_of((1, 8, 1)))


def test_the_model_s_constraints_reach_the_compiler():
    """Under `with mesh:`, or with a name misspelt, they would be dropped without a word."""
    setup, mesh = tiny.setup(), tiny.mesh_of((2, 2, 2))

    def run(params, batch):
        terms = functools.partial(setup.model.apply, method=objective.loss_terms)
        return terms({"params": params}, batch, setup.config.loss)

    with sharding.use_mesh(mesh):
        inside = jax.jit(run).lower(setup.params, setup.batch).as_text()
    assert inside.count("sdy.sharding_constraint") >= 10
    assert '{"slice", "data", "fsdp"}' in inside and '{"tensor"}' in inside
