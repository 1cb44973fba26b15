import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.errors import UserError
from mmgem_jax.train_state import TrainState

MESHES = {"one device": (1, 1, 1), "eight devices": (2, 2, 2)}


def make_mesh(name):
    return tiny.mesh_of(MESHES[name])


def make_state(mesh, step=3, average=True, width=8):
    """A train state of two parameters, laid out on the mesh, and what describes it."""
    random = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(random.standard_normal((4, width)), jnp.float32),
        "bias": jnp.asarray(random.standard_normal(width), jnp.bfloat16),
    }
    moments = jax.tree.map(jnp.square, optax.adam(1e-3).init(params))
    copy = jax.tree.map(jnp.negative, params) if average else None
    state = TrainState(jnp.int32(step), params, moments, copy)
    specs = {0: PartitionSpec(), 1: PartitionSpec("tensor"), 2: PartitionSpec("fsdp", "tensor")}
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])), state)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    return placed, described


def numbers():
    """A data iterator: 0, 1, 2, ..."""
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(workdir, steps, every=1, keep=None, last=False, mesh="one device"):
    """Saves as a run does, one step after another."""
    batches = numbers()
    with Checkpoints(workdir, every, keep) as checkpoints:
        for step in range(1, steps + 1):
            next(batches)
            state, _ = make_state(make_mesh(mesh), step)
            checkpoints.save(step, state, batches, last=last and step == steps)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_equal(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", MESHES)
def test_state_and_position_come_back_bit_for_bit_on_any_mesh(tmp_path, before, after):
    save(tmp_path, 3, mesh=before)
    expected, abstract = make_state(make_mesh(after), 3)
    batches = numbers()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 3
        state = checkpoints.restore(abstract, batches)
    assert_equal(state, expected)
    assert next(batches) == 3
    for x, described in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == described.sharding


def test_a_state_without_average_and_the_state_alone(tmp_path):
    expected, abstract = make_state(make_mesh("one device"), average=False)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(3, expected, numbers())
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore_params(abstract), expected)


def test_a_part_of_a_state_of_the_step_that_is_asked_for(tmp_path):
    save(tmp_path, 3)
    mesh = make_mesh("eight devices")
    expected, abstract = make_state(mesh, 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        found = checkpoints.restore_params({"average": abstract.average}, 2)
        newest = checkpoints.restore_params({"params": abstract.params})
    assert_equal(found, {"average": expected.average})
    assert found["average"]["kernel"].sharding == abstract.average["kernel"].sharding
    assert_equal(newest, {"params": make_state(mesh, 3)[0].params})


def test_what_happens_after_the_call_is_not_saved(tmp_path):
    mesh = make_mesh("eight devices")
    expected, abstract = make_state(mesh)
    state, _ = make_state(mesh)
    batches = numbers()
    scale = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        next(batches)
        checkpoints.save(3, state, batches)
        for _ in range(5):
            state = scale(state)
            next(batches)
        del state
    batches = numbers()
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(abstract, batches), expected)
    assert next(batches) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 3}, [3, 6]),
        ({"every": 3, "last": True}, [3, 6, 7]),
        ({"every": 7, "last": True}, [7]),
        ({"every": 2, "keep": 2}, [4, 6]),
        ({"every": 2, "keep": 2, "last": True}, [6, 7]),
        ({"every": 0, "last": True}, [7]),
        ({"every": 3, "keep": 0}, [3, 6]),
    ],
)
def test_which_steps_are_saved_and_kept(tmp_path, options, expected):
    save(tmp_path, 7, **options)
    assert saved_steps(tmp_path) == expected


def test_a_save_cut_short_is_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 2)
    whole = tmp_path / "checkpoints" / "2"
    whole.rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    batches = numbers()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        expected, abstract = make_state(make_mesh("one device"), 1)
        assert_equal(checkpoints.restore(abstract, batches), expected)
    assert next(batches) == 1


def test_other_shapes_are_one_line(tmp_path):
    save(tmp_path, 1)
    _, wide = make_state(make_mesh("one device"), width=16)
    _, other = make_state(make_mesh("one device"))
    other.params["scale"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"params/bias is \(8,\); this config has \(16,\)$"):
            checkpoints.restore(wide, numbers())
        with pytest.raises(UserError, match=r"params/scale is absent; this config has \(2,\)$"):
            checkpoints.restore_params(other)
