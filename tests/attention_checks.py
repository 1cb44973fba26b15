"""What the tests of attention kernels share: noise, gradients, and how near is near."""

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax.models import rotary
from mmgem_jax.models.attention import causal_attention


def arrays(length, dtype, heads, kv_heads, head_dim, rows=2):
    """Queries, keys and values of noise."""
    random = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)


def context(length, head_dim, rows=2):
    """Angles and segment ids of rows of two texts and padding, the second at odd positions."""
    random = np.random.default_rng(1)
    ends = np.sort(random.integers(1, length, (rows, 2)), axis=1)
    places = np.arange(length)[None]
    segment_ids = (places < ends[:, :1]) * 1 + (places < ends[:, 1:]) * 1
    positions = np.where(places < ends[:, :1], places, 300 + 2 * places)
    angles = rotary.rotary_angles(jnp.asarray(positions), head_dim, 10_000.0, rotary.RopeScaling())
    return angles, jnp.asarray(segment_ids, jnp.int32)


def value_and_gradients(attend, q, k, v, *rest):
    """The output, and the gradients of its product with noise, in fp32."""
    noise = np.random.default_rng(2).standard_normal((*q.shape[:2], q.shape[2] * q.shape[3]))

    def total(q, k, v):
        h = attend(q, k, v, *rest)
        return (h.astype(jnp.float32) * jnp.asarray(noise, jnp.float32)).sum(), h

    gradients, h = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (h, *gradients)]


def assert_float32_equal(found, expected):
    """To 1e-5 of the largest entry."""
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def assert_bfloat16_equal(attend, length, heads, kv_heads, head_dim):
    """A causal form is, in bf16, within 1e-3 of the largest entry of the plain form on average.

    And about as far from fp32 as the plain form is; single entries differ by a few last bits.
    """
    low, others = arrays(length, jnp.bfloat16, heads, kv_heads, head_dim), context(length, head_dim)
    high = tuple(x.astype(jnp.float32) for x in low)
    ours = value_and_gradients(attend, *low, *others)
    plain = value_and_gradients(causal_attention, *low, *others)
    exact = value_and_gradients(causal_attention, *high, *others)
    for found, other, true in zip(ours, plain, exact, strict=True):
        size = np.abs(true).max()
        assert np.abs(found - other).mean() < 1e-3 * size
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-2 * size)
        assert np.abs(found - true).mean() < 1.5 * np.abs(other - true).mean()
