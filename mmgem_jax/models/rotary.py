"""Rotary positions: RoFormer's, on Llama's halves, and the ways to stretch them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

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
      Two fp32 arrays [B, T, C]: the cosine that each number is multiplied by, and the sine, with
      its sign, that the other number of its pair is.
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling)[None, None]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x, angles):
    """Rotates each pair (i, i + C/2) of the last axis of x by angles of a shape that broadcasts."""
    cos, sin = angles
    C = x.shape[-1]
    # The other number of each pair, by a matrix of 0 and 1: exact, and on a TPU a small product in
    # the matrix unit, where cutting the lanes in two and joining them again is many shuffles.
    swap = jnp.roll(jnp.eye(C, dtype=x.dtype), C // 2, axis=1)
    exact = jax.lax.Precision.HIGHEST  # else fp32 goes through bf16
    other = jnp.einsum("...C,CD->...D", x, swap, precision=exact)
    return (x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin).astype(x.dtype)
