"""The gradient by parts is that of the whole batch: of both losses, with masks, on a mesh.

At a temperature of 1. At 1/14, where training begins, the rounding of a similarity is 14 times as
large in the loss, whatever the order in which anything is computed.
"""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from mmgem_jax import sharding
from mmgem_jax.gradients import joined, make_gradients, split
from mmgem_jax.objective import loss_terms

# Adam's groups, of which the vision tower's is frozen.
FROZEN = tiny.groups(
    vision=("vision/.*", "frozen", 0.0, 0.0), rest=("(?!vision/).*", "adamw", 1e-3, 0.0)
)


def batch_with_masks():
    """16 images of 2 regions: some padding, two that share a text, captions of all lengths."""
    batch = tiny.batch(tiny.config({"batch_size": 16}), seed=3, regions=2)
    batch["region_mask"] = np.arange(32).reshape(16, 2) % 5 != 3
    batch["group_ids"][1, 0] = batch["group_ids"][9, 1]
    batch["boxes"][4, 1] = batch["boxes"][4, 0]
    return batch


@functools.cache
def params():
    """Random parameters, of temperature 1."""
    return tiny.random_params() | {"logit_scale": np.float32(0)}


def gradients(parts, shape=None, **changes):
    """(gradients, loss, metrics) of that batch in so many parts."""
    config = tiny.config({"batch_size": 16, "accumulation_steps": parts} | changes)
    weights = SimpleNamespace(**config.loss.to_dict())
    run = jax.jit(make_gradients(tiny.setup().model, config, weights))
    if shape is None:
        return jax.device_get(run(params(), batch_with_masks()))
    mesh = tiny.mesh_of(shape)
    with sharding.use_mesh(mesh):
        batch = sharding.to_global(batch_with_masks(), mesh)
        return jax.device_get(run(params(), batch))


@functools.cache
def whole(**changes):
    return gradients(1, **changes)


def assert_same(found, expected):
    """The gradient, as one vector, the loss and every metric agree to 1e-6 of their size."""
    error, size = (
        np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
        for tree in (jax.tree.map(np.subtract, found[0], expected[0]), expected[0])
    )
    assert error < 1e-6 * size
    assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert float(found[2][name]) == pytest.approx(float(value), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("parts", [2, 8, 16])
def test_in_parts_it_is_the_whole_batch_s(parts):
    assert_same(gradients(parts), whole())
    assert whole()[2]["masked_share"] > 0


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2)])
def test_on_a_mesh_too(shape):
    assert_same(gradients(2, shape), whole())


@pytest.mark.parametrize("left_out", ["embedding", "generation"])
def test_one_loss_alone(left_out):
    changes = {f"loss.{left_out}_weight": 0.0}
    assert_same(gradients(4, **changes), whole(**changes))


def test_what_is_frozen_has_no_gradient():
    changes = {"optimizer.groups": FROZEN, "loss.generation_weight": 0.5}
    found, expected = gradients(4, **changes), gradients(1, **changes)
    assert_same(found, expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found[0]["vision"]))


def test_negatives_are_those_of_the_whole_batch():
    """L_Emb of 16 images, which any parts come to, is not the mean of L_Emb of its halves."""
    weights = tiny.config().loss
    apply = functools.partial(tiny.setup().model.apply, method=loss_terms)
    run = jax.jit(lambda batch: apply({"params": params()}, batch, weights)[0]["emb"])
    halves = [run({name: x[i : i + 8] for name, x in batch_with_masks().items()}) for i in (0, 8)]
    assert whole()[2]["loss_emb"] > 1.05 * np.mean(halves)


def test_parts_are_of_each_device_s_own_images():
    batch = {"image": np.arange(24)[:, None], "boxes": np.arange(48).reshape(24, 2)}
    parts = split(batch, 3)
    np.testing.assert_array_equal(parts["image"][1, :, 0], [1, 4, 7, 10, 13, 16, 19, 22])
    np.testing.assert_array_equal(joined(parts["boxes"], batch), batch["boxes"])


def test_packed_parts_are_of_whole_groups():
    batch = {"targets": np.arange(6)[:, None], "image": np.arange(12)[:, None]}
    parts = split(batch, 3)
    np.testing.assert_array_equal(parts["targets"][1, :, 0], [1, 4])
    np.testing.assert_array_equal(parts["image"][1, :, 0], [2, 3, 8, 9])
    np.testing.assert_array_equal(joined(parts["image"], batch), batch["image"])
