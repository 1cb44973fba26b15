import contextlib
import re
import resource
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.errors import RunEnded, UserError
from mmgem_jax.faults import no_faults
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
    state = TrainState(jnp.int32(step), params, moments, copy, no_faults())
    specs = {0: PartitionSpec(), 1: PartitionSpec("tensor"), 2: PartitionSpec("fsdp", "tensor")}
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])), state)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    return placed, described


def numbers():
    """A data iterator: 0, 1, 2, ..."""
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def save(workdir, steps, every=1, keep=None, last=False, mesh="one device", scores=None, **options):
    """Saves as a run does, one step after another; `scores` are of some of the steps."""
    batches = numbers()
    with Checkpoints(workdir, every, keep, **options) as checkpoints:
        for step in range(1, steps + 1):
            next(batches)
            state, _ = make_state(make_mesh(mesh), step)
            found = (scores or {}).get(step)
            checkpoints.save(step, state, batches, last=last and step == steps, scores=found)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def names_in(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


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
        state, step = checkpoints.restore(abstract, batches)
    assert step == 3
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
        assert_equal(checkpoints.restore(abstract, batches)[0], expected)
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


def scores_of(values):
    """Scores by step, of a metric in which more is better and of one in which less is."""
    return {step: {"recall": value, "loss": -value} for step, value in values.items()}


RECALLS = {1: 0.2, 2: 0.9, 3: 0.1, 4: 0.5, 6: float("nan")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 1, "best": "recall"}, [2, 7]),
        ({"keep": 1, "best": "-loss", "keep_best": 2}, [2, 4, 7]),
        ({"keep": 1, "best": "loss"}, [3, 7]),
        ({"keep": 2, "keep_every": 4, "best": "recall", "keep_best": 0}, [4, 6, 7]),
        ({"keep": None, "best": "recall"}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_round_steps_and_the_best_are_kept_too(tmp_path, options, expected):
    save(tmp_path, 7, scores=scores_of(RECALLS), **options)
    assert saved_steps(tmp_path) == expected


def test_the_best_are_known_to_who_goes_on(tmp_path):
    save(tmp_path, 4, keep=1, best="recall", scores=scores_of(RECALLS))
    state, _ = make_state(make_mesh("one device"))
    with Checkpoints(tmp_path, keep=1, best="recall") as checkpoints:
        checkpoints.save(5, state, numbers(), scores={"recall": 0.8})
        checkpoints.save(6, state, numbers())
    assert saved_steps(tmp_path) == [2, 6]


def test_a_metric_that_there_is_not_is_one_line(tmp_path):
    state, _ = make_state(make_mesh("one device"))
    expected = r"checkpoint\.best: no metric 'recal'; expected one of \['loss', 'recall'\]$"
    opened = Checkpoints(tmp_path, every=5, best="-recal")
    with pytest.raises(UserError, match=expected), opened as checkpoints:
        checkpoints.save(5, state, numbers(), scores={"recall": 0.5, "loss": 1.0})
    assert saved_steps(tmp_path) == [5]  # what the evaluation has cost is not lost


def test_the_record_says_what_the_run_is(tmp_path):
    about = {"config": {"seed": 0, "data": {"files": ["a.tar"]}}, "tokenizer": "ab12"}
    save(tmp_path, 1, about=about, scores={1: {"recall": np.float32(0.5)}})
    with Checkpoints(tmp_path) as checkpoints:
        record = checkpoints.record(1)
    assert (record["step"], record["about"], record["scores"]) == (1, about, {"recall": 0.5})
    assert record["data"] == {"next_index": 1}
    bias = record["arrays"]["params/bias"]
    assert (bias["shape"], bias["dtype"]) == ([8], "bfloat16")


def test_a_save_cut_short_is_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 2)
    whole = tmp_path / "checkpoints" / "2"
    whole.rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    batches = numbers()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        expected, abstract = make_state(make_mesh("one device"), 1)
        assert_equal(checkpoints.restore(abstract, batches)[0], expected)
    assert next(batches) == 1


def test_what_killed_saves_leave_does_not_pile_up(tmp_path):
    save(tmp_path, 1)
    left = [f"{step}.orbax-checkpoint-tmp" for step in range(2, 102)]
    for name in left:
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    state, abstract = make_state(make_mesh("one device"), 1)
    with Checkpoints(tmp_path) as reader:
        reader.restore_params(abstract)
        assert names_in(tmp_path) == {"1", *left}  # the run may be writing one of them
        with Checkpoints(tmp_path) as writer:
            assert writer.steps == [1]
            writer.save(2, state, numbers())
    assert names_in(tmp_path) == {"1", "2"}


def test_other_arrays_are_one_line(tmp_path):
    save(tmp_path, 1)
    _, wide = make_state(make_mesh("one device"), width=16)
    _, other = make_state(make_mesh("one device"))
    _, without = make_state(make_mesh("one device"), average=False)
    other.params["scale"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    half = without.params | {"kernel": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"params/bias is \(8,\); this config has \(16,\)$"):
            checkpoints.restore(wide, numbers())
        with pytest.raises(UserError, match=r"params/scale is absent; this config has \(2,\)$"):
            checkpoints.restore_params(other)
        with pytest.raises(UserError, match=r"average/bias is \(8,\); this config has none$"):
            checkpoints.restore(without, numbers())
        with pytest.raises(UserError, match=r"kernel is float32; this config has bfloat16$"):
            checkpoints.restore_params({"params": half})
    assert names_in(tmp_path) == {"1"}
    assert not (tmp_path / "damaged").exists()


# ---- disks that are full, and folders that are none ----------------------------------------------


@pytest.fixture
def big_state():
    """A state that takes 2 MB on disk."""
    return {"x": jax.random.bits(jax.random.key(0), (512, 1024))}


@contextlib.contextmanager
def full_disk():
    """Within it no file gets longer than 1 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_states(workdir, states, steps):
    """Saves some of the states, by their step; only the newest is kept."""
    with Checkpoints(workdir, keep=1) as checkpoints:
        for step in steps:
            checkpoints.save(step, states[step], numbers())


FULL = r"checkpoint \S+/checkpoints: step 2 could not be written: File too large; "


@pytest.mark.parametrize("found_at", ["the next save", "exit"])
def test_a_full_disk_is_one_line_and_costs_no_other_step(tmp_path, big_state, capfd, found_at):
    expected = FULL + "the newest whole one is step 1$"
    steps = [1, 2, 3] if found_at == "the next save" else [1, 2]
    with full_disk(), pytest.raises(UserError, match=expected):
        save_states(tmp_path, {1: {"x": big_state["x"][:1]}, 2: big_state, 3: big_state}, steps)
    assert capfd.readouterr() == ("", "")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(2, big_state, numbers())
    assert names_in(tmp_path) == {"1", "2"}
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(big_state, numbers())[0], big_state)


def test_a_full_disk_is_noticed_at_the_first_step_after_it(tmp_path, big_state):
    """Which is not to be saved."""
    opened = Checkpoints(tmp_path, every=2)
    with full_disk(), pytest.raises(UserError, match=FULL), opened as checkpoints:
        checkpoints.save(2, big_state, numbers())
        while checkpoints.checkpointer.is_saving_in_progress():
            time.sleep(0.01)
        checkpoints.save(3, big_state, numbers())
        raise AssertionError("nothing was said")


def test_a_run_that_ends_does_not_say_that_it_is_saved_if_it_is_not(tmp_path, big_state):
    opened = Checkpoints(tmp_path)
    with full_disk(), pytest.raises(UserError, match=FULL), opened as checkpoints:
        checkpoints.save(2, big_state, numbers(), last=True)
        raise RunEnded("SIGTERM: stopped after step 2, which is saved", 143)


def test_another_error_comes_before_that_of_a_full_disk(tmp_path, big_state, capfd):
    with full_disk(), pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, big_state, numbers())
        raise ZeroDivisionError
    said = capfd.readouterr().err
    assert re.fullmatch("warning: " + FULL + "there is no whole one\n", said), said


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    expected = r"checkpoint \S+/checkpoints: File exists; expected what can be written$"
    with pytest.raises(UserError, match=expected):
        Checkpoints(tmp_path)


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    state, _ = make_state(make_mesh("one device"))
    expected = "step 1 could not be written: Not a directory; there is no whole one$"
    with pytest.raises(UserError, match=expected), Checkpoints(tmp_path) as checkpoints:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("")
        checkpoints.save(1, state, numbers())
