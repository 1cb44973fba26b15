"""Decoding a few tokens at a time: the decoder's keys and values are kept, not computed again.

A row's tokens lie in the slots of its cache in the order in which they come. All rows fill the same
slots, so shapes are static; a slot that holds padding of a row is one that the row never sees.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mmgem_jax.models.decoder import Decoder, DecoderBlock
from mmgem_jax.models.rotary import rotary_angles


class DecodingWeights(NamedTuple):
    """A decoder's parameters as a loop over tokens wants them."""

    decoder: dict  # embedding, final norm and head
    layers: tuple  # of each layer, cut out of the stack


class Cache(flax.struct.PyTreeNode):
    """What a batch of rows has read so far."""

    layers: tuple  # of each layer: keys and values, [N, K, S, C]
    seen: jax.Array  # bool [N, S], slots that hold a token of the row
    lengths: jax.Array  # int32 [N], tokens of each row so far
    slot: jax.Array  # int32 [], the next slot

    def take(self, chosen):
        """The rows as N groups, and of each the members `chosen`, int32 [N, b]: N * b rows.

        Group by group: a gather over all rows would bring a sharded cache to every device.
        """
        N = len(chosen)

        def one(x):
            groups = x.reshape(N, -1, *x.shape[1:])
            return jax.vmap(lambda group, places: group[places])(groups, chosen).reshape(
                -1, *x.shape[1:]
            )

        kept = {"seen": one(self.seen), "lengths": one(self.lengths)}
        return self.replace(layers=jax.tree.map(one, self.layers), **kept)


def decoding_weights(config, params):
    """Prepares the decoder's parameters for `extend`; call it outside the loop over tokens.

    Inside the loop each step would copy every layer out of the stack, and cast every matrix.

    Args:
      config: DecoderConfig.
      params: the decoder's parameters.
    """

    def cast(x):  # norms stay in fp32, as in the model
        return x.astype(config.dtype) if x.ndim == 2 else x

    layers = tuple(
        jax.tree.map(lambda x: cast(x[layer]), params["blocks"])  # noqa: B023  (called here)
        for layer in range(config.depth)
    )
    rest = {name: value for name, value in params.items() if name != "blocks"}
    return DecodingWeights(jax.tree.map(cast, rest), layers)


def empty_cache(config, rows, slots, dtype):
    """A cache of so many rows that nothing has been read into."""
    shape = (rows, config.kv_heads, slots, config.head_dim)
    layer = lambda: (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))  # noqa: E731
    return Cache(
        layers=tuple(layer() for _ in range(config.depth)),
        seen=jnp.zeros((rows, slots), bool),
        lengths=jnp.zeros(rows, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def extend(config, weights, x, real, cache):
    """Reads more of each row.

    Args:
      config: DecoderConfig.
      weights: DecodingWeights.
      x: input embeddings [N, T, D] of the next tokens.
      real: bool [N, T], False for padding.
      cache: Cache with T free slots.

    Returns:
      The states [N, T, D] before the final norm, and the cache with the tokens in it.
    """
    T, S = real.shape[1], cache.seen.shape[1]
    positions = cache.lengths[:, None] + jnp.cumsum(real, axis=1) - 1
    angles = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    seen = jax.lax.dynamic_update_slice_in_dim(cache.seen, real, cache.slot, axis=1)
    causal = jnp.arange(S)[None] <= cache.slot + jnp.arange(T)[:, None]
    mask = (seen[:, None, :] & causal[None])[:, None]  # [N, 1, T, S]
    layers = []
    for params, (keys, values) in zip(weights.layers, cache.layers, strict=True):
        past = (keys, values, cache.slot, mask)
        x, kept = DecoderBlock(config).apply({"params": params}, x, angles, None, past)
        layers.append(kept)
    lengths = cache.lengths + real.sum(axis=1)
    return x, Cache(tuple(layers), seen, lengths, cache.slot + T)


def embed(config, weights, tokens):
    """Token ids [N, T] to input embeddings [N, T, D]."""
    return Decoder(config).apply({"params": weights.decoder}, tokens, method=Decoder.embed)


def logits(config, weights, states):
    """Next-token logits, fp32 [N, T, V], of states [N, T, D] from `extend`."""

    def head(decoder, states):
        return decoder.logits(decoder.final_norm(states))

    return Decoder(config).apply({"params": weights.decoder}, states, method=head)
