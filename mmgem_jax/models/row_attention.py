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
from mmgem_jax.models.layers import on_each_device

FAST_MEMORY = 16 * 2**20  # bytes of VMEM that every TPU gives a kernel

NEVER = -1e30  # added to a logit whose key is not seen
INNER = (((1,), (1,)), ((), ()))  # x @ y.T
PLAIN = (((1,), (0,)), ((), ()))  # x @ y
OUTER = (((0,), (0,)), ((), ()))  # x.T @ y


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
    run = on_each_device(run, (queries, keys, keys, *layouts), queries)
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


def forward_kernel(q_ref, k_ref, v_ref, *refs, head_dim):
    """One row and the queries of its group of key heads."""
    *context, out_ref = refs
    rotation, bias = rotation_and_bias(context)
    keys, values = rotated(k_ref[0], rotation), v_ref[0]
    for tile, heads in tiles(q_ref, head_dim):
        q = rotated(q_ref[0, :, tile], rotation)
        out = jnp.zeros(q.shape, jnp.float32)
        for lanes, shift in heads:
            weights, total = softmax(only(lanes, q), turn(keys, shift), bias, head_dim)
            h = product(weights.astype(values.dtype), turn(values, shift), PLAIN)
            out = jnp.where(within(lanes, h), h / total, out)
        out_ref[0, :, tile] = out.astype(out_ref.dtype)


def backward_kernel(q_ref, k_ref, v_ref, gradient_ref, *refs, head_dim):
    """The gradients of one row and the queries of its group of key heads."""
    *context, dq_ref, dk_ref, dv_ref = refs
    rotation, bias = rotation_and_bias(context)
    keys, values = rotated(k_ref[0], rotation), v_ref[0]
    dk, dv = (jnp.zeros(keys.shape, jnp.float32) for _ in range(2))
    for tile, heads in tiles(q_ref, head_dim):
        q, gradient = rotated(q_ref[0, :, tile], rotation), gradient_ref[0, :, tile]
        dq = jnp.zeros(q.shape, jnp.float32)
        for lanes, shift in heads:
            own, dh = only(lanes, q), only(lanes, gradient)
            shifted = turn(keys, shift)
            weights, total = softmax(own, shifted, bias, head_dim)
            weights = weights / total
            dweights = product(dh, turn(values, shift), INNER)
            mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
            dlogits = (weights * (dweights - mean) * head_dim**-0.5).astype(q.dtype)
            found = product(dlogits, shifted, PLAIN)
            dq = jnp.where(within(lanes, found), found, dq)
            # Both are 0 outside the head's lanes.
            dk += turn(product(dlogits, own, OUTER), -shift)
            dv += turn(product(weights.astype(q.dtype), dh, OUTER), -shift)
        dq_ref[0, :, tile] = rotated_back(dq, rotation).astype(dq_ref.dtype)
    dk_ref[0] = rotated_back(dk, rotation).astype(dk_ref.dtype)
    dv_ref[0] = dv.astype(dv_ref.dtype)


def tiles(q_ref, head_dim):
    """Of each 128 lanes of queries their slice, and the heads in them.

    A head is its lanes, [from, to), and how far its key head has to be turned to lie there.
    """
    group, heads = q_ref.shape[2] // LANES, LANES // head_dim  # queries a key head; heads a tile
    for tile in range(group):
        found = []
        for place in range(heads):
            key_head = (tile * heads + place) // group
            lanes = place * head_dim, (place + 1) * head_dim
            found.append((lanes, (place - key_head) * head_dim % LANES))
        yield slice(tile * LANES, (tile + 1) * LANES), found


def rotation_and_bias(context):
    """Rotary cosines and sines [T, 128], and what is added to the logits [T, T]; None for none."""
    if not context:
        return None, None
    cos_ref, sin_ref, ids_ref = context
    cos, sin = (
        jnp.concatenate([ref[0]] * (LANES // ref.shape[2]), axis=1) for ref in (cos_ref, sin_ref)
    )
    of_key = ids_ref[0]  # [1, T]
    T = of_key.shape[1]
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    of_query = jnp.sum(jnp.where(query == key, of_key, 0.0), axis=1, keepdims=True)
    seen = (query >= key) & (of_query == of_key)
    return (cos, sin, cos_ref.shape[2]), jnp.where(seen, 0.0, NEVER)


def rotated(x, rotation):
    """`rotary.rotate` on the heads in 128 lanes."""
    if rotation is None:
        return x
    cos, sin, head_dim = rotation
    exact = x.astype(jnp.float32)
    return (exact * cos + swapped(exact, head_dim) * sin).astype(x.dtype)


def rotated_back(gradient, rotation):
    """The gradient of x, of the gradient of `rotated(x)`; fp32."""
    if rotation is None:
        return gradient
    cos, sin, head_dim = rotation
    return gradient * cos + swapped(gradient * sin, head_dim)


def swapped(x, head_dim):
    """The other number of each pair (i, i + C/2) of the heads in 128 lanes."""
    half = head_dim // 2
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane % head_dim < half, turn(x, LANES - half), turn(x, half))


def turn(x, shift):
    """128 lanes, each `shift` lanes further, the last ones first."""
    shift %= LANES
    if shift == 0:
        return x
    return pltpu.roll(x.astype(jnp.float32), shift, 1).astype(x.dtype)


def within(lanes, x):
    """Where x [T, 128] is in the lanes [from, to)."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return (lane >= lanes[0]) & (lane < lanes[1])


def only(lanes, x):
    """x [T, 128] with 0 outside the lanes [from, to)."""
    return jnp.where(within(lanes, x), x, jnp.zeros_like(x))


def softmax(q, keys, bias, head_dim):
    """Of a head, the exponentials [T, T] of its logits, and their sums [T, 1]; fp32."""
    logits = product(q, keys, INNER) * head_dim**-0.5
    if bias is not None:
        logits += bias
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def product(x, y, axes):
    """A matrix product in fp32."""
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
