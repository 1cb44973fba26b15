"""Splash attention, interpreted, against the plain form: values and gradients."""

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
from mmgem_jax.models import splash
from mmgem_jax.models.attention import causal_attention

blockwise = functools.partial(splash.blockwise_attention, interpret=True)


def case(length, rows=2):
    """Arguments of the attentions, in fp32."""
    return (*arrays(length, jnp.float32, 4, 2, 32, rows), *context(length, 32, rows))


# Whole blocks; filled up; more than one block, of 384; grouped queries in each.
@pytest.mark.parametrize("length", [128, 200, 700])
def test_float32_is_that_of_the_plain_form(length):
    arguments = case(length)
    found = value_and_gradients(blockwise, *arguments)
    assert_float32_equal(found, value_and_gradients(causal_attention, *arguments))


def test_bfloat16_differs_from_the_plain_form_by_roundings():
    assert_bfloat16_equal(blockwise, 300, 4, 2, 32)


def test_other_devices_than_tpus_run_the_plain_form():
    arguments = case(50)
    found = splash.splash_attention(*arguments)
    np.testing.assert_array_equal(found, causal_attention(*arguments))


def test_each_device_has_its_own_rows_and_heads():
    arguments = case(128, rows=4)
    expected = value_and_gradients(blockwise, *arguments)
    with sharding.use_mesh(tiny.mesh_of((2, 2, 2))):
        found = value_and_gradients(blockwise, *arguments)
        lowered = jax.jit(blockwise).lower(*arguments).as_text()
    assert_float32_equal(found, expected)
    assert "tensor<1x2x128x32xf32>" in lowered  # of 4 rows and 4 heads
