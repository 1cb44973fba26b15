"""The mesh, and the table from logical axis names to mesh axes."""

import ast
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

import mmgem_jax
from mmgem_jax import objective, sharding
from mmgem_jax.errors import UserError

# ---- the mesh --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1)), ((4, 1, 2),) * 2],
)
def test_mesh_sizes_and_the_rest_rule(asked, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, asked, strict=True)))
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.MESH_AXES, shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "asked", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (8, 8, 1), (-2, -4, 1), (-1, 0, 1)]
)
def test_mesh_sizes_that_do_not_fit_are_a_user_s_error(asked):
    data, fsdp, tensor = asked
    with pytest.raises(UserError) as error:
        sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})
    assert str(error.value) == (
        f"mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not multiply to the 8 devices "
        "there are"
    )


def test_a_batch_is_split_over_all_but_tensor():
    mesh = tiny.mesh_of((2, 2, 2))
    batch = {"x": np.arange(24).reshape(8, 3), "flags": np.arange(8) % 2 == 0}
    placed = sharding.to_global(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.shard_shape(array.shape)[0] == 2
        assert len(placed[name].sharding.device_set) == 8


# ---- the table of logical axes ---------------------------------------------------------------


def test_specs_follow_the_table():
    spec = sharding.partition_spec
    assert spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert spec(("batch", "length", "activation")) == PartitionSpec(("data", "fsdp"), None, None)
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
            if name in ("with_logical_constraint", "linear"):
                axes = call.args[1]
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
        assert set(names) <= set(dict(sharding.RULES)), where
        sharding.partition_spec(names)
    used = {name for _, names in calls for name in names} | {"layers"}  # nn.scan's own
    assert used == set(dict(sharding.RULES))


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
    assert '{"data", "fsdp"}' in inside and '{"tensor"}' in inside
