"""Llama's decoder on input embeddings; weights fit `LlamaForCausalLM`.

It takes embeddings, positions and segment ids, so one row may start with visual tokens and may
hold several texts: a token sees the earlier tokens of its own segment and no others.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmgem_jax.models.attention import cached_attention, causal_attention
from mmgem_jax.models.layers import ZEROS, constrain, linear, named, rms_norm, stack
from mmgem_jax.models.rotary import RopeScaling, rotary_angles, rotate
from mmgem_jax.models.row_attention import causal_row_attention
from mmgem_jax.models.shards import axes_of, axis_size, on_shards, split_width
from mmgem_jax.models.splash import splash_attention

DECODER_ATTENTIONS = {
    "plain": causal_attention,
    "rows": causal_row_attention,
    "splash": splash_attention,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; every field is explained in configs/base.py."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    rope_scaling: RopeScaling
    norm_epsilon: float
    tie_embeddings: bool
    attention: str
    dtype: str
    remat: str
    unroll: int

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"decoder.heads {self.heads} is not a multiple of decoder.kv_heads {self.kv_heads}"
            )
        if self.vocab_size % 128:
            raise ValueError(
                f"decoder.vocab_size {self.vocab_size} is not padded to a multiple of 128"
            )


class DecoderBlock(nn.Module):
    """Pre-norm rotary attention and SwiGLU: `LlamaDecoderLayer`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, angles, segment_ids, past=None):
        """One layer.

        Args:
          x: [B, T, D].
          angles: of `rotary_angles`, for the T positions.
          segment_ids: int32 [B, T], where the keys are those of x itself; else not looked at.
          past: None; or the keys and values [B, K, S, C] of the slots of a cache, the slot,
            int32 [], of x's first token, and bool [B, 1, T, S], True where a token sees a slot.

        Returns:
          [B, T, D], and None or the keys and values with those of x in their slots.
        """
        config = self.config
        B, T, D = x.shape
        N, K, C = config.heads, config.kv_heads, config.head_dim
        x = constrain(x)

        def project(name, heads, axes):
            projected = linear(heads * C, axes, config.dtype, name)(h)
            return checkpoint_name(projected, name).reshape(B, T, heads, C)

        h = rms_norm(config.norm_epsilon, config.dtype, "attention_norm")(x)
        q = project("query", N, ("embed", "heads"))
        k = project("key", K, ("embed", "kv_heads"))
        v = project("value", K, ("embed", "kv_heads"))
        if past is None:
            h, kept = DECODER_ATTENTIONS[config.attention](q, k, v, angles, segment_ids), None
        else:
            keys, values, slot, mask = past
            q, k = (rotate(x, [angle[:, :, None] for angle in angles]) for x in (q, k))
            kept = insert(keys, k, slot), insert(values, v, slot)
            h = cached_attention(q, *kept, mask)
        h = checkpoint_name(h, "attention")
        x = x + linear(D, ("heads_in", "residual"), config.dtype, "out", initializer=ZEROS)(h)

        h = rms_norm(config.norm_epsilon, config.dtype, "mlp_norm")(x)
        gate, up = (
            checkpoint_name(linear(config.mlp, ("embed", "mlp"), config.dtype, name)(h), name)
            for name in ("gate", "up")
        )
        h = nn.silu(gate) * up
        x = x + linear(D, ("mlp_in", "residual"), config.dtype, "down", initializer=ZEROS)(h)
        return x, kept


def insert(cache, new, slot):
    """Keys or values [B, K, S, C] with new ones [B, T, K, C] in the slots from `slot` on."""
    new = new.swapaxes(1, 2).astype(cache.dtype)
    filled = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=2)
    return nn.with_logical_constraint(filled, ("batch", "kv_heads", "length", "activation"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def looked_up(dtype, table, tokens):
    """Rows [B, T, D], of this type, of a table fp32 [V, D] by their numbers, int32 [B, T]."""
    # Gathering from a table split over its width makes XLA rematerialise the whole result; split
    # over the vocabulary only, it does not.
    table = nn.with_logical_constraint(table.astype(dtype), ("vocab", "activation"))
    return constrain(table[tokens])


def looked_up_forward(dtype, table, tokens):
    """The rows, and what the backward pass needs."""
    return looked_up(dtype, table, tokens), (tokens, len(table))


def looked_up_backward(_, tokens_and_size, gradient):
    """The table's gradient, of a token's every use the sum: in fp32, for bf16 cannot count far.

    Left to XLA, every device would sum all of it.
    """
    tokens, size = tokens_and_size

    def local(gradient, tokens):
        axes = axes_of("vocab")
        own_size = size // math.prod(axis_size(axis) for axis in axes)
        place = tokens - (jax.lax.axis_index(axes) * own_size if axes else 0)
        place = jnp.where(place < 0, size, place)  # a negative one would count from the end
        table = jnp.zeros((own_size, gradient.shape[-1]), jnp.float32)
        return split_width(table.at[place].add(gradient.astype(jnp.float32), mode="drop"), 1)

    rows = ("batch", "length", "activation"), ("batch", "length")
    return on_shards(local, rows, ("vocab", "embed"))(gradient, tokens), None


looked_up.defvjp(looked_up_forward, looked_up_backward)


class Decoder(nn.Module):
    """`embed` tokens, run the stack (`__call__`), turn states into `logits`."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        normal = nn.initializers.normal(0.02)  # Llama's initializer_range
        shape = (config.vocab_size, config.width)
        self.embedding = self.param("embedding", named(normal, "vocab", "embed"), shape)
        if not config.tie_embeddings:
            self.head = self.param("head", named(normal, "embed", "vocab"), shape[::-1])
        self.blocks = stack(DecoderBlock, config.depth, config.remat, config.unroll)(config)
        self.final_norm = rms_norm(config.norm_epsilon, config.dtype)

    def embed(self, tokens):
        """Token ids [B, T] to input embeddings [B, T, D]."""
        return looked_up(self.config.dtype, self.embedding, tokens)

    def __call__(self, x, positions, segment_ids):
        """Final states of a row.

        Args:
          x: input embeddings [B, T, D].
          positions: int32 [B, T], each token's place in its own segment.
          segment_ids: int32 [B, T]; equal ids see each other, causally. Padding has an id of
            its own (0 by convention).

        Returns:
          [B, T, D], after the final norm.
        """
        config = self.config
        angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x, _ = self.blocks(x, angles, segment_ids)
        return constrain(self.final_norm(x))

    def head_kernel(self):
        """What turns final states into logits: fp32 [D, V]."""
        return self.embedding.T if self.config.tie_embeddings else self.head

    def logits(self, states):
        """Next-token logits, fp32 [B, T, V], of final states [B, T, D]."""
        head = self.head_kernel().astype(states.dtype)
        logits = jnp.einsum("BTD,DV->BTV", states, head, preferred_element_type=jnp.float32)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
