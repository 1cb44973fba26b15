"""Captions from visual tokens, and how likely the model finds a given one.

The visual tokens and the prompt are read once; then one compiled loop takes a token a turn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mmgem_jax import kv_cache
from mmgem_jax.beam_search import beam_search
from mmgem_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CaptionTokens:
    """Ids that decoding needs, and how many of the decoder's ids are words."""

    bos: int
    eos: int
    pad: int
    emb: int
    vocabulary: int  # ids from here on only pad the table


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next tokens are chosen; the names and meanings are those of Hugging Face."""

    method: str = "greedy"  # greedy, beam or sample
    length: int = 32  # new tokens at most, </s> included
    beams: int = 5  # beam: hypotheses a row
    length_penalty: float = 1.0  # beam: a score is log P / length ** length_penalty
    early_stopping: bool = False  # beam: stop at `beams` finished hypotheses, not at the best
    temperature: float = 1.0  # sample
    top_k: int = 0  # sample: from the likeliest k; 0: from all
    top_p: float = 1.0  # sample: from the likeliest that together have at least p
    cache_dtype: str = ""  # float32 or bfloat16; "": that of the decoder's computation

    def __post_init__(self):
        checks = {
            "method": (self.method in ("greedy", "beam", "sample"), "greedy, beam or sample"),
            "length": (self.length >= 1, "at least 1"),
            "beams": (self.beams >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0; for the likeliest, method greedy"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "cache_dtype": (self.cache_dtype in ("", "float32", "bfloat16"), "float32 or bfloat16"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                found = getattr(self, name)
                raise UserError(f"decoding.{name}: found {found!r}, expected {expected}")


def visual_tokens(model, params, images, boxes):
    """Decoder inputs [B * R, G, D] for boxes [B, R, 4] on uint8 images [B, h, w, 3]."""

    def of_boxes(model, images, boxes):
        return model.visual_tokens(model.feature_map(images), boxes)

    visual = model.apply({"params": params}, images, boxes, method=of_boxes)
    return visual.reshape(-1, *visual.shape[2:])


def generate(model, params, visual, prompt, tokens, decoding, key):
    """New tokens after visual tokens and a prompt.

    Args:
      model: MMGem.
      params: its parameters.
      visual: [N, G, D], from `visual_tokens`.
      prompt: int32 [N, P], `<s> text`, padded at the end with [PAD]; `<s>` alone for a caption.
      tokens: CaptionTokens. [EMB], [PAD], <s> and unused ids are never produced.
      decoding: Decoding.
      key: a jax.random key, for sampling.

    Returns:
      int32 [N, length]: `text </s> [PAD]...`, without the prompt.
    """
    config = model.config.decoder
    weights = kv_cache.decoding_weights(config, params["decoder"])
    logits, cache = read_prompt(config, weights, visual, prompt, tokens.pad, decoding)
    ids = jnp.arange(config.vocab_size)
    banned = (ids == tokens.bos) | (ids == tokens.pad) | (ids == tokens.emb)
    banned |= ids >= tokens.vocabulary
    banned &= ids != tokens.eos  # which is <s>, too, in some vocabularies

    def read(token, cache):
        """The logits after one more token of each row [N]."""
        x = kv_cache.embed(config, weights, token[:, None])
        states, cache = kv_cache.extend(
            config, weights, x, jnp.ones_like(token, bool)[:, None], cache
        )
        return kv_cache.logits(config, weights, states)[:, 0], cache

    if decoding.method == "beam":
        return beam_search(read, logits, cache, banned, tokens, decoding)
    choose = functools.partial(sample, decoding=decoding, key=key)
    if decoding.method == "greedy":
        choose = lambda logits, _: jnp.argmax(logits, axis=-1)  # noqa: E731

    def pick(logits, turn, done):
        token = choose(jnp.where(banned[None], -jnp.inf, logits), turn).astype(jnp.int32)
        token = jnp.where(done, tokens.pad, token)
        return token, done | (token == tokens.eos)

    def unfinished(carry):
        turn, _, _, done, _ = carry
        return (turn < decoding.length) & ~done.all()

    def take_turn(carry):
        turn, rows, token, done, cache = carry
        logits, cache = read(token, cache)
        token, done = pick(logits, turn, done)
        return turn + 1, rows.at[:, turn].set(token), token, done, cache

    N = visual.shape[0]
    token, done = pick(logits, 0, jnp.zeros(N, bool))
    rows = jnp.full((N, decoding.length), tokens.pad, jnp.int32).at[:, 0].set(token)
    carry = (jnp.ones((), jnp.int32), rows, token, done, cache)
    return jax.lax.while_loop(unfinished, take_turn, carry)[1]


def read_prompt(config, weights, visual, prompt, pad, decoding):
    """Reads visual tokens and prompts; returns the logits [N, V] that follow, and the cache."""
    N, G, _ = visual.shape
    x = jnp.concatenate([visual, kv_cache.embed(config, weights, prompt)], axis=1)
    real = jnp.concatenate([jnp.ones((N, G), bool), prompt != pad], axis=1)
    # The last token that is chosen is not read.
    slots = x.shape[1] + decoding.length - (decoding.method != "beam")
    cache = kv_cache.empty_cache(config, N, slots, decoding.cache_dtype or config.dtype)
    states, cache = kv_cache.extend(config, weights, x, real, cache)
    last = cache.lengths - 1  # the padding is at the end
    states = jnp.take_along_axis(states, last[:, None, None], axis=1)
    return kv_cache.logits(config, weights, states)[:, 0], cache


def sample(logits, turn, decoding, key):
    """Token ids [N] drawn from logits [N, V]: temperature, then top-k, then top-p."""
    logits = logits / decoding.temperature
    if decoding.top_k:
        best, _ = jax.lax.top_k(logits, min(decoding.top_k, logits.shape[-1]))
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if decoding.top_p < 1:
        # Kept is a token before which the likelier ones have not reached p.
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.where(before < decoding.top_p, descending, jnp.inf).min(axis=-1)
        logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(key, turn), logits)


def text_log_probs(model, params, visual, candidates, pad):
    """log P(text | region) of C candidate texts for each of N regions; the region is read once.

    Args:
      model: MMGem.
      params: its parameters.
      visual: [N, G, D], from `visual_tokens`.
      candidates: int32 [N, C, T], rows `<s> text </s> [PAD]...`.
      pad: the id of [PAD].

    Returns:
      fp32 [N, C], the sum over the text's tokens and `</s>`.
    """
    config = model.config.decoder
    weights = kv_cache.decoding_weights(config, params["decoder"])
    N, G, _ = visual.shape
    C, T = candidates.shape[1:]
    cache = kv_cache.empty_cache(config, N, G + T - 1, config.dtype)
    _, cache = kv_cache.extend(config, weights, visual, jnp.ones((N, G), bool), cache)
    cache = cache.take(jnp.zeros((N, C), jnp.int32))

    rows = candidates.reshape(N * C, T)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    x = kv_cache.embed(config, weights, inputs)
    states, _ = kv_cache.extend(config, weights, x, inputs != pad, cache)

    def of_position(position):
        """log P of the target at one position of every row, [N * C]."""
        states, target = position
        logits = kv_cache.logits(config, weights, states[:, None])[:, 0]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    # A position at a time: the logits of whole texts would be the largest array by far.
    found = jax.lax.map(of_position, (states.swapaxes(0, 1), targets.T)).T  # [N * C, T - 1]
    return jnp.sum(jnp.where(targets == pad, 0.0, found), axis=1).reshape(N, C)
