"""The vision transformer against Hugging Face's CLIPVisionModel, on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax.linen import meta
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmgem_jax.convert.table import to_params, vision_places
from mmgem_jax.models import vision
from mmgem_jax.models.vision import VisionBlock, VisionConfig, VisionTransformer

LAYER_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4

CASES = [
    {"activation": "quick_gelu"},
    {"activation": "gelu", "image_size": 32, "patch_size": 8, "heads": 2, "norm_epsilon": 1e-3},
    {"image_size": 24, "patch_size": 6, "width": 20, "heads": 5, "depth": 3, "mlp": 28},
]


def vision_config(**changes):
    fields = tiny.config().model.vision.to_dict()
    return VisionConfig(**fields | changes)


def torch_model(config, seed):
    """A CLIPVisionModel of our sizes, every parameter random."""
    torch.manual_seed(seed)
    sizes = CLIPVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_epsilon,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def from_torch(model, config):
    """Our parameters with the values of a CLIPVisionModel."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return to_params(weights, vision_places(config))


def run_torch(model, images):
    """The feature map, and the input and output of each layer."""
    layers = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _, inputs, output: layers.append((inputs[0], output)))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    states = model.post_layernorm(model(pixels).last_hidden_state)[:, 1:]
    side = int(states.shape[1] ** 0.5)
    feature_map = states.reshape(len(images), side, side, -1).numpy()
    return feature_map, [(before.numpy(), after.numpy()) for before, after in layers]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=["quick_gelu", "gelu", "odd_sizes"])
def test_equals_hugging_face_layer_by_layer(case, seed):
    config = vision_config(**case)
    reference = torch_model(config, seed)
    params = from_torch(reference, config)
    size = config.image_size
    images = np.random.default_rng(seed).standard_normal((2, size, size, 3)).astype(np.float32)
    feature_map, layers = run_torch(reference, images)

    model = VisionTransformer(config)
    made = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, made)

    @jax.jit
    def run(params, images):
        keep = lambda module, _: module.name == "pre_norm"  # noqa: E731
        return model.apply({"params": params}, images, capture_intermediates=keep)

    ours, captured = run(params, images)
    embedded = captured["intermediates"]["pre_norm"]["__call__"][0]
    tiny.assert_within(embedded, layers[0][0], LAYER_TOLERANCE)
    tiny.assert_within(ours, feature_map, WHOLE_TOLERANCE)

    block = jax.jit(lambda params, x: VisionBlock(config).apply({"params": params}, x)[0])
    for i, (before, after) in enumerate(layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        tiny.assert_within(block(layer, before), after, LAYER_TOLERANCE)


def test_the_map_has_the_image_s_rows_and_columns():
    """A change of one patch's pixels changes the embedded patch at that row and column alone."""
    config = vision_config(depth=1)
    model = VisionTransformer(config)
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    params = tiny.randomise(meta.unbox(model.init(jax.random.key(0), images)["params"]))
    # Without attention, a patch's state depends on its own pixels only.
    params["blocks"]["out"] = jax.tree.map(jnp.zeros_like, params["blocks"]["out"])
    run = jax.jit(lambda images: model.apply({"params": params}, images))
    patch, row, column = config.patch_size, 1, 2
    changed = images.at[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    difference = np.abs(run(changed.set(1.0)) - run(images)).max(axis=(0, 3))
    assert np.argwhere(difference > 0).tolist() == [[row, column]]


def test_pixels_are_normalised_as_clip_s_processor_does():
    config = tiny.config().model
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    ours = vision.normalize_images(images, config.image_mean, config.image_std, "float32")
    expected = (images.astype(np.float64) / 255 - config.image_mean) / config.image_std
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_bfloat16_stays_near_float32():
    config = vision_config()
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    params = meta.unbox(VisionTransformer(config).init(jax.random.key(0), images)["params"])
    exact = VisionTransformer(config).apply({"params": params}, images)
    rough = VisionTransformer(vision_config(dtype="bfloat16")).apply({"params": params}, images)
    assert rough.dtype == jnp.bfloat16
    assert 0 < np.abs(rough.astype(np.float32) - exact).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "vision.image_size 16 is not a multiple of vision.patch_size 5"),
        ({"heads": 3}, "vision.width 32 is not a multiple of vision.heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        vision_config(**changes)


def test_images_of_another_size_are_an_error():
    model = VisionTransformer(vision_config())
    with pytest.raises(ValueError, match=r"images of 16x20 pixels; .* takes 16x16"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 20, 3)))


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 7), (7, 4), (16, 24), (24, 16), (5, 5)])
def test_interpolation_is_torch_s_bicubic(old, new):
    table = np.random.default_rng(0).standard_normal((old * old + 1, 6)).astype(np.float32)
    found = vision.interpolated_positions(table, new)
    cells = torch.from_numpy(table[1:]).double().reshape(1, old, old, 6).permute(0, 3, 1, 2)
    cells = torch.nn.functional.interpolate(cells, (new, new), mode="bicubic", align_corners=False)
    expected = cells.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], expected, rtol=0, atol=2e-6)
    if old == new:
        np.testing.assert_array_equal(found, table)
