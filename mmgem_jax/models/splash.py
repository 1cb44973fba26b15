"""Causal attention for long rows: by blocks, in JAX's splash kernel, without the score matrix."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mmgem_jax.models.attention import LANES, causal_attention
from mmgem_jax.models.rotary import rotate
from mmgem_jax.models.shards import on_shards

LARGEST_BLOCK = 512  # rows of queries, or of keys, at a time


def splash_attention(q, k, v, angles, segment_ids):
    """As `causal_attention`, whose place it takes on other devices than TPUs."""
    arrays = (q, k, v, angles, segment_ids)
    return jax.lax.platform_dependent(*arrays, tpu=blockwise_attention, default=causal_attention)


def blockwise_attention(q, k, v, angles, segment_ids, interpret=False):
    """`causal_attention` by the splash kernel, each device its own rows and heads.

    Args:
      q: [B, T, N, C], not yet rotated.
      k: [B, T, K, C], K dividing N, not yet rotated.
      v: [B, T, K, C].
      angles: of `rotary_angles`, for the T positions.
      segment_ids: int32 [B, T], none below 0.
      interpret: whether the kernel runs in JAX instead of on a TPU, slowly.

    Returns:
      [B, T, N * C].
    """
    B, T, N, C = q.shape
    heads_first = [angle[:, None] for angle in angles]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k = rotate(q, heads_first), rotate(k, heads_first)
    # The kernel takes whole blocks; what fills them up is a segment of its own.
    rest = -T % LANES
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, rest), (0, 0)]) for x in (q * C**-0.5, k, v))
    segment_ids = jnp.pad(segment_ids, [(0, 0), (0, rest)], constant_values=-1)

    queries = ("batch", "heads", "length", "activation")
    keys = ("batch", "kv_heads", "length", "activation")
    run = functools.partial(run_kernel, interpret=interpret)
    run = on_shards(run, (queries, keys, keys, ("batch", "length")), queries)
    h = run(q, k, v, segment_ids)
    return h[:, :, :T].swapaxes(1, 2).reshape(B, T, N * C)


def run_kernel(q, k, v, segment_ids, interpret):
    """The kernel over rotated and scaled q [B, N, T, C], k and v [B, K, T, C], ids [B, T]."""
    N, T = q.shape[1:3]
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if T % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute")  # forward and backward
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * N),
        block_sizes=splash_attention_kernel.BlockSizes(
            use_fused_bwd_kernel=True, **dict.fromkeys(names, block)
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="splash",
        interpret=interpret,
    )
    ids = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q, k, v, ids)
