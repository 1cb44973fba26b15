"""Softmax attention: over an image, over a row of texts, over a cache.

The forms differ in what makes them fast on a TPU, not in what they compute. Axis letters beside
those of layers.py: M queries that share a key head, Q folded queries.
"""

import flax.linen as nn
import jax.numpy as jnp

from mmgem_jax.models.rotary import rotate

LANES = 128  # of a TPU's vector registers; a block of the matrix unit has a multiple of rows


def attention(q, k, v):
    """Attention in which every query sees every key; fp32 logits.

    Args:
      q: [B, T, N, C].
      k: [B, S, N, C].
      v: [B, S, N, C].

    Returns:
      [B, T, N * C].
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    h = folded_attention(q, k, v, True).swapaxes(1, 2)
    return h.reshape(*h.shape[:2], -1)


def causal_attention(q, k, v, angles, segment_ids):
    """Rotary attention in which a token sees the earlier ones of its own segment; fp32 logits.

    Args:
      q: [B, T, N, C], not yet rotated.
      k: [B, T, K, C], K dividing N, not yet rotated.
      v: [B, T, K, C].
      angles: of `rotary_angles`, for the T positions.
      segment_ids: int32 [B, T].

    Returns:
      [B, T, N * C].
    """
    T, K = q.shape[1], k.shape[2]
    M = q.shape[2] // K
    every = lambda x: jnp.tile(x, (1, M) + (1,) * (x.ndim - 2))  # noqa: E731  for folded queries
    # Folded first: rotating rows of C numbers is cheaper where the heads are no longer apart.
    q = rotate(fold(q, K), [every(angle)[:, None] for angle in angles])
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    k = rotate(k, [angle[:, None] for angle in angles])
    places = jnp.arange(T)
    causal = jnp.tile(places, M)[:, None] >= places[None]  # [Q, S]
    own = every(segment_ids)[:, :, None] == segment_ids[:, None, :]  # [B, Q, S]
    return unfold(folded_attention(q, k, v, (causal[None] & own)[:, None]), T)


def cached_attention(q, keys, values, mask):
    """Attention over keys and values whose heads come first, as a cache has them.

    One query a row reads each head's keys as they lie; the other order would be turned first.

    Args:
      q: [B, T, N, C].
      keys: [B, K, S, C], K dividing N.
      values: [B, K, S, C].
      mask: bool [B, 1, T, S], True where a query sees a key.

    Returns:
      [B, T, N * C].
    """
    T, N = q.shape[1:3]
    K = keys.shape[1]
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    mask = jnp.tile(mask, (1, 1, N // K, 1))
    return unfold(folded_attention(fold(q, K), keys, values, mask), T)


def fold(q, kv_heads):
    """Queries [B, T, N, C] as [B, K, M * T, C]: those of a key head are one matrix with it."""
    B, T, N, C = q.shape
    q = q.reshape(B, T, kv_heads, N // kv_heads, C).transpose(0, 2, 3, 1, 4)
    return q.reshape(B, kv_heads, -1, C)


def unfold(h, length):
    """What `fold` made, [B, K, M * T, C], as [B, T, N * C], for T = length."""
    B, K, Q, C = h.shape
    h = h.reshape(B, K, Q // length, length, C).transpose(0, 3, 1, 2, 4)
    return h.reshape(B, length, -1)


def folded_attention(q, k, v, mask):
    """[B, K, Q, C] of queries [B, K, Q, C], keys and values [B, K, S, C], bool [B, 1, Q, S].

    The last may be True, where every query sees every key.
    """
    logits = jnp.einsum("BKQC,BKSC->BKQS", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits / q.shape[-1] ** 0.5, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("BKQS,BKSC->BKQC", weights, v)
