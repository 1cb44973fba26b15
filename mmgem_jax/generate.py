"""Captions from visual tokens, greedily."""

import dataclasses

import jax
import jax.numpy as jnp

from mmgem_jax.models.mmgem import MMGem


@dataclasses.dataclass(frozen=True)
class CaptionTokens:
    """Ids that decoding needs, and how many of the decoder's ids are words."""

    bos: int
    eos: int
    pad: int
    emb: int
    vocabulary: int  # ids from here on only pad the table


def greedy_captions(model, params, images, boxes, length, tokens):
    """The likeliest next token, again and again, until </s> or `length`.

    The whole row is run for every token: right and plain, not fast.

    Args:
      model: MMGem.
      params: its parameters.
      images: uint8 [B, h, w, 3].
      boxes: fp32 [B, R, 4].
      length: tokens of a row, <s> and </s> included.
      tokens: CaptionTokens. [EMB], [PAD], <s> and unused ids are never produced.

    Returns:
      int32 [B * R, length]: `<s> text </s> [PAD]...`.
    """
    variables = {"params": params}

    def visual_tokens(model, images, boxes):
        return model.visual_tokens(model.feature_map(images), boxes)

    visual = model.apply(variables, images, boxes, method=visual_tokens)
    visual = visual.reshape(-1, *visual.shape[2:])  # [N, G, D]
    N = visual.shape[0]
    ids = jnp.arange(model.config.decoder.vocab_size)
    banned = (ids == tokens.bos) | (ids == tokens.pad) | (ids == tokens.emb)
    banned |= ids >= tokens.vocabulary

    def unfinished(carry):
        position, _, done = carry
        return (position < length - 1) & ~done.all()

    def extend(carry):
        position, rows, done = carry
        # Later positions are not filled in yet; causality keeps them out of this one's logits.
        seen = jnp.ones_like(rows)
        logits = model.apply(variables, visual, rows, seen, method=MMGem.caption_logits)
        logits = jnp.where(banned[None], -jnp.inf, logits[:, position])
        token = jnp.where(done, tokens.pad, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return position + 1, rows.at[:, position + 1].set(token), done | (token == tokens.eos)

    rows = jnp.full((N, length), tokens.pad, jnp.int32).at[:, 0].set(tokens.bos)
    carry = (jnp.zeros((), jnp.int32), rows, jnp.zeros(N, bool))
    return jax.lax.while_loop(unfinished, extend, carry)[1]
