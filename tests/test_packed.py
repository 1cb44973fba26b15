"""Packed rows give what padded rows give: both losses, their gradients and their metrics."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import packed
import pytest
import tiny
from test_gradients import assert_same, params

from mmgem_jax import flops, sharding
from mmgem_jax.gradients import make_gradients
from mmgem_jax.models.mmgem import pick

IMAGES = 16


@functools.cache
def padded_batch():
    """Images of 2 regions, some of them padding, some that share a text."""
    batch = tiny.batch(tiny.config({"batch_size": IMAGES}), seed=5, regions=2)
    batch["region_mask"] = np.arange(2 * IMAGES).reshape(IMAGES, 2) % 5 != 3
    batch["group_ids"][1, 0] = batch["group_ids"][9, 1]
    return batch


def gradients(batch, shape=None, **changes):
    """(gradients, loss, metrics) of a batch, on a mesh if one is given."""
    config = tiny.config({"batch_size": IMAGES} | changes)
    run = jax.jit(
        make_gradients(tiny.setup().model, config, SimpleNamespace(**config.loss.to_dict()))
    )
    if shape is None:
        return jax.device_get(run(params(), batch))
    mesh = tiny.mesh_of(shape)
    with sharding.use_mesh(mesh):
        return jax.device_get(run(params(), sharding.to_global(batch, mesh)))


@functools.cache
def of_padded_rows():
    return gradients(padded_batch())


def without_share(found):
    """Without the one metric that padded rows do not have."""
    *rest, metrics = found
    return (*rest, {name: value for name, value in metrics.items() if name != "packed_share"})


@pytest.mark.parametrize("text_rows", [0, 3])
def test_packed_equals_padded(text_rows):
    found = gradients(packed.packed(padded_batch(), packed.packing(text_rows=text_rows)))
    assert_same(without_share(found), of_padded_rows())
    assert 0.5 < found[2]["packed_share"] < 1


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2)])
def test_on_a_mesh_too(shape):
    found = gradients(packed.packed(padded_batch(), packed.packing()), shape)
    assert_same(without_share(found), of_padded_rows())


@pytest.mark.parametrize(("parts", "shape"), [(2, None), (4, None), (2, (2, 1, 1))])
def test_in_parts_too(parts, shape):
    batch = packed.packed(padded_batch(), packed.packing())
    found = gradients(batch, shape, accumulation_steps=parts)
    assert_same(without_share(found), of_padded_rows())


def test_what_shares_a_row_does_not_matter():
    """Another text in the same row changes no other text's embedding."""
    batch = packed.packed(padded_batch(), packed.packing())
    row = np.argmax(batch["segment_ids"].max(axis=1))
    changed = dict(batch, tokens=batch["tokens"].copy())
    of_one = (batch["segment_ids"][row] == 1) & (batch["visual_index"][row] < 0)
    changed["tokens"][row, of_one] += 1
    run = jax.jit(functools.partial(states, params()))
    found, other = run(batch), run(changed)
    same = batch["segment_ids"][row] != 1
    assert same.any() and of_one.any()
    np.testing.assert_array_equal(np.asarray(found[row])[same], np.asarray(other[row])[same])
    assert (np.asarray(found[row])[of_one] != np.asarray(other[row])[of_one]).any()


def states(params, batch):
    """The decoder's states of packed rows, [P, L, D]."""
    model = tiny.setup().model
    apply = functools.partial(model.apply, {"params": params})

    def run(model):
        visual = model.visual_tokens(model.feature_map(batch["image"]), batch["boxes"])
        visual = visual.reshape(len(batch["targets"]), -1, visual.shape[-1])
        rows = [batch[name] for name in ("tokens", "segment_ids", "positions")]
        return model.packed_states(visual, batch["visual_index"], *rows)

    return apply(method=run).reshape(*batch["tokens"].shape, -1)


def test_picked_rows_are_the_named_ones():
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    index = np.array([[4, -1, 0, 0], [2, 2, -1, 1]])
    expected = np.where(
        index[..., None] < 0, 0, np.take_along_axis(x, index[..., None].clip(0), axis=1)
    )
    np.testing.assert_array_equal(pick(x, index), expected)


def test_flops_of_a_large_batch_are_no_less():
    """Whose squares add up to more than 2^31, which int32 does not hold."""
    config = tiny.config()
    rows, length = 700, 2048
    positions = jax.numpy.broadcast_to(jax.numpy.arange(length)[None], (rows, length))
    batch = {"positions": positions, "segment_ids": positions + 1, "tokens": positions}
    batch["target_mask"] = jax.numpy.ones((1, 1), bool)
    [(_, tokens, squares)], _ = flops.packed_rows(config, batch)
    assert tokens == rows * length and squares == pytest.approx(rows * length**2, rel=1e-5)


def test_flops_on_paper_are_those_of_the_tokens_alone():
    config = tiny.config({"batch_size": IMAGES})
    batch = padded_batch()
    packed_rows = flops.train_flops(config, packed.packed(batch, packed.packing()))
    texts = (batch["embed_index"] + 1)[batch["region_mask"]]
    captions = (batch["caption_length"] + 3)[batch["region_mask"]]  # 4 visual tokens, no </s>
    segments = np.concatenate([texts, captions])
    sizes = sum(flops.decoder_kernel_sizes(config.model.decoder).values())
    heads = config.model.decoder.heads * config.model.decoder.head_dim
    depth = config.model.decoder.depth
    forward = depth * (2 * segments.sum() * sizes + 4 * (segments**2).sum() * heads)
    assert packed_rows["packed decoder"] == 3 * forward
    targets = (batch["caption_length"] - 1)[batch["region_mask"]].sum()
    width, vocabulary = config.model.decoder.width, config.model.decoder.vocab_size
    assert packed_rows["head"] == 3 * 2 * targets * width * vocabulary
