"""One step of training: what it computes, what it keeps, and that it learns."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mmgem_jax import sharding, train_state
from mmgem_jax.faults import no_faults
from mmgem_jax.generate import Decoding, generate, visual_tokens
from mmgem_jax.models.mmgem import MAX_LOGIT_SCALE, MMGem
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_conflict_probe, make_train_step

FROZEN_VISION = tiny.groups(
    vision=("vision/.*", "frozen", 0.0, 0.0), rest=("(?!vision).*", "adamw", 1e-2, 0.1)
)


class Training:
    """A compiled step, and the state it has reached, on one device."""

    def __init__(self, changes, params=None):
        self.config = tiny.config(changes)
        self.model = tiny.setup().model
        self.optimizer = make_optimizer(self.config.optimizer)
        self.mesh = tiny.mesh_of((1, 1, 1))
        keep_average = self.config.average_decay > 0
        made = self.model, self.optimizer, keep_average, tiny.batch(self.config)
        abstract = train_state.abstract_state(*made, self.mesh)
        shardings = train_state.shardings_of(abstract)
        with sharding.use_mesh(self.mesh):
            step = make_train_step(self.model, self.optimizer, self.config)
            self.compiled = compile_step(step, shardings, self.mesh, {})
            self.state = jax.device_put(self.first_state(params, keep_average), shardings)

    def first_state(self, params, keep_average):
        """The state on the host, so that donating it costs no other test its parameters."""
        params = jax.device_get(tiny.setup().params if params is None else params)
        opt_state = jax.device_get(jax.jit(self.optimizer.init)(params))
        average = jax.tree.map(np.copy, params) if keep_average else None
        faults = jax.device_get(no_faults())
        return train_state.TrainState(np.zeros((), np.int32), params, opt_state, average, faults)

    def step(self, batch):
        """Takes a step; returns its metrics."""
        with sharding.use_mesh(self.mesh):
            batch = sharding.to_global(batch, self.mesh)
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.compiled(self.state, batch)
        return jax.device_get(metrics)


# ---- what a step computes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_steps():
    """Three steps with a frozen vision tower and an average: (first state, [(state, metrics)])."""
    changes = {
        "optimizer.groups": FROZEN_VISION,
        "optimizer.warmup_steps": 0,
        "optimizer.adam_epsilon": 1e-3,  # above the rounding of a gradient that is 0
        "average_decay": 0.15,
        "loss.generation_weight": 0.5,
    }
    training = Training(changes, params=tiny.randomise(tiny.setup().params))
    first, reached = jax.device_get(training.state), []
    for seed in range(3):
        metrics = training.step(tiny.batch(training.config, seed))
        reached.append((jax.device_get(training.state), metrics))
    return training, first, reached


def test_a_step_is_the_optimizer_s_update_by_the_gradient_of_the_loss(three_steps):
    training, first, reached = three_steps
    config, optimizer = training.config, training.optimizer
    batch = tiny.batch(config, seed=0)
    loss, gradient = jax.jit(jax.value_and_grad(tiny.loss_of(config)))(first.params, batch)
    gradient = gradient | {"vision": jax.tree.map(jnp.zeros_like, gradient["vision"])}
    updates, _ = jax.jit(optimizer.update)(gradient, first.opt_state, first.params)
    state, metrics = reached[0]
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    expected = metrics["loss_emb"] + 0.5 * metrics["loss_gen"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    tiny.assert_trees_close(state.params, optax.apply_updates(first.params, updates), rtol=1e-5)


def test_the_norms_in_the_metrics_are_those_of_the_trees(three_steps):
    training, first, reached = three_steps
    state, metrics = reached[0]
    norm = lambda tree: math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(tree)))  # noqa: E731
    gradient = jax.jit(jax.grad(tiny.loss_of(training.config)))(
        first.params, tiny.batch(training.config)
    )
    for name, tree in gradient.items():
        expected = 0 if name == "vision" else norm(tree)
        assert float(metrics[f"grad_norm_{name}"]) == pytest.approx(expected, rel=1e-5), name
    parts = [float(value) for name, value in metrics.items() if name.startswith("grad_norm_")]
    assert float(metrics["grad_norm"]) == pytest.approx(math.hypot(*parts), rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(norm(state.params), rel=1e-5)


def test_frozen_parameters_do_not_move_by_a_bit_and_the_others_do(three_steps):
    _, first, reached = three_steps
    for name, tree in reached[-1][0].params.items():
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), tree, first.params[name])
        assert set(jax.tree.leaves(moved)) == {name != "vision"}, name
    assert all(metrics["grad_norm_vision"] == 0 for _, metrics in reached)


def test_the_average_equals_a_hand_loop(three_steps):
    """The decay is at most (steps + 1) / (steps + 10), so the first steps weigh more."""
    _, first, reached = three_steps
    leaf = lambda tree: tree["decoder"]["head"].astype(np.float64)  # noqa: E731
    average = leaf(first.average)
    for step, (state, _) in enumerate(reached):
        decay = [0.1, 0.15, 0.15][step]  # (0 + 1) / (0 + 10), then the config's
        average = decay * average + (1 - decay) * leaf(state.params)
        np.testing.assert_allclose(leaf(state.average), average, rtol=0, atol=1e-6)
        assert state.eval_params is state.average


def test_steps_are_counted(three_steps):
    _, first, reached = three_steps
    assert [int(state.step) for state in (first, *(s for s, _ in reached))] == [0, 1, 2, 3]


def test_without_an_average_the_parameters_are_evaluated():
    state = train_state.TrainState(jnp.zeros(()), {"a": 1}, None, None, None)
    assert state.eval_params is state.params


# ---- memory, clamp and learning --------------------------------------------------------------


@pytest.fixture(scope="module")
def joint():
    """Plain training of every parameter on 16 pairs."""
    changes = {
        "batch_size": 16,
        "optimizer.groups": tiny.one_group("adamw", 5e-3),
        "optimizer.warmup_steps": 10,
        "optimizer.total_steps": 300,
    }
    training = Training(changes)
    batch = tiny.batch(training.config)
    batch["boxes"][:] = [0, 0, 1, 1]
    return training, batch


def test_the_old_state_s_memory_is_reused(joint):
    training, batch = joint
    old = training.state
    training.step(batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_the_temperature_stops_at_one_hundredth(joint):
    training, batch = joint
    start = jax.tree.map(jnp.copy, training.state)
    for scale in (MAX_LOGIT_SCALE + 1, MAX_LOGIT_SCALE - 0.5):
        params = start.params | {"logit_scale": jnp.float32(scale)}
        training.state = jax.tree.map(jnp.copy, start.replace(params=params))
        training.step(batch)
        reached = float(training.state.params["logit_scale"])
        assert reached == pytest.approx(min(scale, math.log(100)), abs=0.02)
        assert reached <= np.float32(math.log(100))
    training.state = start


def test_sixteen_pairs_are_learnt_by_heart(joint):
    training, batch = joint
    for _ in range(250):
        metrics = training.step(batch)
    assert metrics["loss_emb"] < 0.05 and metrics["loss_gen"] < 0.05
    assert float(training.state.params["logit_scale"]) <= np.float32(math.log(100))

    params = training.state.params
    encode = functools.partial(training.model.apply, {"params": params})
    images = jax.jit(functools.partial(encode, method=MMGem.encode_image))(batch["image"])
    texts = jax.jit(functools.partial(encode, method=MMGem.encode_text))(
        batch["text_tokens"][:, 0], batch["embed_index"][:, 0]
    )
    similarity = np.asarray(images) @ np.asarray(texts).T
    np.testing.assert_array_equal(similarity.argmax(axis=1), np.arange(16))
    np.testing.assert_array_equal(similarity.argmax(axis=0), np.arange(16))

    decoding = Decoding(length=batch["caption_tokens"].shape[-1] - 1)  # all but <s>

    def caption(params, images, boxes):
        visual = visual_tokens(training.model, params, images, boxes)
        prompt = jnp.full((16, 1), tiny.TOKENS.bos)
        return generate(training.model, params, visual, prompt, tiny.TOKENS, decoding, None)

    rows = jax.jit(caption)(params, batch["image"], batch["boxes"])
    np.testing.assert_array_equal(rows, batch["caption_tokens"][:, 0, 1:])


def test_the_conflict_probe_equals_gradients_computed_apart():
    """Also in parts, and of a decoder that is frozen."""
    setup = tiny.setup()
    params = tiny.randomise(setup.params)
    frozen = tiny.config({"optimizer.groups": tiny.one_group("frozen"), "accumulation_steps": 2})
    probe = jax.jit(make_conflict_probe(setup.model, frozen))(params, setup.batch)
    apart = {}
    for name, other in (("embedding", "generation"), ("generation", "embedding")):
        config = tiny.config({f"loss.{other}_weight": 0.0})
        gradient = jax.jit(jax.grad(tiny.loss_of(config)))(params, setup.batch)["decoder"]
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)]
        apart[name] = np.concatenate(leaves)
    emb, gen = apart["embedding"], apart["generation"]
    norms = np.linalg.norm(emb), np.linalg.norm(gen)
    assert float(probe["decoder_grad_norm_emb"]) == pytest.approx(norms[0], rel=1e-4)
    assert float(probe["decoder_grad_norm_gen"]) == pytest.approx(norms[1], rel=1e-4)
    cosine = emb @ gen / (norms[0] * norms[1])
    assert float(probe["decoder_grad_cosine"]) == pytest.approx(cosine, abs=1e-4)
