"""Groups, schedule, clipping and the update rules, on a small tree of parameters."""

import functools
import importlib
from pathlib import Path

import base
import jax
import numpy as np
import optax
import pytest
import tiny

from mmgem_jax import run, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import decay_mask, group_labels, make_optimizer, schedule, stop_frozen

CONFIGS = sorted(path.stem for path in Path(base.__file__).parent.glob("*.py"))

SHAPES = {
    "vision": {
        "blocks": {
            "query": {"kernel": (2, 6, 4), "bias": (2, 4)},
            "up": {"kernel": (2, 4, 8)},
            "norm": {"scale": (2, 6)},
        },
        "position": (5, 6),
    },
    "decoder": {"embedding": (8, 6), "head": (6, 8)},
    "logit_scale": (),
}
MATRICES = {"vision/blocks/query/kernel", "vision/blocks/up/kernel"}
DECAYED = MATRICES | {"decoder/embedding", "decoder/head"}


def tree(seed):
    random = np.random.default_rng(seed)
    draw = lambda shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def flat(params):
    """Leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in leaves}


def optimizer_config(groups, **changes):
    config = tiny.config().optimizer
    config.groups = groups
    config.update({"clip_norm": 0.0, "warmup_steps": 1, "total_steps": 10} | changes)
    return config


def updates_of(config, steps=3):
    """Updates of each step from given gradients, and the last state."""
    optimizer = make_optimizer(config)
    params = tree(seed=0)
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(steps):
        updates, state = update(tree(seed=1 + step), state, params)
        params = optax.apply_updates(params, updates)
        found.append(flat(updates))
    return found, state


# ---- groups ----------------------------------------------------------------------------------


def test_every_parameter_gets_its_group():
    groups = tiny.groups(
        rest=("decoder/.*|logit_scale", "adamw", 0, 0), vision=("vision/.*", "adamw", 0, 0)
    )
    for name, label in flat(group_labels(groups, tree(0))).items():
        assert label == ("vision" if name.startswith("vision") else "rest")


def test_a_parameter_without_a_group_is_named():
    groups = tiny.groups(vision=("vision/.*", "adamw", 0, 0), decoder=("decoder/.*", "adamw", 0, 0))
    with pytest.raises(UserError, match="parameter logit_scale is matched by no group; expected"):
        group_labels(groups, tree(0))


def test_a_parameter_of_two_groups_is_named():
    groups = tiny.groups(all=(".*", "adamw", 0, 0), head=("decoder/head", "adamw", 0, 0))
    with pytest.raises(UserError, match=r"parameter decoder/head is matched by \['all', 'head'\]"):
        group_labels(groups, tree(0))


def test_a_group_of_nothing_is_named():
    groups = tiny.groups(all=(".*", "adamw", 0, 0), spare=("kernel", "adamw", 0, 0))
    with pytest.raises(UserError, match=r"groups\.spare\.pattern: 'kernel' matches no parameter"):
        group_labels(groups, tree(0))


def test_a_pattern_that_is_no_regular_expression_is_named():
    groups = tiny.groups(all=("vision/(", "adamw", 0, 0))
    with pytest.raises(UserError, match=r"groups\.all\.pattern: 'vision/\(' is no regular"):
        group_labels(groups, tree(0))


def test_an_unknown_algorithm_is_an_error():
    config = optimizer_config(tiny.one_group("sgd"))
    message = r"groups\.all\.algorithm: 'sgd'; expected adamw, muon or frozen"
    with pytest.raises(UserError, match=message):
        make_optimizer(config)


def test_muon_refuses_what_is_no_matrix():
    optimizer = make_optimizer(optimizer_config(tiny.one_group("muon")))
    with pytest.raises(UserError, match=r"muon takes matrices; .* is none"):
        optimizer.init(tree(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_groups_of_every_config_fit_its_model(name):
    config = importlib.import_module(name).get_config()
    config.model.decoder.vocab_size = config.model.decoder.vocab_size or 1280
    with config.optimizer.unlocked():
        config.optimizer.total_steps = config.steps
    model, shapes = run.build_model(config.model), run.batch_shapes(config)
    make = functools.partial(train_state.make_state, model, make_optimizer(config.optimizer), False)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(make, shapes), key)
    labels = group_labels(config.optimizer.groups, state.params)
    assert jax.tree.structure(labels) == jax.tree.structure(state.params)


# ---- schedule and clipping -------------------------------------------------------------------


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    config = optimizer_config(tiny.one_group(), warmup_steps=10, total_steps=110, final_share=0.1)
    share = schedule(config)
    assert float(share(0)) == 0
    assert float(share(5)) == pytest.approx(0.5)
    assert float(share(10)) == pytest.approx(1)
    assert float(share(60)) == pytest.approx((1 + 0.1) / 2)
    assert float(share(35)) == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    assert float(share(110)) == pytest.approx(0.1)
    assert float(share(200)) == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_an_error():
    config = optimizer_config(tiny.one_group(), warmup_steps=10, total_steps=10)
    with pytest.raises(UserError, match=r"warmup_steps: 10 is not below the run's 10 steps"):
        make_optimizer(config)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1000.0])
def test_gradients_are_clipped_by_their_global_norm(clip_norm):
    """Seen in Adam's first moment, which is (1 - b1) of the clipped gradient."""
    config = optimizer_config(tiny.one_group(), clip_norm=clip_norm)
    _, state = updates_of(config, steps=1)
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = (s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    gradient = flat(tree(seed=1))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in gradient.values()))
    factor = min(1, clip_norm / norm) if clip_norm else 1
    for name, moment in flat(adam.mu).items():
        expected = (1 - config.adam_b1) * factor * gradient[name]
        np.testing.assert_allclose(moment, expected, rtol=1e-5, err_msg=name)


# ---- the rules -------------------------------------------------------------------------------


def test_weight_decay_is_for_matrices_alone():
    found = {name for name, decays in flat(decay_mask(tree(0))).items() if decays}
    assert found == DECAYED


def test_adamw_equals_its_formula_with_each_group_s_rate_and_decay():
    groups = tiny.groups(
        vision=("vision/.*", "adamw", 0.01, 0.3), rest=("(?!vision).*", "adamw", 0.002, 0.0)
    )
    config = optimizer_config(groups, warmup_steps=2)
    b1, b2, epsilon = config.adam_b1, config.adam_b2, config.adam_epsilon
    found, _ = updates_of(config)
    params, m, v = flat(tree(seed=0)), {}, {}
    for step, updates in enumerate(found):
        share = float(schedule(config)(step))
        for name, gradient in flat(tree(seed=1 + step)).items():
            m[name] = b1 * m.get(name, 0) + (1 - b1) * gradient
            v[name] = b2 * v.get(name, 0) + (1 - b2) * gradient**2
            rate, decay = (0.01, 0.3) if name.startswith("vision") else (0.002, 0.0)
            direction = m[name] / (1 - b1 ** (step + 1))
            direction /= np.sqrt(v[name] / (1 - b2 ** (step + 1))) + epsilon
            expected = -rate * share * (direction + (name in DECAYED) * decay * params[name])
            np.testing.assert_allclose(
                updates[name], expected, rtol=1e-4, atol=1e-8, err_msg=f"{name} at step {step}"
            )
            params[name] = params[name] + expected


def test_a_group_s_learning_rate_is_its_own():
    def run_with(rate):
        groups = tiny.groups(
            vision=("vision/.*", "adamw", rate, 0.1), rest=("(?!vision).*", "adamw", 0.002, 0.1)
        )
        return updates_of(optimizer_config(groups), steps=2)[0][1]

    slow, fast = run_with(0.01), run_with(0.03)
    for name, update in slow.items():
        if name.startswith("vision"):
            np.testing.assert_allclose(fast[name], 3 * update, rtol=1e-5)
        else:
            np.testing.assert_array_equal(fast[name], update)


def test_frozen_parameters_get_exactly_no_update_and_no_moments():
    groups = tiny.groups(
        vision=("vision/.*", "frozen", 1.0, 1.0), rest=("(?!vision).*", "adamw", 0.01, 0.1)
    )
    found, state = updates_of(optimizer_config(groups))
    for updates in found[1:]:
        for name, update in updates.items():
            assert update.any() != name.startswith("vision")
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(state)]
    assert shapes.count((6, 8)) == 2 and (2, 6, 4) not in shapes  # Adam's, of decoder/head alone

    stopped = lambda params: sum(  # noqa: E731
        (leaf**2).sum() for leaf in jax.tree.leaves(stop_frozen(groups, params))
    )
    for name, gradient in flat(jax.grad(stopped)(tree(0))).items():
        assert gradient.any() != name.startswith("vision")


def muon_config(**changes):
    groups = tiny.groups(
        matrices=(".*kernel", "muon", 0.02, 0.1), rest=("(?!.*kernel).*", "adamw", 1e-3, 0.0)
    )
    return optimizer_config(groups, **changes)


def test_muon_of_a_stack_equals_optax_s_muon_of_each_layer():
    config = muon_config()
    found, _ = updates_of(config)
    for name in MATRICES:
        for layer in (0, 1):
            muon = optax.contrib.muon(
                lambda step: 0.02 * schedule(config)(step),
                beta=config.muon_beta,
                weight_decay=0.1,
                weight_decay_mask=None,
            )
            matrix = flat(tree(seed=0))[name][layer]
            state = muon.init(matrix)
            for step, updates in enumerate(found):
                gradient = flat(tree(seed=1 + step))[name][layer]
                expected, state = muon.update(gradient, state, matrix)
                matrix = matrix + expected
                np.testing.assert_allclose(
                    updates[name][layer], expected, rtol=1e-4, atol=1e-6, err_msg=name
                )


def test_muon_s_updates_are_nearly_orthogonal_matrices():
    """Newton-Schulz brings all singular values of [in, out] near one another."""
    groups = tiny.groups(
        matrices=(".*kernel", "muon", 0.02, 0.0), rest=("(?!.*kernel).*", "adamw", 1e-3, 0.0)
    )
    updates = updates_of(optimizer_config(groups), steps=2)[0][1]
    for name in MATRICES:
        for layer in updates[name]:
            values = np.linalg.svd(layer, compute_uv=False)
            assert values.max() / values.min() < 2
            before = np.linalg.svd(flat(tree(seed=1))[name][0], compute_uv=False)
            assert before.max() / before.min() > 2
