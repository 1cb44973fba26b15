"""Generation against Hugging Face's `generate`, and scores against the model without a cache."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from torch_llama import from_torch, torch_model
from transformers import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from mmgem_jax import generate as generation
from mmgem_jax import sharding
from mmgem_jax.errors import UserError
from mmgem_jax.generate import Decoding, generate, text_log_probs
from mmgem_jax.models.mmgem import MMGem

TOKENS = tiny.TOKENS
BANNED = [TOKENS.bos, TOKENS.pad, TOKENS.emb, *range(TOKENS.vocabulary, 128)]
N, G, P, LENGTH = 6, 4, 3, 8
PROMPT_LENGTHS = np.array([3, 1, 2, 3, 1, 2])
KEY = jax.random.key(0)


@functools.cache
def compiled(decoding, model=None):
    """`generate` of the tiny model as a function of (params, visual, prompt, key)."""
    model = model or tiny.setup().model
    return jax.jit(lambda *inputs, key: generate(model, *inputs, TOKENS, decoding, key))


@functools.cache
def reference(seed):
    """A random Llama that says </s> often enough to end some rows early, and our parameters."""
    config = tiny.setup().model.config.decoder
    llama = torch_model(config, seed)
    llama.lm_head.weight[TOKENS.eos] *= 2
    return llama, {"decoder": from_torch(llama, config)}


def inputs(seed=0):
    """Visual tokens, and prompts of several lengths, padded at their end."""
    random = np.random.default_rng(seed)
    visual = random.standard_normal((N, G, 32)).astype(np.float32)
    prompt = random.integers(tiny.FIRST_WORD, TOKENS.pad, (N, P)).astype(np.int32)
    prompt[:, 0] = TOKENS.bos
    return visual, np.where(np.arange(P)[None] < PROMPT_LENGTHS[:, None], prompt, TOKENS.pad)


def hugging_face(llama, visual, prompt, **options):
    """New tokens [N, LENGTH] of `llama.generate` on the same input embeddings."""
    words = llama.model.embed_tokens(torch.from_numpy(prompt).long())
    rows = torch.cat([torch.from_numpy(visual), words], dim=1)
    real = torch.cat([torch.ones(N, G), torch.from_numpy(prompt != TOKENS.pad)], dim=1).long()
    # Hugging Face wants the padding at the start.
    shift = (real == 0).sum(dim=1)
    rows = torch.stack([row.roll(int(n), 0) for row, n in zip(rows, shift, strict=True)])
    real = torch.stack([row.roll(int(n), 0) for row, n in zip(real, shift, strict=True)])
    found = llama.generate(
        inputs_embeds=rows,
        attention_mask=real,
        max_new_tokens=LENGTH,
        do_sample=False,
        bos_token_id=TOKENS.bos,
        eos_token_id=TOKENS.eos,
        pad_token_id=TOKENS.pad,
        suppress_tokens=BANNED,
        **options,
    ).numpy()
    return np.pad(found, ((0, 0), (0, LENGTH - found.shape[1])), constant_values=TOKENS.pad)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_hugging_face(seed):
    llama, params = reference(seed)
    visual, prompt = inputs(seed)
    expected = hugging_face(llama, visual, prompt)
    ours = compiled(Decoding(length=LENGTH))(params, visual, prompt, key=KEY)
    np.testing.assert_array_equal(ours, expected)


def test_the_references_end_rows_early_and_differ():
    rows = np.concatenate([hugging_face(reference(s)[0], *inputs(s)) for s in range(4)])
    ended = (rows == TOKENS.eos).sum(axis=1)
    assert 3 < ended.sum() < len(rows) - 3
    assert len({row.tobytes() for row in rows}) > len(rows) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"beams": 3},
        {"beams": 4, "length_penalty": 0.0},
        {"beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"beams": 2, "length_penalty": -1.0, "early_stopping": True},
        {"beams": 1},
    ],
    ids=str,
)
def test_beam_search_equals_hugging_face(options, seed):
    llama, params = reference(seed)
    visual, prompt = inputs(seed)
    theirs = {("num_beams" if k == "beams" else k): v for k, v in options.items()}
    if options["beams"] == 1:  # theirs is greedy then, and knows no penalty
        theirs = {}
    expected = hugging_face(llama, visual, prompt, **theirs)
    decoding = Decoding(method="beam", length=LENGTH, **options)
    ours = compiled(decoding)(params, visual, prompt, key=KEY)
    np.testing.assert_array_equal(ours, expected)


def test_beams_find_what_greedy_does_not():
    """So the comparisons above are not of greedy rows."""
    _, params = reference(0)
    visual, prompt = inputs(0)
    greedy = compiled(Decoding(length=LENGTH))(params, visual, prompt, key=KEY)
    beams = Decoding(method="beam", length=LENGTH, beams=3)
    found = compiled(beams)(params, visual, prompt, key=KEY)
    assert (np.asarray(greedy) != np.asarray(found)).any(axis=1).sum() >= 2


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(length=LENGTH),
        Decoding("beam", LENGTH, beams=3),
        Decoding("sample", LENGTH, temperature=3.0),
        Decoding("sample", LENGTH, top_k=5, top_p=0.9, cache_dtype="bfloat16"),
    ],
    ids=lambda decoding: decoding.method,
)
def test_special_and_unused_ids_are_never_produced(decoding):
    """The head is turned such that they have by far the largest logits."""
    params = reference(0)[1]
    head = np.array(params["decoder"]["head"])
    head[:, BANNED] = 100 * head[:, [5]] * np.where(np.arange(len(BANNED)) % 2, 1, -1)
    params = {"decoder": params["decoder"] | {"head": head}}
    rows = np.asarray(compiled(decoding)(params, *inputs(), key=KEY))
    assert rows.shape == (N, LENGTH)
    for row in rows:
        end = np.flatnonzero(row == TOKENS.eos)
        produced, rest = (row[: end[0]], row[end[0] + 1 :]) if len(end) else (row, [])
        assert not set(produced) & {*BANNED, TOKENS.eos}
        assert set(rest) <= {TOKENS.pad}


@pytest.mark.parametrize("length", [1, 3])
def test_a_shorter_row_is_the_beginning_of_a_longer_one(length):
    _, params = reference(1)
    longer = np.asarray(compiled(Decoding(length=LENGTH))(params, *inputs(), key=KEY))
    shorter = compiled(Decoding(length=length))(params, *inputs(), key=KEY)
    np.testing.assert_array_equal(shorter, longer[:, :length])


@pytest.mark.parametrize("bos", [TOKENS.bos, 0], ids=["", "one token begins and ends a text"])
def test_rows_that_all_end_at_once_are_padded_to_the_length(bos):
    params = reference(0)[1]["decoder"]
    params = {"decoder": params | {"head": np.zeros_like(params["head"])}}  # the lowest id wins
    tokens = dataclasses.replace(TOKENS, eos=0, bos=bos)
    model, decoding = tiny.setup().model, Decoding(length=LENGTH)
    rows = jax.jit(lambda *row: generate(model, *row, tokens, decoding, KEY))(params, *inputs())
    np.testing.assert_array_equal(rows, [[0] + [TOKENS.pad] * (LENGTH - 1)] * N)


# ---- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.5, 8, 0.8), (2.0, 1, 1.0), (1.0, 0, 0.01)],
)
def test_sampling_draws_from_hugging_faces_distribution(temperature, top_k, top_p):
    """20,000 draws a row against the probabilities that its warpers leave."""
    logits = np.random.default_rng(0).normal(0, 1.5, (3, 12)).astype(np.float32)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warped = warpers(torch.zeros(3, 1, dtype=torch.long), torch.from_numpy(logits))
    expected = torch.softmax(warped, dim=-1).numpy()

    decoding = Decoding("sample", temperature=temperature, top_k=top_k, top_p=top_p)
    draw = functools.partial(generation.sample, jnp.asarray(logits), decoding=decoding, key=KEY)
    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(20_000)))
    for row in range(3):
        found = np.bincount(draws[:, row], minlength=12) / len(draws)
        assert not found[expected[row] == 0].any()
        # Five standard deviations of a frequency.
        spread = 5 * np.sqrt(expected[row] * (1 - expected[row]) / len(draws))
        assert (np.abs(found - expected[row]) <= spread + 1e-9).all()


def test_sampled_rows_follow_from_the_key():
    _, params = reference(0)
    run = compiled(Decoding("sample", LENGTH))
    one, again = (run(params, *inputs(), key=jax.random.key(1)) for _ in range(2))
    other = run(params, *inputs(), key=jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    assert len({int(token) for token in np.asarray(one).T[0]}) > 1  # rows do not share their draws


def test_sampling_of_the_likeliest_alone_is_greedy():
    _, params = reference(2)
    greedy = compiled(Decoding(length=LENGTH))(params, *inputs(), key=KEY)
    sampled = compiled(Decoding("sample", LENGTH, top_k=1))(params, *inputs(), key=KEY)
    np.testing.assert_array_equal(sampled, greedy)


# ---- scores ----------------------------------------------------------------------------------


def candidates(seed=0, count=3, length=6):
    rows, _ = tiny.rows(np.random.default_rng(seed), (N, count), length, TOKENS.eos)
    return rows


def test_log_probs_are_those_of_the_model_without_a_cache():
    visual, rows = inputs()[0], candidates()
    found = jax.jit(functools.partial(text_log_probs, tiny.setup().model, pad=TOKENS.pad))(
        tiny.random_params(), visual, rows
    )
    assert found.shape == (N, 3)
    for c in range(3):
        tokens, targets = rows[:, c, :-1], rows[:, c, 1:]
        logits = tiny.applied(MMGem.caption_logits)(visual, tokens, np.ones_like(tokens))
        log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        chosen = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        expected = (chosen * (targets != TOKENS.pad)).sum(axis=1)
        np.testing.assert_allclose(found[:, c], expected, rtol=0, atol=1e-4)


def test_the_probabilities_of_all_first_words_sum_to_one():
    rows = np.stack([np.full(128, TOKENS.bos), np.arange(128)], axis=-1)[None].astype(np.int32)
    score = functools.partial(text_log_probs, tiny.setup().model, pad=-1)
    found = jax.jit(score)(tiny.random_params(), inputs()[0][:1], rows)
    assert float(jnp.exp(found).sum()) == pytest.approx(1, abs=1e-5)


# ---- on a mesh -------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [Decoding(length=LENGTH), Decoding("beam", LENGTH, beams=3)])
def test_a_mesh_gives_the_same_captions(decoding):
    model, batch = tiny.setup().model, tiny.setup().batch

    def caption(params, images, boxes):
        visual = generation.visual_tokens(model, params, images, boxes)
        prompt = jnp.full((len(images), 1), TOKENS.bos)
        return generate(model, params, visual, prompt, TOKENS, decoding, KEY)

    params = tiny.randomise(tiny.setup().params, seed=3, scale=0.5)
    arrays = {"images": batch["image"], "boxes": batch["boxes"]}
    expected = jax.jit(caption)(params, **arrays)
    assert len({row.tobytes() for row in np.asarray(expected)}) > 3
    mesh = tiny.mesh_of((2, 2, 2))
    with sharding.use_mesh(mesh):
        # Another function: JAX keeps what it traced without the mesh.
        found = jax.jit(lambda *inputs: caption(*inputs))(
            params, *sharding.to_global(arrays, mesh).values()
        )
    np.testing.assert_array_equal(found, expected)


def test_a_split_cache_is_not_gathered():
    """Beams and candidates go on from their own row's cache, on its own device."""
    model, mesh = tiny.setup().model, tiny.mesh_of((4, 2, 1))
    visual, prompt = np.zeros((8, G, 32), np.float32), np.ones((8, 1), np.int32)
    rows = sharding.to_global({"visual": visual, "prompt": prompt}, mesh)
    texts = sharding.to_global({"texts": np.ones((8, 3, 5), np.int32)}, mesh)["texts"]
    params = {"decoder": tiny.random_params()["decoder"]}
    beams = Decoding("beam", LENGTH, beams=3)
    with sharding.use_mesh(mesh):
        for program, inputs in (
            (lambda *row: generate(model, *row, TOKENS, beams, KEY), (*rows.values(),)),
            (lambda *row: text_log_probs(model, *row, TOKENS.pad), (rows["visual"], texts)),
        ):
            text = jax.jit(program).lower(params, *inputs).compile().as_text()
            gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
            # A cache has four axes, [rows, kv heads, slots, head dim].
            assert not [shape for shape in gathered if shape.count(",") == 3], gathered


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("length", 0),
        ("beams", 0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("cache_dtype", "int8"),
    ],
)
def test_a_setting_out_of_range_is_a_user_s_error(field, value):
    with pytest.raises(UserError, match=rf"^decoding\.{field}: found {value!r}, expected "):
        Decoding(**{field: value})
