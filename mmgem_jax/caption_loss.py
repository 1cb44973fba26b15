"""Cross-entropy of next tokens, straight from the decoder's states: no logits of a whole batch.

The logits of a chunk of tokens exist at a time. Where gradients are wanted, the forward pass makes
them on the spot, so that each chunk's logits are made once; what the backward pass gets is the
gradients themselves. After the fused linear cross-entropy of Liger Kernel (Hsu et al., 2024,
https://arxiv.org/abs/2410.10989).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmgem_jax.models.shards import axes_of, in_chunks, on_shards, split_width, whole_width

# Logits in a chunk, at most: 32 MiB of them.
ENTRIES = 2**23

LOG_ZERO = -1e30  # stands for log 0
NOTHING = (np.float32(0), np.float32(0))  # the sums over no token
STATES, HEAD, TOKENS = ("batch", None, None), ("embed", "vocab"), ("batch", None)


def caption_cross_entropy(states, head, targets, mask, total):
    """L_Gen: negative log-likelihood of the target tokens, summed and divided by their number.

    Args:
      states: [N, T, D] of any float type, in which they are multiplied by the head; sums are fp32.
      head: fp32 [D, V].
      targets: int32 [N, T].
      mask: bool [N, T], True for tokens that count.
      total: by what to divide: how many tokens of the global batch count.

    Returns:
      The loss, and the share of the tokens whose target has the largest logit; a tie does not
      count.
    """
    nll, right = sums(states, head, targets, mask)
    total = jnp.maximum(total, 1)
    return nll / total, right / total


@jax.custom_vjp
def sums(states, head, targets, mask):
    """Over the tokens that count: the summed negative log-likelihood, and how many are right."""

    def local(states, head, targets, mask):
        head = whole_width(head.astype(states.dtype), 0)

        def visit(found, tokens):
            more, _ = compared(head, *tokens)
            return jax.tree.map(jnp.add, found, more), None

        found, _ = jax.lax.scan(visit, NOTHING, in_chunks_of_tokens(states, targets, mask, head))
        return jax.lax.psum(found, axes_of("batch"))

    return on_shards(local, (STATES, HEAD, TOKENS, TOKENS), [(), ()])(states, head, targets, mask)


def forward(states, head, targets, mask):
    """`sums`, and the gradients of the first to states and head."""

    def local(states, head, targets, mask):
        whole = whole_width(head.astype(states.dtype), 0)

        def visit(carry, tokens):
            found, d_head = carry
            more, slope = compared(whole, *tokens)
            d_states = jax.lax.psum(product("CV,DV->CD", slope, whole), axes_of("vocab"))
            d_head += product("CD,CV->DV", tokens[0], slope)
            return (jax.tree.map(jnp.add, found, more), d_head), d_states.astype(states.dtype)

        start = NOTHING, jnp.zeros(whole.shape)
        tokens = in_chunks_of_tokens(states, targets, mask, whole)
        (found, d_head), d_states = jax.lax.scan(visit, start, tokens)
        d_states = d_states.reshape(-1, states.shape[-1])[: mask.size].reshape(states.shape)
        return *jax.lax.psum(found, axes_of("batch")), d_states, split_width(d_head, 0)

    run = on_shards(local, (STATES, HEAD, TOKENS, TOKENS), [(), (), STATES, HEAD])
    nll, right, *gradients = run(states, head, targets, mask)
    return (nll, right), gradients


def backward(gradients, cotangents):
    """The gradients times the cotangent of the first sum; the second has none."""
    by_nll, _ = cotangents
    d_states, d_head = ((by_nll * x).astype(x.dtype) for x in gradients)
    return d_states, d_head, None, None


sums.defvjp(forward, backward)


def compared(head, states, targets, mask):
    """The sums over a chunk of C tokens, and the gradient of the first to the logits.

    Args:
      head: [D, V], this device's part of the vocabulary.
      states: [C, D].
      targets: int32 [C], of the whole vocabulary.
      mask: bool [C].

    Returns:
      (fp32 [], fp32 []); and [C, V] of the type of the states.
    """
    axes, V = axes_of("vocab"), head.shape[1]
    first = jax.lax.axis_index(axes) * V if axes else 0
    logits = product("CD,DV->CV", states, head)
    hit = jnp.arange(V)[None] == (targets - first)[:, None]
    own = jax.lax.psum(jnp.where(hit, logits, 0).sum(axis=1), axes)
    best = jax.lax.pmax(jnp.where(hit, LOG_ZERO, logits).max(axis=1), axes)
    top = jnp.maximum(own, best)
    total = jax.lax.psum(jnp.exp(logits - top[:, None]).sum(axis=1), axes)
    nll = jnp.where(mask, top - own + jnp.log(total), 0).sum()
    slope = jnp.exp(logits - (top + jnp.log(total))[:, None]) - hit
    slope = jnp.where(mask[:, None], slope, 0).astype(states.dtype)
    return (nll, (mask & (own > best)).sum(dtype=jnp.float32)), slope


def product(subscripts, *operands):
    """`einsum` with fp32 sums, whatever the type of what is multiplied."""
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def in_chunks_of_tokens(states, targets, mask, head):
    """Tokens of this device [N, T, ...] as [chunks, chunk, ...], padded with tokens not to count.

    Each chunk visits the fp32 gradient of the head [D, V]: D / 2 tokens, whose logits are half its
    size, are enough for the products to outweigh that.
    """
    D, V = head.shape
    chunks = -(-mask.size // max(ENTRIES // V, D // 2, 8))
    chunk = -(-mask.size // chunks)
    flat = states.reshape(-1, D), targets.reshape(-1), mask.reshape(-1)
    return jax.tree.map(lambda x: in_chunks(x, chunks, chunk), flat)
