"""Attention of short rows in one kernel: a row's logits are never in the chip's main memory.

XLA's attention of 257 or of 140 tokens spends most of its time on turning heads out of
[B, T, N * C] and back, and on logits that it writes and reads again. Here a step of the kernel has
one row of the batch and 128 lanes of keys, so 128 / C key heads and their queries, just as the
projections left them. A head is a matrix product over all 128 lanes with those of the other heads
at 0, which costs no more than one over C lanes: the matrix unit is 128 wide. Nothing is kept for
the backward pass but the arguments; the logits are made again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmgem_jax.models.attention import LANES, attention, causal_attention
from mmgem_jax.models.row_blocks import (
    causal_blocks,
    joined,
    only,
    rotated,
    rotated_back,
    rotation_of,
    tiles,
    turn,
    whole_blocks,
)
from mmgem_jax.models.shards import on_shards

FAST_MEMORY = 16 * 2**20  # bytes of VMEM that every TPU gives a kernel


def fast_memory(tokens, queries, itemsize, causal):
    """About the bytes of VMEM that the backward pass takes; at most FAST_MEMORY may be asked for.

    Blocks come and go while others are worked on, so each is there twice. Of the logits of a head,
    and what is made of them, the compiler holds so many at once, as found by trying.

    Args:
      tokens: of a row.
      queries: heads that share a key head.
      itemsize: bytes of a number.
      causal: whether rows are of texts, with angles and a mask.
    """
    width = -(-tokens // LANES) * LANES
    blocks = 2 * tokens * LANES * ((3 * queries + 4) * itemsize + (8 if causal else 0))
    return blocks + (12 if causal else 8) * tokens * width * 4


def row_attention(q, k, v):
    """As `attention`, whose place it takes on other devices than TPUs."""
    return jax.lax.platform_dependent(q, k, v, tpu=whole_rows, default=attention)


def causal_row_attention(q, k, v, angles, segment_ids):
    """As `causal_attention`, whose place it takes on other devices than TPUs."""
    arrays = (q, k, v, angles, segment_ids)
    return jax.lax.platform_dependent(*arrays, tpu=whole_rows, default=causal_attention)


def whole_rows(q, k, v, angles=None, segment_ids=None, interpret=False):
    """The kernel on each device's own rows and heads.

    Args:
      q: [B, T, N, C], C dividing 128; not yet rotated.
      k: [B, T, K, C], K dividing N and, on each device, K * C a multiple of 128.
      v: [B, T, K, C].
      angles: of `rotary_angles`; None where nothing is rotated and every key is seen.
      segment_ids: int32 [B, T] from 0 to 2^24, with the angles.
      interpret: whether the kernel runs in JAX instead of on a TPU, slowly.

    Returns:
      [B, T, N * C].
    """
    B, T, _, C = q.shape
    context, layouts = (), ()
    if angles is not None:
        context = (*angles, segment_ids.astype(jnp.float32)[:, None])
        layouts = (("batch", "length", "activation"),) * 3
    arrays = [x.reshape(B, T, -1) for x in (q, k, v)]
    queries, keys = ("batch", "length", "heads"), ("batch", "length", "kv_heads")
    run = functools.partial(row_kernel, C, interpret)
    run = on_shards(run, (queries, keys, keys, *layouts), queries)
    return run(*arrays, *context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def row_kernel(head_dim, interpret, q, k, v, *context):
    """q [B, T, N * C], k, v [B, T, K * C]; cos, sin [B, T, C] and ids fp32 [B, 1, T], or none."""
    return call(forward_kernel, head_dim, interpret, (q, k, v), context, (q,))[0]


def row_kernel_forward(head_dim, interpret, *arrays):
    """The output, and the arguments for the backward pass."""
    return row_kernel(head_dim, interpret, *arrays), arrays


def row_kernel_backward(head_dim, interpret, arrays, gradient):
    """The gradients of q, k and v; none of the angles and ids."""
    q, k, v, *context = arrays
    found = call(backward_kernel, head_dim, interpret, (q, k, v, gradient), context, (q, k, v))
    return (*found, *(jnp.zeros_like(x) for x in context))


row_kernel.defvjp(row_kernel_forward, row_kernel_backward)


def call(kernel, head_dim, interpret, arrays, context, like):
    """Runs a kernel over rows and groups of 128 lanes of keys; results are shaped like `like`."""
    B, T, width = arrays[0].shape
    groups = arrays[1].shape[2] // LANES

    def of_group(x):
        return pl.BlockSpec((1, T, x.shape[2] // groups), lambda row, group: (row, 0, group))

    def of_row(x):
        return pl.BlockSpec((1, *x.shape[1:]), lambda row, group: (row, 0, 0))

    products = 2 if kernel is forward_kernel else 5
    return pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim),
        grid=(B, groups),
        in_specs=[*map(of_group, arrays), *map(of_row, context)],
        out_specs=[of_group(x) for x in like],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * B * T * T * width,
            transcendentals=B * T * T * width // head_dim,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *context, *like)),
        ),
        interpret=interpret,
        name=f"row_attention_{kernel.__name__}",
    )(*arrays, *context)


# Both kernels take the heads of 128 lanes a stage at a time: the compiler keeps to our order, and
# products of one head run beside exponentials of another only where they stand near them.


def forward_kernel(q_ref, k_ref, v_ref, *refs, head_dim):
    """One row and the queries of its group of key heads."""
    *context, out_ref = refs
    rotation, blocks = rotation_and_blocks(q_ref, context)
    keys, values = rotated(k_ref[0], rotation), v_ref[0]
    for tile, heads in tiles(q_ref, head_dim):
        q = rotated(q_ref[0, :, tile], rotation)
        units = [(head, block) for head in heads for block in blocks]
        logits = [
            block.logits(only(lanes, q), turn(keys, shift)) for (lanes, shift), block in units
        ]
        weights = [block.softmax(x, head_dim) for (_, block), x in zip(units, logits, strict=True)]
        found = [
            block.onto_queries(x.astype(values.dtype), turn(values, shift))
            for ((_, shift), block), x in zip(units, weights, strict=True)
        ]
        out_ref[0, :, tile] = joined(found, heads).astype(out_ref.dtype)


def backward_kernel(q_ref, k_ref, v_ref, gradient_ref, *refs, head_dim):
    """The gradients of one row and the queries of its group of key heads."""
    *context, dq_ref, dk_ref, dv_ref = refs
    rotation, blocks = rotation_and_blocks(q_ref, context)
    keys, values = rotated(k_ref[0], rotation), v_ref[0]
    dk, dv = (jnp.zeros(keys.shape, jnp.float32) for _ in range(2))
    scale = head_dim**-0.5  # of the logits
    for tile, heads in tiles(q_ref, head_dim):
        queries, gradient = rotated(q_ref[0, :, tile], rotation), gradient_ref[0, :, tile]
        units = [
            (block, shift, only(lanes, queries), only(lanes, gradient))
            for lanes, shift in heads
            for block in blocks
        ]
        made = [
            (block.logits(q, turn(keys, shift)), block.products(dh, turn(values, shift)))
            for block, shift, q, dh in units
        ]
        pairs = []
        for (block, *_), (logits, dweights) in zip(units, made, strict=True):
            weights = block.softmax(logits, head_dim)
            mean = jnp.sum(weights * dweights, axis=block.axis, keepdims=True)
            dlogits = weights * (dweights - mean)
            pairs.append((weights.astype(keys.dtype), dlogits.astype(keys.dtype)))
        dq = []
        for (block, shift, q, dh), (weights, dlogits) in zip(units, pairs, strict=True):
            dq.append(block.onto_queries(dlogits, turn(keys, shift)))
            # Both are 0 outside the head's lanes.
            dk += turn(block.onto_keys(dlogits, q), -shift)
            dv += turn(block.onto_keys(weights, dh), -shift)
        dq = rotated_back(joined(dq, heads) * scale, rotation)
        dq_ref[0, :, tile] = dq.astype(dq_ref.dtype)
    dk_ref[0] = rotated_back(dk * scale, rotation).astype(dk_ref.dtype)
    dv_ref[0] = dv.astype(dv_ref.dtype)


def rotation_and_blocks(q_ref, context):
    """What `rotated` takes, None where nothing is rotated, and the Blocks of the row."""
    if not context:
        return None, whole_blocks(q_ref.shape[1])
    cos_ref, sin_ref, ids_ref = context
    return rotation_of(cos_ref, sin_ref), causal_blocks(ids_ref[0])
