"""Beam search: the best of several captions that are grown side by side.

The rules are those of Hugging Face `generate` (transformers 5): of the 2 * beams likeliest
continuations the finished ones among the first `beams` compete for a place in the results by
log P / length ** length_penalty, and the best unfinished ones go on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands for log 0 where it is added to scores that are compared: never chosen while others are.
NEVER = -1e9


class Beams(NamedTuple):
    """N rows of b hypotheses, best first."""

    rows: jax.Array  # int32 [N, b, length]
    scores: jax.Array  # fp32 [N, b]
    finished: jax.Array  # bool [N, b]; of those that grow, none is


def beam_search(read, logits, cache, banned, tokens, decoding):
    """The best caption of each row.

    Args:
      read: (token [M], cache) -> (logits [M, V], cache), as in `generate`.
      logits: fp32 [N, V], after the prompt.
      cache: the prompt's Cache.
      banned: bool [V], ids that are never produced.
      tokens: CaptionTokens.
      decoding: Decoding.

    Returns:
      int32 [N, length]: `text </s> [PAD]...`.
    """
    N, V, b, L = *logits.shape, decoding.beams, decoding.length
    rows = jnp.full((N, b, L), tokens.pad, jnp.int32)
    # All hypotheses of a row are the same at first: only one of them may continue.
    first = jnp.where(jnp.arange(b)[None] == 0, 0.0, NEVER).repeat(N, axis=0)
    growing = Beams(rows, first, jnp.zeros((N, b), bool))
    results = Beams(rows, jnp.full((N, b), NEVER), jnp.zeros((N, b), bool))
    carry = (jnp.zeros((), jnp.int32), growing, results, jnp.ones(N, bool), jnp.array(True))
    copies = jnp.zeros((N, b), jnp.int32)
    carry += (jnp.repeat(logits, b, axis=0), cache.take(copies))

    def unfinished(carry):
        _, _, results, can_improve, continues, _, _ = carry
        full = results.finished.all() & decoding.early_stopping
        return can_improve.any() & ~full & continues

    def take_turn(carry):
        turn, growing, results, can_improve, _, logits, cache = carry
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        log_probs = jnp.where(banned[None], -jnp.inf, log_probs).reshape(N, b, V)
        candidates, parents = continuations(growing, log_probs, turn, tokens.eos)
        results = add_finished(results, candidates, turn, can_improve, decoding)
        growing, chosen = select(penalise(candidates, candidates.finished), b)
        growing = growing._replace(finished=jnp.zeros((N, b), bool))

        parents = jnp.take_along_axis(parents, chosen, axis=1)
        token = growing.rows[:, :, turn].reshape(N * b)
        logits, cache = read(token, cache.take(parents))
        turn += 1
        possible = growing.scores[:, 0] / turn.astype(jnp.float32) ** decoding.length_penalty
        worst = jnp.where(results.finished.all(axis=1), results.scores.min(axis=1), NEVER)
        can_improve &= possible > worst
        return turn, growing, results, can_improve, turn < L, logits, cache

    results = jax.lax.while_loop(unfinished, take_turn, carry)[2]
    return results.rows[:, 0]


def continuations(growing, log_probs, turn, eos):
    """The 2b likeliest ways [N, 2b] to go on, best first, and the hypothesis each goes on from."""
    N, b, V = log_probs.shape
    # Of each hypothesis first, so that no array of all continuations is sorted as one.
    best = min(2 * b, V)
    scores, tokens = jax.lax.top_k(growing.scores[:, :, None] + log_probs, best)
    scores, flat = jax.lax.top_k(scores.reshape(N, b * best), 2 * b)
    parents, token = flat // best, jnp.take_along_axis(tokens.reshape(N, b * best), flat, axis=1)
    rows = jnp.take_along_axis(growing.rows, parents[:, :, None], axis=1)
    rows = rows.at[:, :, turn].set(token)
    ends = (token == eos) | (turn + 1 == growing.rows.shape[-1])
    return Beams(rows, scores, ends), parents


def add_finished(results, candidates, turn, can_improve, decoding):
    """The best of the results so far and of the candidates that have just ended."""
    b = results.scores.shape[1]
    length = (turn + 1).astype(jnp.float32)
    ends = candidates.finished & (jnp.arange(2 * b)[None] < b)
    scores = candidates.scores / length**decoding.length_penalty
    closed = results.finished.all(axis=1) & decoding.early_stopping | ~can_improve
    new = Beams(candidates.rows, scores + closed[:, None] * NEVER, ends)
    new = penalise(new, ~ends)
    both = Beams(*(jnp.concatenate(pair, axis=1) for pair in zip(results, new, strict=True)))
    return select(both, b)[0]


def penalise(beams, where):
    """The same hypotheses; those `where` says are never chosen while others are."""
    return beams._replace(scores=beams.scores + where * NEVER)


def select(beams, count):
    """The best `count` hypotheses of each row, and their places."""
    _, chosen = jax.lax.top_k(beams.scores, count)
    rows = jnp.take_along_axis(beams.rows, chosen[:, :, None], axis=1)
    scores = jnp.take_along_axis(beams.scores, chosen, axis=1)
    return Beams(rows, scores, jnp.take_along_axis(beams.finished, chosen, axis=1)), chosen
