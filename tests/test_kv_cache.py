"""The cache changes nothing: every token's logits are those of the whole row read at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mmgem_jax import kv_cache, sharding
from mmgem_jax.models.decoder import Decoder
from mmgem_jax.models.rotary import RopeScaling

TOLERANCE = 1e-5
N, T = 4, 9
LENGTHS = np.array([9, 4, 6, 9])  # of the prompts below, padded to T


@functools.cache
def random_params(config):
    """Random parameters of a decoder."""
    row = jnp.zeros((1, 2, config.width)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), int)

    def through(decoder, *row):
        return decoder.logits(decoder(*row))

    made = jax.jit(functools.partial(Decoder(config).init, method=through))(jax.random.key(0), *row)
    return tiny.randomise(jax.tree.map(lambda x: x.value, made["params"], is_leaf=is_box))


def is_box(x):
    return hasattr(x, "value")


def embeddings(length=T, width=32):
    return np.random.default_rng(1).standard_normal((N, length, width)).astype(np.float32)


@functools.cache
def whole(config):
    """Compiled function(params, x, real) -> logits of rows read at once, padding at their end."""

    def run(params, x, real):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], real.shape)
        decoder = Decoder(config)
        states = decoder.apply({"params": params}, x, positions, real.astype(jnp.int32))
        return decoder.apply({"params": params}, states, method=Decoder.logits)

    return jax.jit(run)


def cached_logits(config, params, pieces, real, dtype="float32"):
    """Logits of pieces [N, T_i, D] of rows, read one after the other."""
    weights = kv_cache.decoding_weights(config, params)
    slots = sum(piece.shape[1] for piece in pieces)
    cache = kv_cache.empty_cache(config, N, slots, dtype)
    found, start = [], 0
    for piece in pieces:
        end = start + piece.shape[1]
        states, cache = kv_cache.extend(config, weights, piece, real[:, start:end], cache)
        found.append(kv_cache.logits(config, weights, states))
        start = end
    return jnp.concatenate(found, axis=1), cache


def compiled(config, dtype="float32"):
    return jax.jit(functools.partial(cached_logits, config, dtype=dtype))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(1,) * T, (4, 1, 1, 3)])
def test_cached_logits_equal_uncached_at_every_token(sizes, kv_heads):
    config = tiny.decoder_config(kv_heads=kv_heads, depth=3)
    params, x, real = random_params(config), embeddings(), np.ones((N, T), bool)
    pieces = np.split(x, np.cumsum(sizes)[:-1], axis=1)
    found, cache = compiled(config)(params, pieces, real)
    tiny.assert_within(found, whole(config)(params, x, real), TOLERANCE)
    assert int(cache.slot) == T and (cache.lengths == T).all()


def test_cached_logits_equal_uncached_where_rotary_positions_are_scaled():
    scaling = RopeScaling("llama3", factor=8.0, original_length=8)  # fewer than T
    config = tiny.decoder_config(rope_scaling=scaling)
    params, x, real = random_params(config), embeddings(), np.ones((N, T), bool)
    expected = whole(config)(params, x, real)
    found, _ = compiled(config)(params, np.split(x, [4, 5], axis=1), real)
    tiny.assert_within(found, expected, TOLERANCE)
    plain = tiny.decoder_config()
    assert np.abs(whole(plain)(params, x, real) - expected).max() > 0.01


def test_the_last_layer_of_a_tied_decoder_in_bf16_is_the_models():
    """Casting before the loop over tokens is the cast that the model does."""
    config = tiny.decoder_config(tie_embeddings=True, dtype="bfloat16")
    params, real = random_params(config), np.ones((N, T), bool)
    x = jnp.asarray(embeddings(), jnp.bfloat16)
    found, _ = compiled(config, "bfloat16")(params, [x], real)
    expected = whole(config)(params, x, real)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)
    assert jnp.abs(expected).max() > 1


def test_prompts_of_several_lengths_go_on_as_each_would_alone():
    config = tiny.decoder_config()
    params, prompts, more = random_params(config), embeddings(), embeddings(T + 3)[:, T:]
    real = np.concatenate([np.arange(T)[None] < LENGTHS[:, None], np.ones((N, 3), bool)], axis=1)
    found, cache = compiled(config)(params, [prompts, *np.split(more, 3, axis=1)], real)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + 3)
    for row, length in enumerate(LENGTHS):
        alone = np.concatenate([prompts[row, :length], more[row]])[None]
        expected = whole(config)(params, alone, np.ones((1, length + 3), bool))[0]
        tiny.assert_within(found[row, :length], expected[:length], TOLERANCE)
        tiny.assert_within(found[row, T:], expected[length:], TOLERANCE)


def test_rows_taken_from_a_cache_go_on_as_their_origin():
    config = tiny.decoder_config()
    params, x = random_params(config), embeddings()
    taken = jnp.array([2, 0, 2, 3])

    def run(params, x):
        weights = kv_cache.decoding_weights(config, params)
        cache = kv_cache.empty_cache(config, N, T, "float32")
        real = jnp.ones((N, T), bool)
        _, cache = kv_cache.extend(config, weights, x[:, :6], real[:, :6], cache)
        states, _ = kv_cache.extend(
            config, weights, x[taken, 6:], real[:, 6:], cache.take(taken[None])
        )
        return kv_cache.logits(config, weights, states)

    expected = whole(config)(params, x, np.ones((N, T), bool))
    tiny.assert_within(jax.jit(run)(params, x), expected[taken, 6:], TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_a_cache_is_split_like_the_model_and_gives_the_same(shape):
    config = tiny.decoder_config()
    params, real = random_params(config), np.ones((N, T), bool)
    pieces = np.split(embeddings(), [5], axis=1)
    expected = whole(config)(params, embeddings(), real)
    mesh = tiny.mesh_of(shape)
    with sharding.use_mesh(mesh):
        # Another function for each mesh: JAX keeps what it traced for the one before.
        found, cache = jax.jit(lambda *inputs: cached_logits(config, *inputs))(params, pieces, real)
    tiny.assert_within(found, expected, TOLERANCE)
    keys, _ = cache.layers[0]
    per_device = (N // (shape[0] * shape[1]), config.kv_heads // shape[2], T, config.head_dim)
    assert keys.sharding.shard_shape(keys.shape) == per_device
