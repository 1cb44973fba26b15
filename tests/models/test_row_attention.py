"""The kernel of whole rows, interpreted, against the plain forms: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_checks import (
    arrays,
    assert_bfloat16_equal,
    assert_float32_equal,
    context,
    value_and_gradients,
)

from mmgem_jax import sharding
from mmgem_jax.models import row_attention
from mmgem_jax.models.attention import attention, causal_attention

kernel = functools.partial(row_attention.whole_rows, interpret=True)


# Heads of half the lanes, a quarter and all of them; a length that fills no register, and CLIP's.
@pytest.mark.parametrize(("length", "head_dim"), [(37, 64), (257, 64), (40, 32), (24, 128)])
def test_over_an_image(length, head_dim):
    q, k, v = arrays(length, jnp.float32, 4, 4, head_dim)
    found = value_and_gradients(kernel, q, k, v)
    assert_float32_equal(found, value_and_gradients(attention, q, k, v))


# A group of key heads, several, and queries that are not grouped.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 2, 64), (8, 4, 64), (4, 4, 64), (4, 2, 128), (8, 4, 32)]
)
def test_over_rows_of_texts(heads, kv_heads, head_dim):
    arguments = *arrays(37, jnp.float32, heads, kv_heads, head_dim), *context(37, head_dim)
    found = value_and_gradients(kernel, *arguments)
    assert_float32_equal(found, value_and_gradients(causal_attention, *arguments))


# Blocks of 128 queries: two; two and a few queries that lie down; two and a third.
@pytest.mark.parametrize("length", [256, 257, 300])
def test_over_rows_of_several_blocks(length):
    arguments = *arrays(length, jnp.float32, 4, 2, 64), *context(length, 64)
    found = value_and_gradients(kernel, *arguments)
    assert_float32_equal(found, value_and_gradients(causal_attention, *arguments))


def test_bfloat16_differs_from_the_plain_form_by_roundings():
    assert_bfloat16_equal(kernel, 140, 8, 2, 64)


def test_other_devices_than_tpus_run_the_plain_forms():
    q, k, v = arrays(20, jnp.float32, 4, 4, 64)
    np.testing.assert_array_equal(row_attention.row_attention(q, k, v), attention(q, k, v))
    texts = (q, k, v, *context(20, 64))
    found = row_attention.causal_row_attention(*texts)
    np.testing.assert_array_equal(found, causal_attention(*texts))


def test_each_device_has_its_own_rows_and_heads():
    arguments = *arrays(24, jnp.float32, 8, 4, 64, rows=4), *context(24, 64, rows=4)
    expected = value_and_gradients(kernel, *arguments)
    with sharding.use_mesh(tiny.mesh_of((2, 2, 2))):
        found = value_and_gradients(kernel, *arguments)
        lowered = jax.jit(kernel).lower(*arguments).as_text()
    assert_float32_equal(found, expected)
    assert "tensor<1x24x256xf32>" in lowered  # a row of four, half of the 8 heads of 64
