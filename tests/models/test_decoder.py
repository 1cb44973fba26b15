"""The decoder against Hugging Face's LlamaForCausalLM, and what a row's tokens see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax.linen import meta
from torch_llama import from_torch, torch_model

from mmgem_jax.models.decoder import Decoder, DecoderBlock
from mmgem_jax.models.rotary import RopeScaling, rotary_angles, rotary_frequencies

LAYER_TOLERANCE = 1e-5
WHOLE_TOLERANCE = 1e-4

CASES = {
    "kv_heads=heads": {"kv_heads": 4},
    "kv_heads=heads/2,tied": {
        "kv_heads": 2,
        "tie_embeddings": True,
        "head_dim": 16,
        "rope_theta": 500.0,
        "norm_epsilon": 1e-3,
    },
    "linear": {"rope_scaling": RopeScaling("linear", factor=3.0)},
    # Of the 8 pairs of a head some are kept, some divided and some between; see below.
    "llama3": {
        "head_dim": 16,
        "rope_scaling": RopeScaling("llama3", factor=8.0, original_length=32),
    },
    "kv_heads=1": {"kv_heads": 1, "depth": 3, "rope_theta": 100_000.0, "width": 24},
}


def run_torch(model, x, positions, mask):
    """Logits, final states, and the input and output of each layer."""
    layers, states = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: layers.append((inputs[0], output)))
    model.model.norm.register_forward_hook(lambda _, inputs, output: states.append(output))
    positions, mask = torch.from_numpy(positions), mask if mask is None else torch.from_numpy(mask)
    logits = model(
        inputs_embeds=torch.from_numpy(x),
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
    ).logits
    return logits.numpy(), states[0].numpy(), [(a.numpy(), b.numpy()) for a, b in layers]


def states_and_logits(decoder, x, positions, segment_ids):
    states = decoder(x, positions, segment_ids)
    return states, decoder.logits(states)


@functools.cache
def runner(config):
    """Compiled function(params, x, positions, segment_ids) -> (states, logits)."""
    run = lambda params, *row: Decoder(config).apply(  # noqa: E731
        {"params": params}, *row, method=states_and_logits
    )
    return jax.jit(run)


@functools.cache
def random_params(config, seed=0):
    row = jnp.zeros((1, 2, config.width)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), int)
    init = jax.jit(functools.partial(Decoder(config).init, method=states_and_logits))
    params = tiny.randomise(meta.unbox(init(jax.random.key(seed), *row)["params"]), seed)
    return params


def embeddings(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face_layer_by_layer(case, seed):
    config = tiny.decoder_config(**CASES[case])
    reference = torch_model(config, seed)
    params = from_torch(reference, config)
    shapes = functools.partial(jax.tree.map, lambda x: x.shape)
    assert shapes(params) == shapes(random_params(config))

    x = embeddings((3, 10, config.width), seed)
    # Plain, offset, and irregular: only differences of positions matter to attention.
    steps = np.random.default_rng(seed).integers(1, 9, 10)
    positions = np.stack([np.arange(10), 31 + np.arange(10), np.cumsum(steps)])
    one_text = np.ones((3, 10), int)
    logits, states, layers = run_torch(reference, x, positions, one_text)

    ours = runner(config)(params, x, positions, one_text)
    tiny.assert_within(ours[0], states, WHOLE_TOLERANCE)
    tiny.assert_within(ours[1], logits, WHOLE_TOLERANCE)

    angles = rotary_angles(
        jnp.asarray(positions), config.head_dim, config.rope_theta, config.rope_scaling
    )
    block = jax.jit(
        lambda params, x: DecoderBlock(config).apply({"params": params}, x, angles, one_text)[0]
    )
    for i, (before, after) in enumerate(layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        tiny.assert_within(block(layer, before), after, LAYER_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_token_embeddings_are_rows_of_the_table(case):
    config = tiny.decoder_config(**CASES[case])
    reference = torch_model(config, seed=0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 5))
    params = {"params": from_torch(reference, config)}
    ours = Decoder(config).apply(params, tokens, method=Decoder.embed)
    theirs = reference.model.embed_tokens(torch.from_numpy(tokens)).numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_packed_segments_equal_separate_rows_and_hugging_face():
    config = tiny.decoder_config()
    reference = torch_model(config, seed=0)
    params = from_torch(reference, config)
    lengths = (5, 4, 3)
    texts = [embeddings((1, n, config.width), seed=n) for n in lengths]
    packed = np.concatenate(texts, axis=1)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segment_ids = np.repeat([1, 2, 0], lengths)[None]
    states, logits = runner(config)(params, packed, positions, segment_ids)

    ends = np.cumsum(lengths)
    for text, end, n in zip(texts, ends, lengths, strict=True):
        alone = runner(config)(params, text, np.arange(n)[None], np.ones((1, n), int))
        np.testing.assert_allclose(states[:, end - n : end], alone[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits[:, end - n : end], alone[1], rtol=0, atol=1e-5)
    # Without a mask, Hugging Face takes positions that start again for another text.
    tiny.assert_within(states, run_torch(reference, packed, positions, None)[1], WHOLE_TOLERANCE)


def test_padding_changes_no_output_and_no_gradient():
    config = tiny.decoder_config()
    params = random_params(config)
    real = np.array([6, 4])
    targets = np.random.default_rng(1).integers(0, config.vocab_size, (2, 6))

    @jax.jit
    def loss(params, x, positions, segment_ids):
        _, logits = runner(config)(params, x, positions, segment_ids)
        chosen = jnp.take_along_axis(logits[:, :6], targets[:, :, None], axis=2)[:, :, 0]
        counts = jnp.arange(6)[None] < real[:, None]
        value = jnp.sum(jnp.where(counts, jax.nn.logsumexp(logits[:, :6], axis=-1) - chosen, 0))
        return value, jnp.where(counts[..., None], logits[:, :6], 0)

    def padded(length, seed):
        """The two texts in rows of `length`; what is in the padding depends on the seed."""
        counts = np.arange(length)[None] < real[:, None]
        noise, text = embeddings((2, length, config.width), seed), np.zeros((2, length, 32))
        text[:, :6] = embeddings((2, 6, config.width), seed=0)
        positions = np.random.default_rng(seed).integers(0, 99, (2, length))
        positions = np.where(counts, np.arange(length)[None], positions)
        x = np.where(counts[..., None], text, noise).astype(np.float32)
        return x, positions, counts.astype(int)

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = gradient(params, *padded(6, seed=1))
    for row in (padded(6, seed=2), padded(9, seed=3)):
        found = gradient(params, *row)
        tiny.assert_trees_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_token_changes_nothing_before_it(changed):
    config = tiny.decoder_config()
    x, positions, one_text = (
        embeddings((2, 8, 32)),
        np.arange(8)[None].repeat(2, 0),
        np.ones((2, 8)),
    )
    other = x.copy()
    other[:, changed] += 1
    before = runner(config)(random_params(config), x, positions, one_text.astype(int))
    after = runner(config)(random_params(config), other, positions, one_text.astype(int))
    for a, b in zip(before, after, strict=True):
        same = np.asarray(a == b).all(axis=(0, 2))
        assert same[:changed].all() and not same[changed:].any()


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (64, 10_000.0, RopeScaling()),
        (80, 12_345.0, RopeScaling()),
        (64, 100_000.0, RopeScaling("linear", factor=2.5)),
        (64, 500_000.0, RopeScaling("llama3", factor=32.0)),  # Llama 3.2
        (128, 500_000.0, RopeScaling("llama3", factor=8.0)),  # Llama 3.1
        (128, 500_000.0, RopeScaling("llama3", 4.0, 0.5, 9.0, 1000)),
        (16, 10_000.0, CASES["llama3"]["rope_scaling"]),
    ],
)
def test_rotary_frequencies_are_hugging_faces(head_dim, theta, scaling):
    changes = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling, "depth": 0}
    expected = torch_model(tiny.decoder_config(**changes), seed=0).model.rotary_emb.inv_freq
    found = rotary_frequencies(head_dim, theta, scaling)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-7, atol=0)
    plain = rotary_frequencies(head_dim, theta, RopeScaling())
    if scaling.type == "llama3":  # kept, between, divided: in this order, and some of each
        kept, divided = found == plain, found == plain / np.float32(scaling.factor)
        assert kept[0] and divided[-1] and not (kept | divided).all()


def test_rotary_positions_are_exact_where_bfloat16_would_round():
    positions = np.array([[0, 1, 256, 257, 2047]])
    cos, sin = rotary_angles(jnp.asarray(positions), 64, 10_000.0, RopeScaling())
    angles = np.tile(positions[:, :, None] / 10_000.0 ** (np.arange(0, 64, 2) / 64), 2)
    sign = np.repeat([-1, 1], 32)[None, None]
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=5e-4)
    np.testing.assert_allclose(sin, sign * np.sin(angles), rtol=0, atol=5e-4)
    assert cos.dtype == sin.dtype == jnp.float32


def test_bfloat16_stays_near_float32_and_logits_are_float32():
    config, rough = tiny.decoder_config(), tiny.decoder_config(dtype="bfloat16")
    row = embeddings((2, 8, 32)), np.arange(8)[None].repeat(2, 0), np.ones((2, 8), int)
    exact = runner(config)(random_params(config), *row)
    states, logits = runner(rough)(random_params(config), *row)
    assert (states.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert 0 < np.abs(states.astype(np.float32) - exact[0]).max() < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "decoder.heads 4 is not a multiple of decoder.kv_heads 3"),
        ({"vocab_size": 130}, "decoder.vocab_size 130 is not padded to a multiple of 128"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.decoder_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "yarn"}, "type 'yarn' is not one of none, linear, llama3"),
        ({"factor": 0.0}, "factor 0.0 is not above 0"),
        ({"high_freq_factor": 1.0}, "high_freq_factor 1.0 is not above .*low_freq_factor 1.0"),
    ],
)
def test_a_rope_scaling_that_is_none_is_an_error(changes, message):
    with pytest.raises(ValueError, match=rf"^decoder\.rope_scaling\.{message}"):
        RopeScaling(**changes)
