"""The losses by blocks equal those over whole matrices, on every mesh, in far less memory."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_losses
import pytest
import tiny

from mmgem_jax import caption_loss, contrastive, losses, sharding

MESHES = (None, (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (2, 2, 2, 1))
OVERLAP = 0.1


def on(shape):
    """The mesh of this shape in use, or none."""
    return sharding.use_mesh(tiny.mesh_of(shape)) if shape else contextlib.nullcontext()


def assert_equal(found, expected, tolerance=1e-6):
    """Every entry agrees to the tolerance of the largest entry of its array."""
    found, expected = jax.device_get((found, expected))
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        theirs = np.asarray(theirs, np.float32)
        name = jax.tree_util.keystr(path)
        atol = tolerance * np.abs(theirs).max()
        np.testing.assert_allclose(ours.astype(np.float32), theirs, 0, atol, err_msg=name)


# ---- InfoNCE -------------------------------------------------------------------------------------


def embeddings(count, width=64):
    """Unit rows of 1/8 and -1/8: their products have no rounding, whatever the order of the sum.

    A text is like its image in most places, but for every third, which is like no image.
    """
    random = np.random.default_rng(0)
    images = random.choice([-1, 1], (count, width))
    texts = images * random.choice([-1, 1], (count, width), p=[0.2, 0.8])
    texts[::3] = random.choice([-1, 1], texts[::3].shape)
    return (images / 8).astype(np.float32), (texts / 8).astype(np.float32)


def pairs(count, regions=4):
    """Pairs that share ids, images of several regions that overlap, padding."""
    random = np.random.default_rng(1)
    return losses.Pairs(
        group_ids=random.integers(0, 2 * count, (count, 2)).astype(np.int32),
        image=np.repeat(np.arange(count // regions), regions).astype(np.int32),
        boxes=tiny.random_boxes(random, (count,)),
        valid=random.random(count) < 0.8,
    )


def plain_info_nce(images, texts, scale, pairs, duplicates, overlap):
    """`plain_losses.info_nce` of the same arguments."""
    masked = plain_losses.duplicate_mask(pairs.group_ids) & duplicates
    masked |= plain_losses.overlap_mask(pairs.boxes.reshape(-1, 4, 4), overlap)
    return plain_losses.info_nce(images, texts, scale, masked, pairs.valid)


def info_nce_and_gradients(loss, duplicates=True, overlap=OVERLAP):
    """(images, texts, scale, pairs) -> loss, metrics and gradients, compiled."""
    run = lambda *inputs: loss(*inputs, duplicates, overlap)  # noqa: E731
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def expected_of_info_nce(scale, duplicates=True, overlap=OVERLAP):
    inputs = jax.tree.map(jnp.asarray, (*embeddings(56), np.float32(scale), pairs(56)))
    return info_nce_and_gradients(plain_info_nce, duplicates, overlap)(*inputs)


@pytest.mark.parametrize("shape", MESHES)
def test_info_nce_by_blocks_equals_that_of_the_whole_matrix(shape, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", 5)  # 56 pairs fill no mesh's last chunk
    with on(shape):
        run = info_nce_and_gradients(losses.info_nce)
        for scale in (14, 100):
            found = run(*embeddings(56), np.float32(scale), pairs(56))
            assert_equal(found, expected_of_info_nce(scale))
    metrics = found[0][1]
    assert 0.2 < metrics["accuracy_image_to_text"] < 0.8
    assert 0.01 < metrics["masked_share"] < 0.5


@pytest.mark.parametrize("masks", [(False, 1.0), (True, 1.0), (False, OVERLAP)])
def test_each_mask_by_itself(masks, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK", 5)
    with on((2, 4, 1)):
        found = info_nce_and_gradients(losses.info_nce, *masks)(
            *embeddings(56), np.float32(14), pairs(56)
        )
    assert_equal(found, expected_of_info_nce(14, *masks))


def test_a_collapsed_model_is_never_right():
    row = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    same = np.tile(row / np.linalg.norm(row), (56, 1))
    with on((8, 1, 1)):
        _, metrics = jax.jit(losses.info_nce, static_argnums=(4, 5))(
            same, same, np.float32(100), pairs(56), False, 1.0
        )
    assert metrics["accuracy_image_to_text"] == metrics["accuracy_text_to_image"] == 0


# ---- captions ------------------------------------------------------------------------------------


def captions(dtype=np.float32):
    """States [8, 9, 16], head [16, 128], targets and mask."""
    random = np.random.default_rng(2)
    states = random.standard_normal((8, 9, 16)).astype(dtype)
    head = random.standard_normal((16, 128)).astype(np.float32)
    targets = random.integers(0, 128, (8, 9)).astype(np.int32)
    targets[::2] = (states[::2].astype(np.float32) @ head).argmax(axis=-1)  # half of them are right
    return states, head, targets, random.random((8, 9)) < 0.6


def plain_captions(states, head, targets, mask):
    """`plain_losses.caption_cross_entropy` of the whole logits."""
    logits = jnp.einsum(
        "NTD,DV->NTV", states, head.astype(states.dtype), preferred_element_type=jnp.float32
    )
    loss, metrics = plain_losses.caption_cross_entropy(logits, targets, mask)
    return loss, metrics["token_accuracy"]


def lean_captions(states, head, targets, mask):
    return losses.caption_cross_entropy(states, head, targets, mask, mask.sum())


def captions_and_gradients(loss):
    """(states, head, targets, mask) -> loss, share right and gradients, compiled."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@functools.cache
def expected_of_captions(dtype):
    return captions_and_gradients(plain_captions)(*map(jnp.asarray, captions(dtype)))


@pytest.mark.parametrize("shape", MESHES)
def test_captions_by_chunks_cost_what_whole_logits_do(shape, monkeypatch):
    monkeypatch.setattr(caption_loss, "ENTRIES", 1)  # 8 tokens a chunk, which 9 or 18 do not fill
    with on(shape):
        found = captions_and_gradients(lean_captions)(*captions())
        alone = jax.jit(lean_captions)(*captions())
        split = shape and tiny.mesh_of(shape).shape
    expected = expected_of_captions(np.float32)
    assert_equal(found, expected)
    assert_equal(alone, expected[0])
    assert 0.3 < alone[1] < 0.7
    if split:  # the head's gradient comes out as the head is
        local = found[1][1].sharding.shard_shape((16, 128))
        assert local == (16 // split["fsdp"], 128 // split["tensor"])


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_captions_from_bf16_states(shape, monkeypatch):
    """The products' factors have 8 bits: so far, the gradients agree."""
    monkeypatch.setattr(caption_loss, "ENTRIES", 1)
    with on(shape):
        found = captions_and_gradients(lean_captions)(*captions(jnp.bfloat16))
    expected = expected_of_captions(jnp.bfloat16)
    assert_equal(found[0], expected[0])
    assert_equal(found[1], expected[1], tolerance=2**-7)
    assert found[1][0].dtype == jnp.bfloat16
    assert found[1][1].dtype == jnp.float32


# ---- memory --------------------------------------------------------------------------------------


def temporaries(run, inputs, spread):
    """Bytes of temporaries of the compiled function on each of 8 devices."""
    mesh = tiny.mesh_of((8, 1, 1))
    rows = sharding.batch_sharding(mesh)
    shaped = lambda x, batch: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=rows if batch else None
    )
    inputs = [
        jax.tree.map(functools.partial(shaped, batch=batch), x)
        for x, batch in zip(inputs, spread, strict=True)
    ]
    with sharding.use_mesh(mesh):
        return run.lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def test_info_nce_by_blocks_takes_an_eighth_of_the_memory():
    inputs = *embeddings(4096), np.float32(14), pairs(4096)
    lean, plain = (
        temporaries(info_nce_and_gradients(loss), inputs, (True, True, False, True))
        for loss in (losses.info_nce, plain_info_nce)
    )
    assert lean < plain / 8


def test_captions_by_chunks_take_an_eighth_of_the_memory():
    shapes = [((1024, 128, 64), jnp.bfloat16), ((64, 8192), jnp.float32)]
    shapes += [((1024, 128), jnp.int32), ((1024, 128), bool)]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lean, plain = (
        temporaries(captions_and_gradients(loss), inputs, (True, False, True, True))
        for loss in (lean_captions, plain_captions)
    )
    assert lean < plain / 8
