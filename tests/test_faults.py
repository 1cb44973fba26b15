"""Updates that are not taken: they leave no trace but in the counts, on any mesh and in parts."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax import faults, sharding, train_state, train_step
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer

WINDOW = 4

# ---- the judgement, by itself --------------------------------------------------------------------


@functools.cache
def judge(spike, window=WINDOW):
    """`judged`, compiled."""
    config = types.SimpleNamespace(spike=spike, window=window)
    return jax.jit(lambda *arguments: faults.judged(*arguments, config))


def run_of(losses, spike=0.0, norms=None, sources=None, window=WINDOW):
    """Whether each update is taken, and the Faults at the end."""
    state, taken = faults.no_faults(), []
    norms = norms or [1.0] * len(losses)
    sources = sources or [0] * len(losses)
    for loss, norm, source in zip(losses, norms, sources, strict=True):
        numbers = jnp.float32(loss), jnp.float32(norm), jnp.full(2, source, jnp.int32)
        one, state = judge(spike, window)(state, *numbers)
        taken.append(bool(one))
    return taken, state


@pytest.mark.parametrize("spike", [0.0, 5.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_needs_a_finite_loss_and_a_finite_gradient(spike, bad):
    assert run_of([1, bad, 1], spike)[0] == [True, False, True]
    assert run_of([1, 1, 1], spike, norms=[1, bad, 1])[0] == [True, False, True]


def test_skipped_updates_are_counted_and_those_in_a_row_anew():
    nan = float("nan")
    for losses, skipped, in_a_row in (
        ([1, 1], 0, 0),
        ([1, nan, nan], 2, 2),
        ([nan, nan, 1], 2, 0),
        ([nan, nan, 1, nan], 3, 1),
    ):
        state = run_of(losses)[1]
        assert (int(state.skipped), int(state.in_a_row)) == (skipped, in_a_row), losses


def test_mean_and_variance_are_those_of_weighted_losses():
    """All weigh the same up to the window; after it each loss takes 1 / window from all before."""
    losses = np.random.default_rng(0).normal(5, 1, 15)
    for count in range(1, len(losses) + 1):
        older = np.full(min(count, WINDOW), 1 / min(count, WINDOW))
        newer = max(count - WINDOW, 0)
        weights = [older * (1 - 1 / WINDOW) ** newer]
        weights.append((1 - 1 / WINDOW) ** np.arange(newer)[::-1] / WINDOW)
        weights = np.concatenate(weights)
        mean = (weights * losses[:count]).sum()
        variance = (weights * (losses[:count] - mean) ** 2).sum()
        taken, state = run_of(losses[:count], spike=1e6)
        assert all(taken) and int(state.count[0]) == count
        assert float(state.mean[0]) == pytest.approx(mean, rel=1e-5)
        assert float(state.variance[0]) == pytest.approx(variance, rel=1e-4, abs=1e-6)


def test_a_spike_is_a_loss_so_many_deviations_above_the_mean_and_teaches_nothing():
    usual = [4.0, 6.0, 4.0, 6.0]  # of mean 5 and deviation 1
    for loss, taken in ((7.9, True), (8.1, False), (0.0, True)):
        assert run_of([*usual, loss], spike=3.0)[0] == [True] * 4 + [taken], loss
    assert run_of([*usual[:3], 1e9], spike=3.0)[0][-1]  # too little is known yet
    after = run_of([*usual, *[1e9] * 20], spike=3.0)[1]
    before = run_of(usual, spike=3.0)[1]
    assert int(after.in_a_row) == 20
    for name in ("mean", "variance", "count"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_sources_are_judged_by_their_own_losses():
    losses, sources = [1, 100, 2, 101, 1, 100, 2, 101, 100, 100], [0, 1] * 4 + [0, 1]
    taken, state = run_of(losses, spike=3.0, sources=sources)
    assert taken == [True] * 8 + [False, True]
    assert state.count[:3].tolist() == [4, 5, 0]
    last = faults.MOST_SOURCES - 1
    assert run_of(losses[::2], spike=3.0, sources=[last] * 5)[0] == [True] * 4 + [False]


def test_without_spikes_to_look_for_a_loss_may_be_anything_and_nothing_is_learned():
    taken, state = run_of([1, 1, 1, 1, 1e30], spike=0.0)
    assert all(taken)
    jax.tree.map(np.testing.assert_array_equal, state, faults.no_faults())


def test_when_to_stop_is_said_in_one_line():
    metrics = {"updates_skipped_in_a_row": np.float32(3), "loss": np.float32("nan")}
    metrics |= {"grad_norm": np.float32(2.5)}
    assert faults.reason_to_stop(metrics, stop_after=4) is None
    reason = faults.reason_to_stop(metrics, stop_after=3)
    assert "3 updates in a row" in reason and "loss of nan" in reason and "norm 2.5" in reason


def test_spikes_of_too_many_sources_are_one_line():
    most, config = faults.MOST_SOURCES, tiny.config({"faults.spike": 3.0}).faults
    faults.check_faults(config, most)
    faults.check_faults(tiny.config().faults, most + 1)
    with pytest.raises(
        UserError, match=r"faults.spike: 3 with 17 sources in data.mixture; .* most 16"
    ):
        faults.check_faults(config, most + 1)


# ---- within the train step -----------------------------------------------------------------------

SETTINGS = {
    "optimizer.groups": tiny.one_group("adamw", 1e-3, 0.01),
    "average_decay": 0.9,
    "faults.spike": 6.0,
    "faults.window": 3,
}


def with_marks(make):
    """`make_gradients`, whose loss and gradient are changed as a batch says of itself."""

    def marked(*arguments):
        gradients = make(*arguments)

        def changed(params, batch):
            plain = {name: x for name, x in batch.items() if name not in ("add", "times")}
            grads, loss, metrics = gradients(params, plain)
            times = batch["times"].max()
            return jax.tree.map(lambda x: x * times, grads), loss + batch["add"].max(), metrics

        return changed

    return marked


class Runner:
    """The tiny model's step on a mesh, whose batches may be marked as bad, and its first state."""

    def __init__(self, shape, parts):
        self.config = tiny.config(SETTINGS | {"accumulation_steps": parts})
        self.mesh, model = tiny.mesh_of(shape), tiny.setup().model
        optimizer = make_optimizer(self.config.optimizer)
        made = model, optimizer, True, tiny.batch(self.config)
        abstract = train_state.abstract_state(*made, self.mesh)
        self.shardings = train_state.shardings_of(abstract)
        start = jax.jit(functools.partial(train_state.state_at_start, optimizer, True))
        self.first = jax.device_get(start(tiny.random_params()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_step, "make_gradients", with_marks(train_step.make_gradients))
            step = train_step.make_train_step(model, optimizer, self.config)
        self.step = train_step.compile_step(step, self.shardings, self.mesh, {})

    def batch(self, seed, bad=None):
        """A batch of the seed: a usual one, or one that spoils the update in a certain way."""
        batch = tiny.batch(self.config, seed)
        rows = np.ones(self.config.batch_size, np.float32)
        batch |= {"add": 0 * rows, "times": rows}
        if bad == "not finite":
            batch["boxes"][3] = np.nan
        elif bad == "a gradient too large":
            batch["times"] *= 1e30
        elif bad == "a spike":
            batch["add"] += 1e3
        return batch

    def run(self, batches):
        """The state after these batches, and the metrics of each, on the host."""
        found = []
        with sharding.use_mesh(self.mesh):
            state = jax.device_put(self.first, self.shardings, may_alias=False)
            for batch in batches:
                old = state
                state, metrics = self.step(state, sharding.to_global(batch, self.mesh))
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
                found.append(jax.device_get(metrics))
            return jax.device_get(state), found


@functools.cache
def runner(shape, parts):
    return Runner(shape, parts)


BAD = {3: "not finite", 4: "a gradient too large", 6: "a spike"}  # before these of 8 good batches
WHERE = [((1, 1, 1), 1), ((2, 2, 2), 2)]


@functools.cache
def runs(shape, parts):
    """The same 8 batches without and with bad ones among them."""
    own = runner(shape, parts)
    good = {seed: own.batch(seed) for seed in range(8)}
    mixed = []
    for seed, batch in good.items():
        mixed += [own.batch(seed, BAD[seed])] if seed in BAD else []
        mixed.append(batch)
    return own.run(good.values()), own.run(mixed)


@pytest.mark.parametrize(("shape", "parts"), WHERE)
def test_a_bad_batch_is_as_good_as_none(shape, parts):
    """Bit for bit in parameters, optimizer and average; what is seen after it too."""
    (without, plain), (state, metrics) = runs(shape, parts)
    skipped = [int(found["update_skipped"]) for found in metrics]
    assert skipped == [0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]
    for name in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(without, name))
    assert (int(state.step), int(without.step)) == (11, 8)
    assert (int(state.faults.skipped), int(state.faults.in_a_row)) == (3, 0)
    for name in ("mean", "variance", "count"):
        np.testing.assert_array_equal(getattr(state.faults, name), getattr(without.faults, name))
    taken = [found for found, left_out in zip(metrics, skipped, strict=True) if not left_out]
    for found, expected in zip(taken, plain, strict=True):
        rest = expected | {"updates_skipped": found["updates_skipped"]}
        jax.tree.map(np.testing.assert_array_equal, found, rest)


@pytest.mark.parametrize(("shape", "parts"), WHERE)
def test_each_kind_of_bad_batch_is_what_it_is_called(shape, parts):
    _, (_, metrics) = runs(shape, parts)
    broken, steep, high = (found for found in metrics if found["update_skipped"])
    assert np.isnan(broken["loss"]) and np.isnan(broken["grad_norm"])
    assert np.isfinite(steep["loss"]) and np.isinf(steep["grad_norm"])
    assert 1e3 < high["loss"] < 1.1e3 and np.isfinite(high["grad_norm"])
    assert all(np.isfinite(found["param_norm"]) for found in metrics)


def test_eight_devices_and_two_parts_decide_as_one_device_does():
    (_, (one, of_one)), (_, (eight, of_eight)) = (runs(*where) for where in WHERE)
    for name in ("update_skipped", "updates_skipped", "updates_skipped_in_a_row"):
        assert [m[name] for m in of_one] == [m[name] for m in of_eight]
    np.testing.assert_allclose(one.faults.mean, eight.faults.mean, rtol=1e-5)
    assert one.faults.count.tolist() == eight.faults.count.tolist()


def test_bad_batches_in_a_row_are_counted_until_a_good_one():
    own = runner(*WHERE[0])
    bad = own.batch(0, "not finite")
    state, metrics = own.run([bad, bad, own.batch(1), bad])
    assert [int(m["updates_skipped_in_a_row"]) for m in metrics] == [1, 2, 0, 1]
    assert [int(m["updates_skipped"]) for m in metrics] == [1, 2, 2, 3]
    assert int(state.step) == 4
