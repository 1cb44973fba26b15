"""Stacks of blocks: scanned, laid out or rematerialised, they compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.linen import meta

from mmgem_jax.models import layers, rotary
from mmgem_jax.models.decoder import Decoder, DecoderBlock
from mmgem_jax.models.vision import VisionBlock, VisionConfig, VisionTransformer

DEPTH = 3
VISION = VisionConfig(**tiny.config({"model.vision.depth": DEPTH}).model.vision.to_dict())
DECODER = tiny.decoder_config(depth=DEPTH)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2]] * 2)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]])


def vision_case(config):
    """(module, inputs, its block, what its blocks share besides x)."""
    model = VisionTransformer(config)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    return model, (images,), VisionBlock(config), ()


def decoder_case(config):
    """As `vision_case`."""
    x = np.random.default_rng(0).standard_normal((2, 6, config.width)).astype(np.float32)
    fields = config.head_dim, config.rope_theta, config.rope_scaling
    angles = rotary.rotary_angles(jnp.asarray(POSITIONS), *fields)
    return Decoder(config), (x, POSITIONS, SEGMENTS), DecoderBlock(config), (angles, SEGMENTS)


CASES = {"vision": (vision_case, VISION), "decoder": (decoder_case, DECODER)}


@functools.cache
def value_and_gradient(case, remat, unroll):
    """The loss of a random target and its gradient, by parameters that are the same for all."""
    make, config = CASES[case]
    model, inputs, _, _ = make(dataclasses.replace(config, remat=remat, unroll=unroll))
    params = random_params(case)

    def loss(params):
        output = model.apply({"params": params}, *inputs)
        return jnp.sum(output * np.random.default_rng(1).standard_normal(output.shape))

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def random_params(case):
    """Random parameters of a case, whatever its config's remat and unroll."""
    make, config = CASES[case]
    model, inputs, _, _ = make(config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)["params"])
    return tiny.randomise(params)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("none", DEPTH), *((name, 1) for name in layers.REMAT_POLICIES), ("full", 2)],
)
@pytest.mark.parametrize("case", CASES)
def test_remat_and_unroll_change_no_output_and_no_gradient(case, remat, unroll):
    expected = value_and_gradient(case, "none", 1)
    tiny.assert_trees_close(value_and_gradient(case, remat, unroll), expected, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_stack_is_its_blocks_one_after_the_other(case):
    make, config = CASES[case]
    model, inputs, block, shared = make(config)

    def loop(params, x):
        for i in range(DEPTH):
            layer = jax.tree.map(lambda leaf: leaf[i], params["blocks"])  # noqa: B023
            x, _ = block.apply({"params": layer}, x, *shared)
        return x

    @jax.jit
    def both(params):
        is_norm = lambda module, _: module.name == "pre_norm"  # noqa: E731
        variables = {"params": params}
        scanned, kept = model.apply(variables, *inputs, capture_intermediates=is_norm)
        if case == "decoder":
            norm = layers.rms_norm(config.norm_epsilon, config.dtype)
            states = loop(params, inputs[0])
            return scanned, norm.apply({"params": params["final_norm"]}, states)
        norm = layers.layer_norm(config.norm_epsilon, config.dtype)
        states = loop(params, kept["intermediates"]["pre_norm"]["__call__"][0])
        states = norm.apply({"params": params["post_norm"]}, states)
        return scanned, states[:, 1:].reshape(scanned.shape)

    tiny.assert_within(*both(random_params(case)), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_layer_of_a_stack_starts_from_its_own_numbers(case):
    make, config = CASES[case]
    model, inputs, _, _ = make(config)
    blocks = meta.unbox(jax.jit(model.init)(jax.random.key(0), *inputs)["params"])["blocks"]
    kernel = np.asarray(blocks["query"]["kernel"])
    assert kernel.shape[0] == DEPTH
    assert len({layer.tobytes() for layer in kernel}) == DEPTH
    width = config.width
    assert np.std(kernel) == pytest.approx(width**-0.5, rel=0.1)  # LeCun: variance 1 / inputs


def test_the_gradient_of_a_bias_is_an_exact_sum_in_fp32():
    layer = layers.linear(3, ("embed", "mlp"), "bfloat16", use_bias=True)
    x = jnp.ones((7, 143, 2), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)

    def total(params):
        return layer.apply(params, x).astype(jnp.float32).sum()

    # 1,001 rows: bf16 has 1,000 and 1,004.
    gradient = meta.unbox(jax.grad(total)(params))["params"]["bias"]
    np.testing.assert_array_equal(gradient, np.full(3, 1001, np.float32))
