"""CLIP's vision transformer, as far as its feature map; weights fit `CLIPVisionModel`."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmgem_jax.models.attention import attention
from mmgem_jax.models.layers import (
    ACTIVATIONS,
    ZEROS,
    constrain,
    layer_norm,
    linear,
    named,
    stack,
)
from mmgem_jax.models.row_attention import row_attention

VISION_ATTENTIONS = {"plain": attention, "rows": row_attention}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision transformer; every field is explained in configs/base.py."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    activation: str
    norm_epsilon: float
    attention: str
    dtype: str
    remat: str
    unroll: int

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size {self.image_size} is not a multiple of "
                f"vision.patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"vision.width {self.width} is not a multiple of vision.heads {self.heads}"
            )

    @property
    def map_size(self):
        """Rows, and columns, of the feature map."""
        return self.image_size // self.patch_size


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP: `CLIPEncoderLayer`."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        B, S, D = x.shape
        heads = (B, S, config.heads, D // config.heads)
        x = constrain(x)

        def project(name, features, axes):
            mapped = linear(features, axes, config.dtype, name, use_bias=True)(h)
            return checkpoint_name(mapped, name)

        h = layer_norm(config.norm_epsilon, config.dtype, name="attention_norm")(x)
        q, k, v = (
            project(name, D, ("embed", "heads")).reshape(heads)
            for name in ("query", "key", "value")
        )
        h = checkpoint_name(VISION_ATTENTIONS[config.attention](q, k, v), "attention")
        x = x + linear(D, ("heads_in", "residual"), config.dtype, "out", True, ZEROS)(h)

        h = layer_norm(config.norm_epsilon, config.dtype, name="mlp_norm")(x)
        h = project("up", config.mlp, ("embed", "mlp"))
        h = ACTIVATIONS[config.activation](h)
        x = x + linear(D, ("mlp_in", "residual"), config.dtype, "down", True, ZEROS)(h)
        return x, None


class VisionTransformer(nn.Module):
    """Images to the map of patch states, CLIP's post-layernorm applied, class token dropped."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images):
        """Returns the feature map [B, H, W, D] of normalised images [B, h, w, 3]."""
        config = self.config
        B, P, M, D = images.shape[0], config.patch_size, config.map_size, config.width
        if images.shape[1:3] != (config.image_size, config.image_size):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels; "
                f"the vision transformer takes {config.image_size}x{config.image_size}"
            )
        # A convolution with stride = kernel size is a matmul over the pixels of each patch.
        patches = images.reshape(B, M, P, M, P, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(B, M * M, P * P * 3)
        x = linear(D, ("pixels", "embed"), config.dtype, "patch")(patches)

        # Positions as strong as what they are added to, so that layout is learned from the start.
        normal = nn.initializers.normal(0.5)
        class_token = self.param("class_token", named(normal, "norm"), (D,))
        position = self.param("position", named(normal, "positions", "embed"), (M * M + 1, D))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (B, 1, D)).astype(x.dtype), x], axis=1)
        x = x + position[None].astype(x.dtype)
        x = layer_norm(config.norm_epsilon, config.dtype, "pre_norm")(x)

        blocks = stack(VisionBlock, config.depth, config.remat, config.unroll)
        x, _ = blocks(config, name="blocks")(x)
        x = layer_norm(config.norm_epsilon, config.dtype, "post_norm")(x)
        return constrain(x[:, 1:]).reshape(B, M, M, D)


def normalize_images(images, mean, std, dtype):
    """uint8 pixels [B, h, w, 3] to (x / 255 - mean) / std, per channel."""
    mean = jnp.asarray(mean, jnp.float32)[None, None, None]
    std = jnp.asarray(std, jnp.float32)[None, None, None]
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def interpolated_positions(table, side):
    """Position embeddings [1 + n * n, D] for a map of `side` cells a side: [1 + side * side, D].

    Bicubic as in Hugging Face's `interpolate_pos_encoding` (torch: Keys' kernel with a = -0.75,
    corners not aligned, no antialiasing); the class token's stays.
    """
    old = math.isqrt(table.shape[0] - 1)
    point = (np.arange(side) + 0.5) * old / side - 0.5
    cell = np.floor(point)[:, None] + np.arange(-1, 3)[None]  # [side, 4]
    x = np.abs(point[:, None] - cell)
    a = -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.zeros((side, old))
    rows = np.arange(side)[:, None]
    np.add.at(weights, (rows, cell.clip(0, old - 1).astype(int)), np.where(x <= 1, near, far))
    cells = table[1:].reshape(old, old, -1)
    cells = np.einsum("hH,wW,HWD->hwD", weights, weights, cells, optimize=True)
    return np.concatenate([table[:1], cells.reshape(side * side, -1)]).astype(np.float32)
