"""Tiny configs, models, parameters and batches that the tests share."""

import dataclasses
import functools
import math

import base
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from ml_collections import ConfigDict, FrozenConfigDict

from mmgem_jax import objective, run, sharding
from mmgem_jax.generate import CaptionTokens
from mmgem_jax.models.mmgem import MMGem

TOKENS = CaptionTokens(bos=1, eos=2, pad=100, emb=101, vocabulary=102)
FIRST_WORD = 3

SIZES = {
    "steps": 100,
    "batch_size": 8,
    "model.joint_dim": 16,
    "model.embedding_grid": 1,
    "model.generation_grid": 2,
    "model.vision.image_size": 16,
    "model.vision.patch_size": 4,
    "model.vision.width": 32,
    "model.vision.depth": 2,
    "model.vision.heads": 4,
    "model.vision.mlp": 48,
    "model.vision.dtype": "float32",
    "model.vision.remat": "none",
    "model.decoder.vocab_size": 128,
    "model.decoder.width": 32,
    "model.decoder.depth": 2,
    "model.decoder.heads": 4,
    "model.decoder.kv_heads": 2,
    "model.decoder.head_dim": 8,
    "model.decoder.mlp": 48,
    "model.decoder.dtype": "float32",
    "model.decoder.remat": "none",
    "optimizer.total_steps": 100,
    "optimizer.warmup_steps": 2,
    "data.text_length": 7,
    "data.caption_length": 6,
}


def config(changes=()):
    """configs/base.py made tiny; `changes` maps dotted names to other values."""
    result = base.get_config()
    with result.optimizer.unlocked():
        result.optimizer.total_steps = 0
    result.update_from_flattened_dict(SIZES)
    for name, value in dict(changes).items():
        parent, _, field = name.rpartition(".")
        target = result
        for part in parent.split(".") if parent else ():
            target = target[part]
        target[field] = value
    return result


def decoder_config(**changes):
    """The DecoderConfig of the tiny config, with other fields."""
    return dataclasses.replace(run.build_model(config().model).config.decoder, **changes)


def groups(**settings):
    """`config.optimizer.groups` of name=(pattern, algorithm, learning rate, weight decay)."""
    return ConfigDict({name: base.group(*setting) for name, setting in settings.items()})


def one_group(algorithm="adamw", learning_rate=1e-3, weight_decay=0.0):
    """Every parameter in one group."""
    return groups(all=(".*", algorithm, learning_rate, weight_decay))


def random_boxes(random, shape):
    """Boxes [*shape, 4] of at least a tenth of the image a side."""
    low = random.uniform(0, 0.5, (*shape, 2))
    high = low + random.uniform(0.1, 0.5, (*shape, 2))
    return np.concatenate([low, high], axis=-1).astype(np.float32)


def rows(random, shape, length, end):
    """Rows `<s> words end [PAD]...` [*shape, length] and where `end` is in each."""
    words = random.integers(FIRST_WORD, TOKENS.pad, (*shape, length))
    place = random.integers(2, length, shape)
    at = np.arange(length)
    tokens = np.where(
        at < place[..., None], words, np.where(at > place[..., None], TOKENS.pad, end)
    )
    tokens[..., 0] = TOKENS.bos
    return tokens.astype(np.int32), place.astype(np.int32)


def batch(config, seed=0, regions=1):
    """A batch (top of mmgem_jax/objective.py) of noise; all regions are real."""
    random = np.random.default_rng(seed)
    size, shape = config.model.vision.image_size, (config.batch_size, regions)
    text_tokens, embed_index = rows(random, shape, config.data.text_length, TOKENS.emb)
    caption_tokens, end = rows(random, shape, config.data.caption_length, TOKENS.eos)
    return {
        "image": random.integers(0, 256, (config.batch_size, size, size, 3)).astype(np.uint8),
        "boxes": random_boxes(random, shape),
        "region_mask": np.ones(shape, bool),
        "text_tokens": text_tokens,
        "embed_index": embed_index,
        "caption_tokens": caption_tokens,
        "caption_length": end + 1,
        "group_ids": random.integers(0, 2**31 - 1, (*shape, 2)).astype(np.int32),
        "truncated": random.random((*shape, 2)) < 0.5,
        "region_counts": random.integers(0, 3, (config.batch_size, 4)).astype(np.int32),
        "source": np.zeros(config.batch_size, np.int32),
    }


def randomise(params, seed=0, scale=0.1):
    """The same tree with noise added everywhere, so that no norm is 1 and no bias is 0."""
    random = np.random.default_rng(seed)
    noisy = lambda x: jnp.asarray(x + scale * random.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(noisy, jax.device_get(params))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What most tests start from."""

    config: FrozenConfigDict
    model: MMGem
    params: dict
    batch: dict


def setup(changes=(), seed=0, regions=1):
    """The tiny model with `changes`, its initial parameters and a batch; made once a session."""
    return cached_setup(tuple(sorted(dict(changes).items())), seed, regions)


@functools.cache
def cached_setup(changes, seed, regions):
    """`setup` with hashable arguments."""
    made = config(changes)
    model, data = run.build_model(made.model), batch(made, seed, regions)
    init = jax.jit(lambda key: meta.unbox(objective.init_params(model, data, key)))
    return Setup(FrozenConfigDict(made), model, init(jax.random.key(seed)), data)


@functools.cache
def random_params():
    """Random parameters of the tiny model, the same for every test."""
    return randomise(setup().params)


@functools.cache
def applied(method):
    """The tiny model's method with those parameters, compiled."""
    return jax.jit(
        functools.partial(setup().model.apply, {"params": random_params()}, method=method)
    )


def mesh_of(shape):
    """The mesh of these sizes of ([slice,] data, fsdp, tensor), on as many devices."""
    whole = (1,) * (len(sharding.MESH_AXES) - len(shape)) + tuple(shape)
    sizes = dict(zip(sharding.MESH_AXES, whole, strict=True))
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(shape)])


def loss_of(config):
    """Function(params, batch) -> the joint loss of the tiny model, straight from the objective."""

    def loss(params, batch):
        apply = functools.partial(setup().model.apply, method=objective.loss_terms)
        terms, _ = apply({"params": params}, batch, config.loss)
        return objective.total_loss(terms, config.loss)

    return loss


def assert_trees_close(found, expected, rtol):
    """Every entry agrees to `rtol` of the largest entry of its leaf.

    A leaf that is tiny beside the others counts as a hundredth of the largest: the gradient of
    a key's bias is 0 but for rounding, because softmax does not see it.
    """
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    floor = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) / 100
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        tolerance = rtol * max(np.abs(other).max(), floor)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance, err_msg=name)


def assert_within(ours, theirs, tolerance):
    """Largest difference; the reference is of a size that makes the tolerance mean something."""
    theirs = np.asarray(theirs)
    assert 0.3 < theirs.std() < 10
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)
