"""The mesh, the table of logical axes, and that a mesh changes speed and memory alone."""

import ast
import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, PartitionSpec

import mmgem_jax
from mmgem_jax import objective, sharding, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_conflict_probe, make_train_step

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "mixed": (2, 2, 2)}
STEPS = 5

ADAMW = tiny.one_group("adamw", 1e-3, 0.01)
MUON = tiny.groups(
    matrices=(".*kernel", "muon", 0.02, 0.01), rest=("(?!.*kernel).*", "adamw", 1e-3, 0.0)
)


def mesh_of(shape):
    sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(shape)])


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
    mesh = mesh_of((2, 2, 2))
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
        sharding.param_shardings({"a": {"b": jnp.zeros(3)}}, mesh_of((1, 1, 1)))


def test_a_parameter_that_the_mesh_does_not_divide_is_a_user_s_error():
    setup = tiny.setup({"model.vision.width": 36})
    make = functools.partial(objective.init_params, setup.model, setup.batch)
    boxed = jax.eval_shape(make, jax.random.key(0))
    sharding.param_shardings(boxed, mesh_of((2, 4, 1)))
    message = r"mesh: .*'fsdp': 8.* does not divide region_projection/kernel of shape \(36, 16\)"
    with pytest.raises(UserError, match=message):
        sharding.param_shardings(boxed, mesh_of((1, 8, 1)))


# ---- the state on a mesh ---------------------------------------------------------------------


@functools.cache
def abstract(shape, groups):
    """(abstract state, model, optimizer, config) on a mesh; an average is kept."""
    config = tiny.config(settings(groups))
    model, optimizer = tiny.setup().model, make_optimizer(config.optimizer)
    batch = tiny.batch(config)
    return train_state.abstract_state(model, optimizer, True, batch, mesh_of(shape))


def settings(groups):
    # Adam divides a gradient that is 0 but for rounding by its size: epsilon above the rounding.
    return {
        "optimizer.groups": {"adamw": ADAMW, "muon": MUON}[groups],
        "optimizer.adam_epsilon": 1e-3,
        "optimizer.warmup_steps": 1,
        "average_decay": 0.9,
    }


def states_of(tree, kind):
    """The optimizer's states of one kind, such as Adam's."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def by_path(tree):
    """Shardings (shape, spec) by path; what a group does not have is left out."""
    return {
        sharding.path_name(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("groups", ["adamw", "muon"])
def test_moments_and_averages_are_split_like_their_parameters(groups):
    state = abstract((2, 2, 2), groups)
    params = by_path(state.params)
    split = [name for name, (_, spec) in params.items() if any(spec)]
    assert "decoder/blocks/query/kernel" in split and "vision/blocks/down/kernel" in split
    assert params["decoder/blocks/query/kernel"][1] == PartitionSpec(None, "fsdp", "tensor")
    assert by_path(state.average) == params

    moments = [m for s in states_of(state.opt_state, optax.ScaleByAdamState) for m in (s.mu, s.nu)]
    muon = [s.mu for s in states_of(state.opt_state, optax.contrib.MuonState)]
    assert bool(muon) == (groups == "muon")
    seen = set()
    for tree in moments + muon:
        found = by_path(tree)
        assert found.items() <= params.items()
        seen |= set(found)
    assert seen == set(params)


def test_counters_and_scalars_are_everywhere():
    state = abstract((2, 2, 2), "adamw")
    assert state.step.sharding.spec == PartitionSpec()
    assert state.params["logit_scale"].sharding.spec == PartitionSpec()
    for adam in states_of(state.opt_state, optax.ScaleByAdamState):
        assert adam.count.sharding.spec == PartitionSpec()


def test_the_initial_state_does_not_depend_on_the_mesh_and_lies_as_described():
    config = tiny.config(settings("adamw"))
    setup, optimizer = tiny.setup(), make_optimizer(config.optimizer)
    states = {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        with sharding.use_mesh(mesh_of(shape)):
            described = abstract(shape, "adamw")
            states[shape] = train_state.init_state(
                setup.model, optimizer, described, setup.batch, 7
            )
        assert by_path(states[shape]) == by_path(described)
    tiny.assert_trees_close(states[2, 2, 2], states[1, 1, 1], rtol=1e-6)
    one = states[2, 2, 2].params["vision"]["blocks"]["up"]["kernel"].addressable_shards[0].data
    assert one.shape == (2, 32 // 2, 48 // 2)


# ---- training on a mesh ----------------------------------------------------------------------


@pytest.fixture
def fresh_compilation():
    """No compiled program from a file: the compiler's warnings are to be seen."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def train(shape, groups):
    """Losses of 5 steps, the parameters and their average after them, and the last probe."""
    config = tiny.config(settings(groups))
    model, optimizer, mesh = tiny.setup().model, make_optimizer(config.optimizer), mesh_of(shape)
    described = abstract(shape, groups)
    # Two regions an image, one of them padding now and then.
    batches = [tiny.batch(config, seed, regions=2) for seed in range(STEPS)]
    for seed, batch in enumerate(batches):
        batch["region_mask"][seed, 1] = False
    with sharding.use_mesh(mesh):
        step = make_train_step(model, optimizer, config)
        step = compile_step(step, train_state.shardings_of(described), mesh)
        state = jax.device_put(first_state(groups), train_state.shardings_of(described))
        losses = []
        for batch in batches:
            state, metrics = step(state, sharding.to_global(batch, mesh))
            losses.append(jax.device_get(metrics))
        probe = jax.jit(make_conflict_probe(model, config))
        conflict = probe(state.params, sharding.to_global(batches[0], mesh))
        assert by_path(state) == by_path(described)
        return losses, jax.device_get((state.params, state.average)), jax.device_get(conflict)


@functools.cache
def first_state(groups):
    """A state on the host whose parameters are all random."""
    config = tiny.config(settings(groups))
    optimizer = make_optimizer(config.optimizer)
    params = tiny.randomise(tiny.setup().params)
    state = train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        average=params,
    )
    return jax.device_get(state)


@functools.cache
def train_on_one_device(groups):
    return train((1, 1, 1), groups)


@pytest.mark.parametrize(
    ("name", "groups"), [*((name, "adamw") for name in MESHES), ("mixed", "muon")]
)
def test_eight_devices_equal_one(name, groups, fresh_compilation, capfd):
    expected_metrics, expected_trees, expected_conflict = train_on_one_device(groups)
    capfd.readouterr()
    metrics, trees, conflict = train(MESHES[name], groups)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found.keys() == expected.keys()
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    tiny.assert_trees_close(trees, expected_trees, rtol=1e-5)
    for key, value in expected_conflict.items():
        assert float(conflict[key]) == pytest.approx(float(value), rel=1e-4), key
    # The steps did something: no leaf is where it began.
    started = first_state(groups).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trees[0], started)
    assert min(jax.tree.leaves(moved)) > 0 and metrics[0]["loss"] != metrics[-1]["loss"]


def test_the_model_s_constraints_reach_the_compiler():
    """Under `with mesh:`, or with a name misspelt, they would be dropped without a word."""
    setup, mesh = tiny.setup(), mesh_of((2, 2, 2))

    def run(params, batch):
        terms = functools.partial(setup.model.apply, method=objective.loss_terms)
        return terms({"params": params}, batch, setup.config.loss)

    with sharding.use_mesh(mesh):
        inside = jax.jit(run).lower(setup.params, setup.batch).as_text()
    assert inside.count("sdy.sharding_constraint") >= 10
    assert '{"data", "fsdp"}' in inside and '{"tensor"}' in inside
