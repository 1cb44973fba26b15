"""Splash attention, interpreted, against the plain form: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax import sharding
from mmgem_jax.models import rotary, splash
from mmgem_jax.models.attention import causal_attention

blockwise = functools.partial(splash.blockwise_attention, interpret=True)


def case(length, dtype, heads=4, kv_heads=2, rows=2):
    """Arguments of the attentions: rows of two texts and padding."""
    random = np.random.default_rng(0)
    shapes = [(rows, length, n, 32) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    ends = np.sort(random.integers(1, length, (rows, 2)), axis=1)
    places = np.arange(length)[None]
    first, real = places < ends[:, :1], places < ends[:, 1:]
    positions = np.where(first, places, places - ends[:, :1])
    segment_ids = jnp.asarray(np.where(first, 1, np.where(real, 2, 0)), jnp.int32)
    angles = rotary.rotary_angles(jnp.asarray(positions), 32, 10_000.0, rotary.RopeScaling())
    return q, k, v, angles, segment_ids


def value_and_gradients(attend, q, k, v, angles, segment_ids):
    """The output, and gradients of its product with noise, in fp32."""
    noise = np.random.default_rng(1).standard_normal((*q.shape[:2], q.shape[2] * q.shape[3]))

    def product(q, k, v):
        h = attend(q, k, v, angles, segment_ids)
        return (h.astype(jnp.float32) * jnp.asarray(noise, jnp.float32)).sum(), h

    gradients, h = jax.jit(jax.grad(product, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (h, *gradients)]


# Whole blocks; filled up; more than one block, of 384; grouped queries in each.
@pytest.mark.parametrize("length", [128, 200, 700])
def test_float32_is_that_of_the_plain_form(length):
    arguments = case(length, jnp.float32)
    found = value_and_gradients(blockwise, *arguments)
    for ours, plain in zip(found, value_and_gradients(causal_attention, *arguments), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_bfloat16_differs_from_the_plain_form_by_roundings():
    """1e-3 of the largest entry on average, and about as far from fp32 as the plain form is."""
    arguments = case(300, jnp.bfloat16)
    ours = value_and_gradients(blockwise, *arguments)
    plain = value_and_gradients(causal_attention, *arguments)
    arguments = (*(x.astype(jnp.float32) for x in arguments[:3]), *arguments[3:])
    exact = value_and_gradients(causal_attention, *arguments)
    for found, other, true in zip(ours, plain, exact, strict=True):
        size = np.abs(true).max()
        assert np.abs(found - other).mean() < 1e-3 * size
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-2 * size)  # a few last bits
        assert np.abs(found - true).mean() < 1.5 * np.abs(other - true).mean()


def test_other_devices_than_tpus_run_the_plain_form():
    arguments = case(50, jnp.float32)
    found = value_and_gradients(splash.splash_attention, *arguments)
    for ours, plain in zip(found, value_and_gradients(causal_attention, *arguments), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_each_device_has_its_own_rows_and_heads():
    arguments = case(128, jnp.float32, rows=4)
    expected = value_and_gradients(blockwise, *arguments)
    mesh = tiny.mesh_of((2, 2, 2))
    with sharding.use_mesh(mesh):
        found = value_and_gradients(blockwise, *arguments)
        lowered = jax.jit(blockwise).lower(*arguments).as_text()
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    assert "tensor<1x2x128x32xf32>" in lowered  # of 4 rows and 4 heads
