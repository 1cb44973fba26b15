"""The kernel of whole rows, interpreted, against the plain forms: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax import sharding
from mmgem_jax.models import rotary, row_attention
from mmgem_jax.models.attention import attention, causal_attention

kernel = functools.partial(row_attention.whole_rows, interpret=True)


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
    return angles, jnp.asarray(segment_ids)


def value_and_gradients(attend, q, k, v, *rest):
    """The output, and the gradients of its product with noise, in fp32."""
    noise = np.random.default_rng(2).standard_normal((*q.shape[:2], q.shape[2] * q.shape[3]))

    def total(q, k, v):
        h = attend(q, k, v, *rest)
        return (h.astype(jnp.float32) * jnp.asarray(noise, jnp.float32)).sum(), h

    gradients, h = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (h, *gradients)]


def assert_equal_but_for_roundings(found, expected):
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


# Heads of half the lanes and of all of them; a length that fills no register, and CLIP's.
@pytest.mark.parametrize(("length", "head_dim"), [(37, 64), (257, 64), (40, 32), (24, 128)])
def test_over_an_image(length, head_dim):
    q, k, v = arrays(length, jnp.float32, 4, 4, head_dim)
    found = value_and_gradients(kernel, q, k, v)
    assert_equal_but_for_roundings(found, value_and_gradients(attention, q, k, v))


# A group of key heads, several, and queries that are not grouped.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 2, 64), (8, 4, 64), (4, 4, 64), (4, 2, 128), (8, 4, 32)]
)
def test_over_rows_of_texts(heads, kv_heads, head_dim):
    arguments = arrays(37, jnp.float32, heads, kv_heads, head_dim), context(37, head_dim)
    arguments = (*arguments[0], *arguments[1])
    found = value_and_gradients(kernel, *arguments)
    assert_equal_but_for_roundings(found, value_and_gradients(causal_attention, *arguments))


def test_bfloat16_differs_from_the_plain_form_by_roundings():
    """1e-3 of the largest entry on average, and about as far from fp32 as the plain form is."""
    low, others = arrays(140, jnp.bfloat16, 8, 2, 64), context(140, 64)
    high = tuple(x.astype(jnp.float32) for x in low)
    ours = value_and_gradients(kernel, *low, *others)
    plain = value_and_gradients(causal_attention, *low, *others)
    exact = value_and_gradients(causal_attention, *high, *others)
    for found, other, true in zip(ours, plain, exact, strict=True):
        size = np.abs(true).max()
        assert np.abs(found - other).mean() < 1e-3 * size
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-2 * size)  # a few last bits
        assert np.abs(found - true).mean() < 1.5 * np.abs(other - true).mean()


def test_other_devices_than_tpus_run_the_plain_forms():
    q, k, v = arrays(20, jnp.float32, 4, 4, 64)
    np.testing.assert_array_equal(row_attention.row_attention(q, k, v), attention(q, k, v))
    texts = (q, k, v, *context(20, 64))
    found = row_attention.causal_row_attention(*texts)
    np.testing.assert_array_equal(found, causal_attention(*texts))


def test_each_device_has_its_own_rows_and_heads():
    arguments = (*arrays(24, jnp.float32, 8, 4, 64, rows=4), *context(24, 64, rows=4))
    expected = value_and_gradients(kernel, *arguments)
    with sharding.use_mesh(tiny.mesh_of((2, 2, 2))):
        found = value_and_gradients(kernel, *arguments)
        lowered = jax.jit(kernel).lower(*arguments).as_text()
    assert_equal_but_for_roundings(found, expected)
    assert "tensor<1x24x256xf32>" in lowered  # a row of four, half of the 8 heads of 64
