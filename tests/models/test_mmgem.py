"""The whole model: what its embeddings, visual tokens and captions depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mmgem_jax.models.mmgem import MMGem, unit, whole_image

SIZE = 4  # rows and columns of the tiny feature map


def test_embeddings_have_length_one():
    batch = tiny.setup().batch
    regions = tiny.applied(MMGem.encode_regions)(batch["image"], batch["boxes"])
    texts = tiny.applied(MMGem.encode_text)(batch["text_tokens"][:, 0], batch["embed_index"][:, 0])
    assert regions.shape == (8, 1, 16) and texts.shape == (8, 16)
    for embeddings in (regions, texts):
        np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, rtol=1e-6)
        assert np.std(np.asarray(embeddings), axis=0).max() > 0.01  # not all the same


def test_unit_of_a_zero_vector_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
    assert value == 0 and np.isfinite(gradient).all()


def test_an_image_is_the_region_of_its_whole_box():
    images = tiny.setup().batch["image"]
    whole = np.tile(np.array([0, 0, 1, 1], np.float32), (len(images), 1, 1))
    np.testing.assert_array_equal(whole_image(len(images)), whole)
    regions = tiny.applied(MMGem.encode_regions)(images, whole)[:, 0]
    np.testing.assert_array_equal(tiny.applied(MMGem.encode_image)(images), regions)


def test_an_image_embedding_is_h1_of_the_mean_of_the_map():
    setup = tiny.setup()
    kernel = np.asarray(tiny.random_params()["region_projection"]["kernel"], np.float64)
    feature_map = np.asarray(tiny.applied(MMGem.feature_map)(setup.batch["image"]), np.float64)
    expected = feature_map.mean(axis=(1, 2)) @ kernel
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    ours = tiny.applied(MMGem.encode_image)(setup.batch["image"])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_boxes_of_one_cell_embed_as_h1_of_the_map():
    """The paper's Figure 3: with g_e = 1, pooling and the linear h1 commute."""
    setup = tiny.setup()
    kernel = np.asarray(tiny.random_params()["region_projection"]["kernel"], np.float64)
    feature_map = tiny.applied(MMGem.feature_map)(setup.batch["image"])
    rows, columns = (axis.ravel() for axis in np.mgrid[:SIZE, :SIZE])
    cells = np.stack([columns, rows, columns + 1, rows + 1], axis=-1) / SIZE
    boxes = np.tile(cells.astype(np.float32), (len(feature_map), 1, 1))
    ours = tiny.applied(MMGem.embed_regions)(feature_map, boxes)
    expected = np.asarray(feature_map, np.float64).reshape(len(feature_map), -1, 32) @ kernel
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_larger_embedding_grid_concatenates_its_cells_row_by_row():
    setup = tiny.setup({"model.embedding_grid": 2})
    kernel = np.asarray(setup.params["region_projection"]["kernel"])
    assert kernel.shape == (2 * 2 * 32, 16)
    feature_map = tiny.applied(MMGem.feature_map)(setup.batch["image"])
    embed = functools.partial(setup.model.apply, method=MMGem.embed_regions)
    ours = jax.jit(embed)({"params": setup.params}, feature_map, whole_image(8))[:, 0]
    feature_map = np.asarray(feature_map)
    quarters = [feature_map[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)]
    expected = np.concatenate(quarters, axis=-1) @ kernel
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_visual_tokens_are_h2_of_the_cells_of_a_box():
    setup = tiny.setup()
    kernel = np.asarray(tiny.random_params()["visual_token_projection"]["kernel"])
    feature_map = np.asarray(tiny.applied(MMGem.feature_map)(setup.batch["image"]))
    left = np.tile(np.array([0, 0, 0.5, 1], np.float32), (8, 1, 1))
    ours = tiny.applied(MMGem.visual_tokens)(feature_map, left)
    quarters = [feature_map[:, r : r + 2, c].mean(1) for r in (0, 2) for c in (0, 1)]
    expected = np.stack(quarters, axis=1)[:, None] @ kernel
    assert ours.shape == (8, 1, 4, 32)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_text_embedding_is_the_state_at_emb_and_nothing_after_it_counts():
    setup = tiny.setup()
    tokens, index = setup.batch["text_tokens"][:, 0], setup.batch["embed_index"][:, 0]
    assert len(set(index)) > 2  # texts of several lengths
    encode = tiny.applied(MMGem.encode_text)
    expected = encode(tokens, index)
    after = np.arange(tokens.shape[1]) > index[:, None]
    noise = np.random.default_rng(1).integers(0, 128, tokens.shape)
    np.testing.assert_array_equal(encode(np.where(after, noise, tokens), index), expected)
    # The last word before [EMB], and [EMB] itself, do count.
    for back in (1, 0):
        other = tokens.copy()
        other[np.arange(8), index - back] = 77
        assert (np.abs(encode(other, index) - expected).max(axis=-1) > 1e-3).all()


def test_a_caption_sees_its_image_and_its_own_earlier_words():
    setup = tiny.setup()
    tokens = setup.batch["caption_tokens"][:, 0]
    seen = np.ones_like(tokens)
    visual = np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float32)
    logits = tiny.applied(MMGem.caption_logits)
    before = logits(visual, tokens, seen)
    assert before.shape == (8, 6, 128) and before.dtype == jnp.float32

    other = tokens.copy()
    other[:, 3] = (other[:, 3] + 1) % 100
    same = np.asarray(logits(visual, other, seen) == before).all(axis=(0, 2))
    np.testing.assert_array_equal(same, [True, True, True, False, False, False])
    for token in range(4):  # every visual token reaches every word
        moved = visual.copy()
        moved[0, token] += 1
        changed = np.abs(logits(moved, tokens, seen) - before).max(axis=-1)
        assert (changed[0] > 1e-4).all() and (changed[1:] == 0).all()


def test_caption_logits_equal_the_decoder_on_one_row_of_positions():
    """Visual tokens come first and take the first positions; padding changes nothing."""
    setup = tiny.setup()
    tokens = setup.batch["caption_tokens"][:, 0]
    length = setup.batch["caption_length"][:, 0]
    visual = np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float32)
    real = np.arange(6) < length[:, None]
    ours = tiny.applied(MMGem.caption_logits)(visual, tokens, real.astype(np.int32))

    def plain(model, visual, tokens):
        row = jnp.concatenate([visual, model.decoder.embed(tokens)], axis=1)
        positions = jnp.arange(row.shape[1])[None]
        states = model.decoder(row, positions, jnp.ones_like(positions))
        return model.decoder.logits(states)[:, visual.shape[1] :]

    for i in (0, 5):
        cut = slice(i, i + 1), slice(length[i])
        alone = tiny.applied(plain)(visual[cut[0]], tokens[cut])
        np.testing.assert_allclose(ours[i, : length[i]], alone[0], rtol=0, atol=1e-5)
