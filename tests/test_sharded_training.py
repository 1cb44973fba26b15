"""The train state and the train step on a mesh: it changes speed and memory, no number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from mmgem_jax import sharding, train_state
from mmgem_jax.faults import no_faults
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_conflict_probe, make_train_step

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "mixed": (2, 2, 2)}
MESHES |= {"slices": (2, 2, 2, 1)}
STEPS = 5

ADAMW = tiny.one_group("adamw", 1e-3, 0.01)
MUON = tiny.groups(
    matrices=("decoder/.*kernel", "muon", 0.02, 0.01),
    rest=("(?!decoder/.*kernel).*", "adamw", 1e-3, 0.0),
)


@functools.cache
def abstract(shape, groups):
    """(abstract state, model, optimizer, config) on a mesh; an average is kept."""
    config = tiny.config(settings(groups))
    model, optimizer = tiny.setup().model, make_optimizer(config.optimizer)
    batch = tiny.batch(config)
    return train_state.abstract_state(model, optimizer, True, batch, tiny.mesh_of(shape))


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
        with sharding.use_mesh(tiny.mesh_of(shape)):
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
    """Metrics of 5 steps; the parameters and their average after them."""
    config = tiny.config(settings(groups))
    model, optimizer, mesh = (
        tiny.setup().model,
        make_optimizer(config.optimizer),
        tiny.mesh_of(shape),
    )
    described = abstract(shape, groups)
    # Two regions an image, one of them padding now and then.
    batches = [tiny.batch(config, seed, regions=2) for seed in range(STEPS)]
    for seed, batch in enumerate(batches):
        batch["region_mask"][seed, 1] = False
    with sharding.use_mesh(mesh):
        step = make_train_step(model, optimizer, config)
        step = compile_step(step, train_state.shardings_of(described), mesh, {})
        state = jax.device_put(first_state(groups), train_state.shardings_of(described))
        found = []
        for batch in batches:
            state, metrics = step(state, sharding.to_global(batch, mesh))
            found.append(jax.device_get(metrics))
        assert by_path(state) == by_path(described)
        return found, jax.device_get((state.params, state.average))


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
        faults=no_faults(),
    )
    return jax.device_get(state)


@functools.cache
def train_on_one_device(groups):
    return train((1, 1, 1), groups)


@pytest.mark.parametrize(
    ("name", "groups"), [*((name, "adamw") for name in MESHES), ("mixed", "muon")]
)
def test_eight_devices_equal_one(name, groups, fresh_compilation, capfd):
    expected_metrics, expected_trees = train_on_one_device(groups)
    capfd.readouterr()
    metrics, trees = train(MESHES[name], groups)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found.keys() == expected.keys()
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-4)
    tiny.assert_trees_close(trees, expected_trees, rtol=1e-5)
    # The steps did something: no leaf is where it began. But softmax does not see a key's bias.
    started = first_state(groups).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trees[0], started)
    del moved["vision"]["blocks"]["key"]["bias"]
    assert min(jax.tree.leaves(moved)) > 0 and metrics[0]["loss"] != metrics[-1]["loss"]


def test_the_conflict_probe_on_eight_devices_equals_one():
    config, found = tiny.config(), {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh, described = tiny.mesh_of(shape), abstract(shape, "adamw")
        params = jax.device_put(
            first_state("adamw").params, train_state.shardings_of(described).params
        )
        with sharding.use_mesh(mesh):
            probe = jax.jit(make_conflict_probe(tiny.setup().model, config))
            found[shape] = probe(params, sharding.to_global(tiny.batch(config), mesh))
    for name, value in found[1, 1, 1].items():
        assert float(found[2, 2, 2][name]) == pytest.approx(float(value), rel=1e-4), name
