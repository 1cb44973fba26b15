"""What the kernels of `row_attention.py` are made of: heads in lanes, and blocks of a row.

Logits lie with the keys down and 128 queries across: sums over keys are then sums of registers,
without a shuffle, and of a causal row no block of keys is made that none of its queries sees.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from mmgem_jax.models.attention import LANES

SUBLANES = 8  # rows of a register

NEVER = -1e30  # added to a logit whose key is not seen
INNER = (((1,), (1,)), ((), ()))  # x @ y.T
PLAIN = (((1,), (0,)), ((), ()))  # x @ y
OUTER = (((0,), (0,)), ((), ()))  # x.T @ y


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries of a row, and the keys that any of them sees; `pairs` are a number for each two."""

    queries: slice
    keys: slice
    axis: int  # of the keys in pairs: [keys, queries] or, of few queries, [queries, keys]
    bias: jax.Array | None  # pairs, added to the logits; None where every key is seen

    def products(self, q, k):
        """Pairs, fp32, of the queries and keys of a head [T, 128]."""
        q, k = q[self.queries], k[self.keys]
        return product(*((q, k) if self.axis else (k, q)), INNER)

    def logits(self, q, k):
        """Those of a head, not yet scaled."""
        logits = self.products(q, k)
        return logits if self.bias is None else logits + self.bias

    def softmax(self, logits, head_dim):
        """The share of each key in what a query sees; fp32."""
        largest = jnp.max(logits, axis=self.axis, keepdims=True)
        # Powers of 2 are what the chip has.
        weights = jnp.exp2((logits - largest) * (head_dim**-0.5 * math.log2(math.e)))
        return weights * (1 / jnp.sum(weights, axis=self.axis, keepdims=True))

    def onto_queries(self, pairs, x):
        """For each query of the block the sum over keys of pairs times x [T, 128]."""
        return product(pairs, x[self.keys], PLAIN if self.axis else OUTER)

    def onto_keys(self, pairs, x):
        """For each key of the row the sum over queries of pairs times x [T, 128]."""
        found = product(pairs, x[self.queries], OUTER if self.axis else PLAIN)
        return jnp.pad(found, ((0, len(x) - len(found)), (0, 0)))


def whole_blocks(T):
    """The Blocks of a row of T in which every key is seen."""
    return [Block(queries, slice(0, T), axis, None) for queries, axis in cut(T)]


def causal_blocks(segment_ids):
    """The Blocks of a row in which a query sees the earlier keys of its segment, fp32 [1, T]."""
    T = segment_ids.shape[1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (T, T), axis) for axis in (0, 1))
    down = jnp.sum(jnp.where(row == column, segment_ids, 0.0), axis=1, keepdims=True)
    blocks = []
    for queries, axis in cut(T):
        keys = slice(0, queries.stop)
        sides = (queries, keys) if axis else (keys, queries)
        earlier = (row >= column if axis else row <= column)[sides]
        seen = earlier & (down[sides[0]] == segment_ids[:, sides[1]])
        blocks.append(Block(queries, keys, axis, jnp.where(seen, 0.0, NEVER)))
    return blocks


def cut(T):
    """The queries of each block of a row, and the axis of the keys in its pairs."""
    whole = T // LANES * LANES
    for start in range(0, whole, LANES):
        yield slice(start, start + LANES), 0
    if whole < T:
        # Few queries across, as CLIP's 257th, would take a register for every 8 keys.
        yield slice(whole, T), int(T - whole <= SUBLANES)


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


def joined(found, heads):
    """What was found for the heads of 128 lanes, as it lies in them [T, 128].

    Args:
      found: [queries, 128] for each block of each head, those of a head after each other.
      heads: of `tiles`.
    """
    blocks = len(found) // len(heads)
    out = jnp.concatenate(found[:blocks])
    for place, (lanes, _) in enumerate(heads):
        own = jnp.concatenate(found[place * blocks : (place + 1) * blocks])
        out = jnp.where(within(lanes, own), own, out)
    return out


def rotation_of(cos_ref, sin_ref):
    """Rotary cosines and sines [T, 128], for all heads in the lanes, and the size of a head."""
    head_dim = cos_ref.shape[2]
    refs = cos_ref, sin_ref
    return (*(jnp.concatenate([x[0]] * (LANES // head_dim), axis=1) for x in refs), head_dim)


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


def product(x, y, axes):
    """A matrix product in fp32."""
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
