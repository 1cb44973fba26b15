"""Blocks that both towers are made of: linear maps, norms, rotary positions, attention, stacks.

Every kernel is a matrix `[in, out]` (`[layers, in, out]` in a stack) and carries logical axis
names; `mmgem_jax.sharding` is the one place that says what the names mean on a mesh.

Axis letters, used in every einsum and shape comment of the package:
  B batch, R regions, H W feature-map rows and columns, G visual tokens, T text, S key positions,
  D width, N heads, K kv heads, C head dim, F mlp, E joint embedding, V vocabulary.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# What a block keeps for the backward pass, where it does not keep all; the rest is computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


ROPE_TYPES = ("none", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are slowed for longer rows; the fields are those of configs/base.py."""

    type: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            known = ", ".join(ROPE_TYPES)
            raise ValueError(f"decoder.rope_scaling.type {self.type!r} is not one of {known}")
        for name in ("factor", "low_freq_factor", "original_length"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"decoder.rope_scaling.{name} {getattr(self, name)} is not above 0"
                )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"decoder.rope_scaling.high_freq_factor {self.high_freq_factor} is not above "
                f"decoder.rope_scaling.low_freq_factor {self.low_freq_factor}"
            )


FAN_IN = nn.initializers.lecun_normal()
# For what a block adds to the residual stream: from scratch, a stack of identities learns faster.
ZEROS = nn.initializers.zeros_init()


def named(initializer, *axes):
    """The initializer, with a logical axis name for each axis of what it makes."""
    return nn.with_logical_partitioning(initializer, axes)


def linear(features, axes, dtype, name=None, use_bias=False, initializer=FAN_IN):
    """A linear map [..., in] -> [..., features] whose kernel's axes are named `axes`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(initializer, *axes),
        bias_init=named(ZEROS, axes[1]),
        name=name,
    )


def layer_norm(epsilon, dtype, name=None):
    """LayerNorm over the last axis; statistics in fp32, the variance not by E[x^2] - E[x]^2."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=named(nn.initializers.ones_init(), "norm"),
        bias_init=named(ZEROS, "norm"),
        name=name,
    )


def rms_norm(epsilon, dtype, name=None):
    """RMSNorm over the last axis; statistics in fp32."""
    scale_init = named(nn.initializers.ones_init(), "norm")
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=scale_init, name=name)


def constrain(x):
    """Pins a [B, T, D] activation to the mesh: batch split, length and width whole."""
    return nn.with_logical_constraint(x, ("batch", "length", "activation"))


def attention(q, k, v, mask=None):
    """Softmax attention with fp32 logits; grouped queries share a key head.

    Args:
      q: [B, T, N, C].
      k: [B, S, K, C], K dividing N.
      v: [B, S, K, C].
      mask: bool [B, 1, T, S], True where a query sees a key; None where it sees all.

    Returns:
      [B, T, N * C].
    """
    B, T, N, C = q.shape
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(B, T, N * C)


def cached_attention(q, keys, values, mask):
    """`attention` over keys and values whose heads come first, as a cache has them.

    One query a row reads each head's keys as they lie; the other order would be turned first.

    Args:
      q: [B, T, N, C].
      keys: [B, K, S, C], K dividing N.
      values: [B, K, S, C].
      mask: bool [B, 1, T, S], True where a query sees a key.

    Returns:
      [B, T, N * C].
    """
    B, T, N, C = q.shape
    K, S = keys.shape[1:3]
    M = N // K  # queries of a key head
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    q = q.reshape(B, T, K, M, C).transpose(0, 2, 3, 1, 4).reshape(B, K, M * T, C)
    logits = jnp.einsum("BKQC,BKSC->BKQS", q, keys, preferred_element_type=jnp.float32) / C**0.5
    logits = logits.reshape(B, K, M, T, S)
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, axis=-1).astype(q.dtype).reshape(B, K, M * T, S)
    h = jnp.einsum("BKQS,BKSC->BKQC", weights, values).reshape(B, K, M, T, C)
    return h.transpose(0, 3, 1, 2, 4).reshape(B, T, N * C)


def rotary_frequencies(head_dim, theta, scaling):
    """Radians by which each pair of a head turns from one position to the next.

    `linear` divides all by the factor. `llama3` (Llama 3.1) divides those that turn fewer than
    `low_freq_factor` times over the original length, keeps those that turn more than
    `high_freq_factor` times, and goes over from one to the other in between.

    Args:
      scaling: RopeScaling.

    Returns:
      fp32 numpy [C / 2].
    """
    # In fp32 and in this order, as Hugging Face: weights were trained with these roundings. NumPy's
    # power of fp32 is off by a last bit, so its exact value is rounded.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    plain = 1 / (theta ** exponents.astype(np.float64)).astype(np.float32)
    if scaling.type == "none":
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_length / (2 * math.pi / plain)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotary_angles(positions, head_dim, theta, scaling):
    """Cosines and sines of the rotary positions, in fp32 (RoFormer, eq. 34; Llama's halves).

    bf16 would round position 257 to 256, whose sine is another number.

    Args:
      positions: int32 [B, T].
      scaling: RopeScaling.

    Returns:
      Two fp32 arrays [B, T, 1, C / 2].
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling)[None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Rotates each pair (i, i + C/2) of the last axis of x [B, T, N, C] by the angles."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def stack(block, depth, remat, unroll):
    """`depth` copies of a block as one scanned module with parameters [layers, ...].

    The block's `__call__(x, *broadcast)` returns (x, None); `broadcast` is the same for all.

    Args:
      block: a Linen module class.
      remat: a name in REMAT_POLICIES, or "none".
      unroll: copies laid out one after the other in the compiled loop; `depth` for no loop.

    Returns:
      A module class, to be built with the block's own arguments.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
