"""The flagship at its real size, by shapes alone: CLIP ViT-L/14 and TinyLlama-1.1B."""

import importlib
import math
from pathlib import Path

import base
import flax.linen as nn
import jax
import pytest
import tiny

from mmgem_jax import objective, run, sharding, train_state
from mmgem_jax.data.sources import regions_an_image, sources

CONFIGS = Path(base.__file__).parent
FLAGSHIP = "vitl_tinyllama_stage1"
VOCABULARY = 32_128  # TinyLlama's 32,000, [EMB] and [PAD], padded to a multiple of 128


@pytest.fixture(scope="module")
def config():
    """The flagship's config."""
    config = importlib.import_module(FLAGSHIP).get_config()
    config.model.decoder.vocab_size = VOCABULARY
    return config


@pytest.fixture(scope="module")
def boxed(config):
    """Shapes of the parameters with their logical axis names."""
    model, shapes = run.build_model(config.model), run.batch_shapes(config)
    make = lambda key: objective.init_params(model, train_state.zeros(shapes), key)  # noqa: E731
    return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def vision_count(width=1024, depth=24, mlp=4096, patch=14, size=224):
    """CLIPVisionModel's parameters: 303,179,776 for ViT-L/14."""
    norm = 2 * width
    attention = 4 * (width * width + width)
    block = 2 * norm + attention + 2 * width * mlp + mlp + width
    positions = (size // patch) ** 2 + 1
    return patch * patch * 3 * width + width + positions * width + 2 * norm + depth * block


def decoder_count(vocabulary, width=2048, depth=22, heads=32, kv_heads=4, mlp=5632):
    """LlamaForCausalLM's parameters: 1,100,048,384 for TinyLlama-1.1B's vocabulary of 32,000."""
    head_dim = width // heads
    attention = 2 * width * width + 2 * width * kv_heads * head_dim
    block = attention + 3 * width * mlp + 2 * width
    return 2 * vocabulary * width + depth * block + width


def test_the_closed_forms_are_those_of_the_published_models():
    assert vision_count() == 303_179_776
    assert decoder_count(32_000) == 1_100_048_384


def test_every_parameter_is_counted(boxed):
    vision, decoder = boxed["vision"], boxed["decoder"]
    assert count(vision) == 303_179_776
    assert count(decoder) == 1_100_048_384 + (VOCABULARY - 32_000) * 2 * 2048
    assert count(decoder) == decoder_count(VOCABULARY)
    joint = {name: count(tree) for name, tree in boxed.items()}
    del joint["vision"], joint["decoder"]
    assert joint == {
        "region_projection": 1024 * 768,
        "visual_token_projection": 1024 * 2048,
        "text_projection": 2048 * 768,
        "logit_scale": 1,
    }


def test_every_parameter_names_its_axes(boxed):
    rules = dict(sharding.RULES)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert len(boxes) == len(jax.tree.leaves(boxed))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == len(box.value.shape)
        assert set(box.names) <= set(rules)


def test_every_parameter_is_float32(boxed):
    assert {leaf.dtype.name for leaf in jax.tree.leaves(boxed)} == {"float32"}


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_meshes_split_what_is_large(boxed, mesh):
    """Every matrix of the flagship is split over fsdp, and over tensor inside the blocks."""
    mesh = tiny.mesh_of(mesh)
    shardings = sharding.param_shardings(boxed, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
    for (path, leaf), placed in zip(leaves, jax.tree.leaves(shardings), strict=True):
        parts = math.prod(leaf.shape) // math.prod(placed.shard_shape(leaf.shape))
        name = sharding.path_name(path)
        if name.startswith("decoder") and leaf.ndim > 1 and "norm" not in name:
            assert parts == mesh.shape["fsdp"] * mesh.shape["tensor"], name
        elif math.prod(leaf.shape) > 10**6:
            assert parts >= mesh.shape["fsdp"], name


# ---- stage 2 -------------------------------------------------------------------------------------


def test_stage_2_is_the_same_model_on_regions_and_on_pairs(config):
    """What stage 1 came to fits, and each source's batches have the shapes they are made with."""
    stage2 = importlib.import_module("vitl_tinyllama_stage2").get_config()
    stage2.model.decoder.vocab_size = VOCABULARY
    assert stage2.model == config.model
    found = {name: (d.name, d.weight) for name, d in sources(stage2.data).items()}
    assert found == {"pairs": ("pairs", 1.0), "regions": ("regions/visual-genome", 4.0)}
    pairs, regions = sources(stage2.data).values()
    assert (regions_an_image(pairs), pairs.text_length) == (1, config.data.text_length)
    assert (regions_an_image(regions), regions.text_length) == (16, 32)
    assert (regions.whole_image, pairs.regions_field) == (False, "")
    rates = [
        {name: group.learning_rate for name, group in c.optimizer.groups.items()}
        for c in (config, stage2)
    ]
    assert rates[1] == {name: rate / 2 for name, rate in rates[0].items()}
