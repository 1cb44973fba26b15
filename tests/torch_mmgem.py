"""Folders that hold MM-GEM for PyTorch, of random parameters, and what our model says of them."""

import contextlib
import functools
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import AutoModel, dynamic_module_utils

from mmgem_jax.convert import export
from mmgem_jax.data.tokenizer import embedding_row, train_bpe
from mmgem_jax.generate import generate
from mmgem_jax.models.mmgem import whole_image
from mmgem_jax.trained_run import TrainedRun, caption_tokens

B, R, LENGTH, TEXT_LENGTH = 5, 2, 8, 12
SENTENCES = ["a red house", "two dogs on a green hill", "a cat that sleeps in the sun"]
TEXTS = [
    "a red house",
    "</s> is [EMB] and <s> [PAD]",
    "naïve 猫 on a hill, asleep all day",
    "",
    "sun",
]
BOXES = tiny.random_boxes(np.random.default_rng(3), (B, R))
VARIANTS = {
    "untied": {"model.decoder.kv_heads": 4},
    "tied": {"model.decoder.tie_embeddings": True},
    "grids": {"model.embedding_grid": 3, "model.generation_grid": 3, "model.decoder.kv_heads": 1},
    "llama3": {
        "model.decoder.head_dim": 12,  # not width / heads
        "model.decoder.rope_scaling.type": "llama3",
        "model.decoder.rope_scaling.factor": 8.0,
        "model.decoder.rope_scaling.original_length": 16,
    },
}
SIZES = {
    "model.decoder.vocab_size": 384,
    "data.text_length": TEXT_LENGTH,
    "data.caption_length": LENGTH + 1,
}


@functools.cache
def tokenizer():
    """A tokenizer of every byte and a few words."""
    return train_bpe(SENTENCES * 3, 300)


@functools.cache
def trained_run(variant):
    """A run of a variant, of random parameters that end captions early."""
    made = tiny.setup(VARIANTS[variant] | SIZES)
    params = tiny.randomise(made.params)
    decoder, eos = params["decoder"], tokenizer().eos_token_id
    if "head" in decoder:
        decoder["head"] = decoder["head"].at[:, eos].multiply(1.5)
    else:
        decoder["embedding"] = decoder["embedding"].at[eos].multiply(1.6)
    return TrainedRun(made.config, tokenizer(), None, made.model, params, step=0)


def setup(variant):
    """Our model of a variant, its parameters, and its tokens' ids."""
    run = trained_run(variant)
    return run.model, run.params, caption_tokens(run.tokenizer)


@contextlib.contextmanager
def loading(root):
    """Gives `load(variant or folder, **options)`: AutoModel from such a folder without a warning.

    The folders of variants, and transformers' copies of the code, are under `root`.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
    patch.setattr(sys, "path", list(sys.path))

    def write(variant):
        folder = root / variant
        if not folder.exists():
            folder.mkdir()
            export.write_model(trained_run(variant), folder)
        return folder

    @functools.cache
    def load(which, **options):
        folder = write(which) if which in VARIANTS else which
        said = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("transformers").addHandler(handler)
        model, found = AutoModel.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )
        logging.getLogger("transformers").removeHandler(handler)
        assert not any(found.values()), found
        assert not said, said
        return model

    yield load
    patch.undo()


@functools.cache
def pixels():
    """Noise, uint8 [B, h, w, 3]."""
    return np.random.default_rng(0).integers(0, 256, (B, 16, 16, 3)).astype(np.uint8)


def pictures():
    """The same as PIL images."""
    return [Image.fromarray(image) for image in pixels()]


@functools.cache
def rows():
    """Rows `<s> words` int32 [B, R, T]."""
    words = np.random.default_rng(1).integers(10, 290, (B, R, 4)).astype(np.int32)
    words[..., 0] = tokenizer().bos_token_id
    return words


@functools.cache
def ours(variant):
    """What our model says of all these, by name."""
    model, params, _ = setup(variant)
    texts = [embedding_row(tokenizer(), text, TEXT_LENGTH) for text in TEXTS]
    text_rows, place, _ = (np.asarray(column) for column in zip(*texts, strict=True))

    def look(model):
        feature_map = model.feature_map(pixels())
        visual = model.visual_tokens(feature_map, BOXES)
        flat, written = visual.reshape(B * R, *visual.shape[2:]), rows().reshape(B * R, -1)
        return {
            "feature_map": feature_map,
            "images": model.embed_regions(feature_map, whole_image(B))[:, 0],
            "regions": model.embed_regions(feature_map, BOXES),
            "texts": model.encode_text(text_rows, place.astype(np.int32)),
            "visual": visual,
            "logits": model.caption_logits(flat, written, jnp.ones_like(written)),
        }

    found = jax.jit(lambda params: model.apply({"params": params}, method=look))(params)
    return jax.device_get(found) | {"text_rows": text_rows}


@functools.cache
def our_captions(variant, decoding):
    """Captions of the boxes by our decoding."""
    model, params, tokens = setup(variant)
    visual = ours(variant)["visual"].reshape(B * R, -1, 32)
    prompt = np.full((B * R, 1), tokens.bos, np.int32)
    run = jax.jit(lambda *inputs: generate(model, *inputs, tokens, decoding, jax.random.key(0)))
    return np.asarray(run(params, visual, prompt))


def close(found, expected, tolerance):
    """Largest difference of what is of a size that makes the tolerance mean something."""
    found = found.detach().float().numpy()
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
