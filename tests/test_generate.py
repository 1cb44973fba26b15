"""Greedy captions against a slow loop, and the ids that are never produced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax.generate import greedy_captions
from mmgem_jax.models.mmgem import MMGem

TOKENS = tiny.TOKENS
LENGTH = 6
BANNED = [TOKENS.bos, TOKENS.pad, TOKENS.emb, *range(TOKENS.vocabulary, 128)]


@functools.cache
def compiled(method):
    """The tiny model's method as a function of (params, *inputs)."""
    apply = functools.partial(tiny.setup().model.apply, method=method)
    return jax.jit(lambda params, *inputs: apply({"params": params}, *inputs))


@functools.cache
def fast(length=LENGTH, tokens=TOKENS):
    """`greedy_captions`, compiled."""
    run = functools.partial(greedy_captions, tiny.setup().model)
    return jax.jit(lambda params, images, boxes: run(params, images, boxes, length, tokens))


@functools.cache
def params():
    """Random parameters that say </s> often enough to end some captions early."""
    made = tiny.randomise(tiny.setup().params, seed=3, scale=0.5)
    head = made["decoder"]["head"]
    made["decoder"]["head"] = head.at[:, TOKENS.eos].multiply(2.0)
    return made


@functools.cache
def params_that_prefer_banned_ids():
    """For any state, one of the ids that must not be produced has by far the largest logit."""
    made = params()
    direction = 1e4 * made["decoder"]["head"][:, 5]
    head = made["decoder"]["head"]
    for place, token in enumerate(BANNED):
        head = head.at[:, token].set(direction if place % 2 else -direction)
    return made | {"decoder": made["decoder"] | {"head": head}}


def inputs():
    """Images and two boxes each."""
    batch = tiny.setup(regions=2).batch
    return batch["image"], batch["boxes"]


def slow(params, length=LENGTH):
    """Argmax after argmax in numpy; each step runs the model on the tokens so far alone.

    Returns:
      The rows, and the ids that would have been chosen if all were allowed.
    """
    images, boxes = inputs()
    feature_map = compiled(MMGem.feature_map)(params, images)
    visual = compiled(MMGem.visual_tokens)(params, feature_map, boxes)
    visual = visual.reshape(-1, *visual.shape[2:])
    rows = np.full((len(visual), 1), TOKENS.bos)
    wanted = []
    while rows.shape[1] < length:
        logits = compiled(MMGem.caption_logits)(params, visual, rows, np.ones_like(rows))
        last = np.array(logits[:, -1])
        ended = (rows == TOKENS.eos).any(axis=1)
        wanted.append(last.argmax(axis=1)[~ended])
        last[:, BANNED] = -np.inf
        following = np.where(ended, TOKENS.pad, last.argmax(axis=1))
        rows = np.concatenate([rows, following[:, None]], axis=1)
    return rows, np.concatenate(wanted)


def test_greedy_captions_equal_a_slow_loop():
    expected, _ = slow(params())
    ended = (expected == TOKENS.eos).sum(axis=1)
    assert 0 < ended.sum() < len(expected)  # some end, some fill the row
    assert len({row.tobytes() for row in expected}) > 3
    np.testing.assert_array_equal(fast()(params(), *inputs()), expected)


def test_special_and_unused_ids_are_never_produced():
    expected, wanted = slow(params_that_prefer_banned_ids())
    assert set(wanted) <= set(BANNED) and len(set(wanted)) > 1
    rows = np.asarray(fast()(params_that_prefer_banned_ids(), *inputs()))
    np.testing.assert_array_equal(rows, expected)
    for row in rows:
        end = np.flatnonzero(row == TOKENS.eos)
        produced = row[1 : end[0] + 1] if len(end) else row[1:]
        assert not set(produced) & set(BANNED)


def test_a_caption_starts_with_bos_and_only_padding_follows_its_end():
    rows = np.asarray(fast()(params(), *inputs()))
    assert (rows[:, 0] == TOKENS.bos).all()
    for row in rows:
        end = np.flatnonzero(row == TOKENS.eos)
        assert len(end) <= 1
        if len(end):
            assert (row[end[0] + 1 :] == TOKENS.pad).all()


def test_captions_that_all_end_at_once_are_padded_to_the_length():
    """The loop stops early; the rows have the asked length all the same."""
    decoder = params()["decoder"]
    decoder = decoder | {"head": jnp.zeros_like(decoder["head"])}  # so the lowest id is taken
    tokens = dataclasses.replace(TOKENS, eos=0)
    rows = fast(tokens=tokens)(params() | {"decoder": decoder}, *inputs())
    np.testing.assert_array_equal(rows, [[TOKENS.bos, 0] + [TOKENS.pad] * (LENGTH - 2)] * 16)


@pytest.mark.parametrize("length", [2, 4])
def test_a_shorter_row_is_the_beginning_of_a_longer_one(length):
    longer = np.asarray(fast()(params(), *inputs()))
    shorter = fast(length)(params(), *inputs())
    np.testing.assert_array_equal(shorter, longer[:, :length])
