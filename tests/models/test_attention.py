"""The forms of attention, each against a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgem_jax.models import attention, rotary


def normal(seed, *shape):
    """fp32 noise."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def one_by_one(q, k, v, seen):
    """Attention in fp64, a query at a time; `seen` is bool [B, T, S]."""
    B, T, N, C = q.shape
    expected = np.zeros((B, T, N, C))
    for b, t, n in np.ndindex(B, T, N):
        head = n // (N // k.shape[2])
        keys, values = (x[b, seen[b, t], head].astype(np.float64) for x in (k, v))
        scores = np.exp(keys @ q[b, t, n] / np.sqrt(C))
        expected[b, t, n] = scores / scores.sum() @ values
    return expected.reshape(B, T, N * C)


def turned(x, positions):
    """Rotary positions by complex numbers: the pair (i, i + C/2) is one."""
    C = x.shape[-1]
    frequencies = 10_000.0 ** -(np.arange(0, C, 2) / C)
    turn = np.exp(1j * positions[:, :, None, None] * frequencies)
    pairs = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


# Below, at, between and above whole blocks of 128 queries.
@pytest.mark.parametrize("length", [5, 128, 129, 257])
def test_attention_over_an_image(length):
    q, k, v = normal(0, 2, length, 2, 8), normal(1, 2, 6, 2, 8), normal(2, 2, 6, 2, 8)
    expected = one_by_one(q, k, v, np.ones((2, length, 6), bool))
    found = attention.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 6, 300, 0, 1]])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_causal_attention_over_segments(kv_heads):
    q, k, v = normal(0, 2, 7, 4, 8), normal(1, 2, 7, kv_heads, 8), normal(2, 2, 7, kv_heads, 8)
    seen = np.tril(np.ones((7, 7), bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    expected = one_by_one(turned(q, POSITIONS), turned(k, POSITIONS), v, seen)
    angles = rotary.rotary_angles(jnp.asarray(POSITIONS), 8, 10_000.0, rotary.RopeScaling())
    arrays = (jnp.asarray(x) for x in (q, k, v))
    found = attention.causal_attention(*arrays, angles, jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_over_a_cache(kv_heads):
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 6, kv_heads, 8), normal(2, 2, 6, kv_heads, 8)
    mask = np.random.default_rng(3).random((2, 1, 5, 6)) < 0.6
    mask[..., 0] = True
    keys, values = (jnp.asarray(x.swapaxes(1, 2)) for x in (k, v))
    found = attention.cached_attention(jnp.asarray(q), keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(found, one_by_one(q, k, v, mask[:, 0]), rtol=0, atol=1e-5)


def test_what_was_folded_unfolds():
    q = jnp.asarray(normal(0, 2, 5, 6, 3))
    np.testing.assert_array_equal(attention.unfold(attention.fold(q, 2), 5), q.reshape(2, 5, 18))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_other_number_of_a_pair_is_exact(dtype):
    """It comes out of a matrix product, whose zeros must not blur it."""
    x = jnp.asarray(normal(0, 2, 3, 8), dtype)
    quarter = jnp.zeros(8), jnp.ones(8).at[:4].set(-1.0)  # cosine 0, sine 1
    found = jax.jit(rotary.rotate)(x, [angle[None, None] for angle in quarter])
    expected = jnp.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    np.testing.assert_array_equal(found, expected)
