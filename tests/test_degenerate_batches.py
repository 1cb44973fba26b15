"""Batches from which there is little or nothing to learn: loss and gradient stay finite."""

import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import optax
import packed
import pytest
import tiny

from mmgem_jax.gradients import make_gradients

REGIONS = 2


def usual():
    """8 images of 2 regions, all of them real."""
    return tiny.batch(tiny.config(), seed=1, regions=REGIONS)


def only(*places):
    """The batch with no other regions than these."""
    batch = usual()
    batch["region_mask"][:] = False
    for place in places:
        batch["region_mask"][place] = True
    return batch


def alike():
    """Every text and caption the same, and marked as such."""
    batch = usual()
    for name in ("text_tokens", "embed_index", "caption_tokens", "caption_length", "group_ids"):
        batch[name][:] = batch[name][0, 0]
    return batch


def same_images(value=None):
    """Every image the same, or of one colour, whose only region is the whole."""
    batch = only(*((row, 0) for row in range(8)))
    batch["image"][:] = batch["image"][0] if value is None else value
    batch["boxes"][:] = [0, 0, 1, 1]
    return batch


def without_words(places=slice(None)):
    """Texts `<s> [EMB]` and captions `<s> </s>` at these places."""
    batch = usual()
    for tokens, end in (("text_tokens", tiny.TOKENS.emb), ("caption_tokens", tiny.TOKENS.eos)):
        batch[tokens][places, :, 1:] = tiny.TOKENS.pad
        batch[tokens][places, :, 1] = end
    batch["embed_index"][places], batch["caption_length"][places] = 1, 2
    return batch


def padding_alone():
    """Half of the rows hold no token at all."""
    batch = usual()
    for tokens in ("text_tokens", "caption_tokens"):
        batch[tokens][::2] = tiny.TOKENS.pad
    batch["embed_index"][::2], batch["caption_length"][::2] = 0, 0
    return batch


def padding_boxes(box):
    """Every second region is padding, of such a box."""
    batch = usual()
    batch["region_mask"][:, 1] = False
    batch["boxes"][:, 1] = box
    return batch


def boxes_of(box):
    """All regions are real, of such a box."""
    batch = usual()
    batch["boxes"][:] = box
    return batch


BATCHES = {
    "one region": only((3, 1)),
    "two regions of one image": only((3, 0), (3, 1)),
    "no region": only(),
    "the same text everywhere": alike(),
    "the same image everywhere": same_images(),
    "black images": same_images(0),
    "white images": same_images(255),
    "no words": without_words(),
    "one image without words": without_words(slice(1)),
    "rows of padding": padding_alone(),
    "padding boxes that are no numbers": padding_boxes(np.nan),
    "padding boxes without end": padding_boxes([-np.inf, 0, np.inf, 1]),
    "padding boxes the wrong way round": padding_boxes([0.9, 0.8, 0.2, 0.1]),
    "boxes of no size": boxes_of([0.5, 0.5, 0.5, 0.5]),
    "boxes outside the image": boxes_of([3.0, 3.0, 4.0, 4.0]),
}


def nothing(*names):
    """Random parameters, those of these projections zero."""
    params = dict(tiny.random_params())
    return params | {name: jax.tree.map(np.zeros_like, params[name]) for name in names}


def temperature(logit_scale):
    """Random parameters of such a scale."""
    return tiny.random_params() | {"logit_scale": np.float32(logit_scale)}


PARAMS = {
    "embeddings of length 0": nothing("region_projection", "text_projection"),
    "visual tokens of length 0": nothing("visual_token_projection"),
    "a decoder of zeros": nothing("decoder"),
    "nothing but zeros": nothing(*(set(tiny.random_params()) - {"logit_scale"})),
    "a temperature far below the clamp": temperature(60.0),
    "a temperature without contrast": temperature(-80.0),
}


@functools.cache
def compiled(dtype="float32"):
    """(gradients, loss, metrics) of parameters and a batch."""
    changes = {"model.vision.dtype": dtype, "model.decoder.dtype": dtype}
    setup = tiny.setup(changes)
    weights = SimpleNamespace(**setup.config.loss)
    return jax.jit(make_gradients(setup.model, setup.config, weights))


def gradients(batch, params=None, dtype="float32"):
    """Of the tiny model, on the host."""
    params = tiny.random_params() if params is None else params
    return jax.device_get(compiled(dtype)(params, batch))


def assert_finite(found):
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_with_little_in_it_is_finite(name, dtype):
    assert_finite(gradients(BATCHES[name], dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PARAMS)
def test_parameters_at_an_extreme_are_finite(name, dtype):
    found = gradients(usual(), PARAMS[name], dtype)
    if name == "a temperature far below the clamp":
        found = found[:2]  # the perplexity of such a model may be anything
    assert_finite(found)


@pytest.mark.parametrize("name", ["one region", "no region", "the same text everywhere"])
def test_packed_rows_with_little_in_them_are_finite(name):
    sizes = packed.packing(images=8, rows=14, targets=80)
    assert_finite(gradients(packed.packed(BATCHES[name], sizes)))


def test_without_a_region_there_is_no_loss_and_no_gradient():
    grads, loss, _ = gradients(BATCHES["no region"])
    assert loss == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["one region", "the same text everywhere"])
def test_without_a_rival_only_the_caption_teaches(name):
    grads, loss, metrics = gradients(BATCHES[name])
    assert metrics["loss_emb"] == 0 and loss == metrics["loss_gen"] > 0
    idle = "logit_scale", "region_projection", "text_projection"
    assert all((leaf == 0).all() for part in idle for leaf in jax.tree.leaves(grads[part]))
    assert optax.tree.norm(grads["decoder"]) > 0


def test_what_boxes_padding_has_does_not_matter():
    expected = gradients(padding_boxes(0.0))
    for name in (name for name in BATCHES if name.startswith("padding boxes")):
        jax.tree.map(np.testing.assert_array_equal, gradients(BATCHES[name]), expected)


def test_images_that_are_all_the_same_cost_the_log_of_their_number():
    """To tell their texts apart, at least; and the texts cannot do better than that."""
    _, _, metrics = gradients(BATCHES["the same image everywhere"])
    assert float(metrics["loss_text_to_image"]) == pytest.approx(math.log(8), rel=1e-5)
    assert metrics["accuracy_text_to_image"] == 0
    _, _, metrics = gradients(usual(), PARAMS["embeddings of length 0"])
    assert float(metrics["loss_emb"]) == pytest.approx(2 * math.log(16), rel=1e-5)


def test_the_slope_of_the_scale_fades_with_it():
    """So nothing drives it on, and a lower clamp has nothing to prevent."""
    for logit_scale in (0.0, -3.0, -6.0, -200.0):
        grads, loss, _ = gradients(usual(), temperature(logit_scale))
        assert abs(grads["logit_scale"]) <= 4 * math.exp(logit_scale)  # similarities are in -1..1
    assert np.isfinite(loss) and grads["logit_scale"] == 0
