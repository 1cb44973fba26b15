"""An exported folder, loaded as a user loads it, against the run that it comes from.

Both frameworks compute in fp32, from the parameters as they were written. In `convert` this file
and modeling_mmgem.py alone import torch.
"""

import contextlib
import dataclasses
import io
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import mmgem_jax
from mmgem_jax.convert.export import DTYPES
from mmgem_jax.convert.verify_samples import need
from mmgem_jax.data import images
from mmgem_jax.data.tokenizer import caption_row, embedding_row
from mmgem_jax.errors import UserError
from mmgem_jax.generate import Decoding, generate
from mmgem_jax.models.mmgem import MMGem
from mmgem_jax.models.pooling import WHOLE_IMAGE, pool
from mmgem_jax.models.vision import normalize_images
from mmgem_jax.trained_run import caption_tokens

BOUND = 1e-4  # of the largest difference of each output
# The whole image, and boxes that lie across the cells of any map.
BOXES = (WHOLE_IMAGE, (0.0, 0.0, 0.5, 0.5), (0.27, 0.11, 0.76, 0.93), (0.61, 0.34, 0.97, 0.58))
NEW_TOKENS = 16  # that the decoder alone puts after the first half of a text


# ---- the whole model -----------------------------------------------------------------------------


def verify_model(trained, folder, dtype, samples):
    """Parity of a folder of `export.write_model`.

    Args:
      trained: the TrainedRun it was written from.
      folder: the folder.
      dtype: of its tensors, a key of DTYPES.
      samples: Samples.

    Returns:
      Content for parity.json: largest differences by name of the output, and the captions.

    Raises:
      UserError: a difference is above BOUND, or a caption differs.
    """
    need("images", samples.images)
    need("texts", samples.texts)
    boxes = np.tile(np.asarray(BOXES, np.float32), (len(samples.images), 1, 1))
    length = trained.config.data.caption_length
    rows = np.stack([caption_row(trained.tokenizer, text, length)[0] for text in samples.texts])
    # Every box of an image with the same text.
    rows = np.resize(rows, (len(boxes), length))[:, None].repeat(len(BOXES), axis=1)
    ours, captions = our_outputs(trained, dtype, samples, boxes, rows)
    theirs, their_captions = torch_outputs(folder, samples, boxes, rows)
    real = rows != trained.tokenizer.pad_token_id
    for outputs in (ours, theirs):
        outputs["caption_logits"] = outputs["caption_logits"][real]
    return checked(ours, theirs, captions, their_captions, samples, dtype) | {"boxes": len(BOXES)}


def our_outputs(trained, dtype, samples, boxes, rows):
    """Outputs by name, and the captions of all boxes, of the run in fp32."""
    model, params = in_fp32(trained.model), as_written(trained.params, dtype)
    data, tokenizer, grids = trained.config.data, trained.tokenizer, model.config
    pixels = decoded(trained, samples)
    texts = [embedding_row(tokenizer, text, data.text_length)[:2] for text in samples.texts]
    tokens, place = (np.asarray(column, np.int32) for column in zip(*texts, strict=True))
    flat = rows.reshape(-1, rows.shape[-1])
    segment_ids = (flat != tokenizer.pad_token_id).astype(np.int32)

    def outputs(model):
        feature_map = model.feature_map(pixels)
        regions = model.embed_regions(feature_map, boxes)
        visual = model.visual_tokens(feature_map, boxes)
        flat_visual = visual.reshape(-1, *visual.shape[2:])
        logits = model.caption_logits(flat_visual, flat, segment_ids)
        return {
            "feature_map": feature_map,
            "pooled_embedding_grid": pool(feature_map, boxes, grids.embedding_grid),
            "pooled_generation_grid": pool(feature_map, boxes, grids.generation_grid),
            "image_embeddings": model.encode_image(pixels),
            "region_embeddings": regions,
            "text_embeddings": model.encode_text(tokens, place),
            "visual_tokens": visual,
            "caption_logits": logits.reshape(*rows.shape, -1),
        }

    special, decoding = caption_tokens(tokenizer), Decoding(length=data.caption_length - 1)

    @jax.jit
    def compute(params):
        found = model.apply({"params": params}, method=outputs)
        visual = found["visual_tokens"].reshape(-1, *found["visual_tokens"].shape[2:])
        prompt = jnp.full((len(visual), 1), special.bos, jnp.int32)
        key = jax.random.key(0)
        return found, generate(model, params, visual, prompt, special, decoding, key)

    with jax.default_matmul_precision("highest"):
        found, ids = jax.device_get(compute(params))
    return found, [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@torch.no_grad()
def torch_outputs(folder, samples, boxes, rows):
    """The same of the folder, in PyTorch."""
    with own_module_cache():
        model = loaded(AutoModel, folder, trust_remote_code=True)
        pictures = [Image.open(io.BytesIO(encoded)) for encoded in samples.images]
        feature_map = model.feature_map(pictures)
        regions, tokens = torch.from_numpy(boxes), torch.from_numpy(rows.astype(np.int64))
        their_pool = sys.modules[type(model).__module__].pool
        outputs = {
            "feature_map": feature_map,
            "pooled_embedding_grid": their_pool(feature_map, regions, model.config.embedding_grid),
            "pooled_generation_grid": their_pool(
                feature_map, regions, model.config.generation_grid
            ),
            "image_embeddings": model.encode_image(pictures),
            "region_embeddings": model.encode_regions(pictures, boxes),
            "text_embeddings": model.encode_text(samples.texts),
            "visual_tokens": model.visual_tokens(pictures, boxes),
            "caption_logits": model.caption_logits(pictures, boxes, tokens),
        }
        captions = model.generate_caption(pictures, boxes)
    outputs = {name: value.numpy() for name, value in outputs.items()}
    return outputs, [caption for of_image in captions for caption in of_image]


# ---- a tower -------------------------------------------------------------------------------------


@torch.no_grad()
def verify_decoder(trained, folder, dtype, samples):
    """Parity of a folder of `export.write_decoder`: logits, and how texts go on; see above."""
    need("texts", samples.texts)
    model, params = in_fp32(trained.model), as_written(trained.params, dtype)
    tokenizer, special = trained.tokenizer, caption_tokens(trained.tokenizer)
    length = trained.config.data.caption_length
    rows = np.stack([caption_row(tokenizer, text, length)[0] for text in samples.texts])
    real = rows != special.pad
    first_half = np.arange(length) < (real.sum(axis=1, keepdims=True) + 1) // 2
    prompts = np.where(first_half, rows, special.pad)
    theirs = loaded(AutoModelForCausalLM, folder)
    decoding = Decoding(length=NEW_TOKENS)

    @jax.jit
    def compute(params):
        def logits(model):
            nothing = jnp.zeros((len(rows), 0, model.config.decoder.width))
            return nothing, model.caption_logits(nothing, rows, real.astype(np.int32))

        nothing, found = model.apply({"params": params}, method=logits)
        key = jax.random.key(0)
        return found, generate(model, params, nothing, prompts, special, decoding, key)

    with jax.default_matmul_precision("highest"):
        found, ids = jax.device_get(compute(params))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    their_texts = continuations(theirs, folder, [row[row != special.pad] for row in prompts])
    logits = theirs(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
    outputs = {"logits": found[real]}, {"logits": logits[real]}
    return checked(*outputs, texts, their_texts, samples, dtype)


def continuations(model, folder, prompts):
    """What a folder's Llama and tokenizer put after each prompt, greedily."""
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), []
    for prompt in prompts:
        prompt = torch.from_numpy(prompt.astype(np.int64))[None]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        row = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        texts.append(tokenizer.decode(row[0, prompt.shape[1] :], skip_special_tokens=True))
    return texts


@torch.no_grad()
def verify_vision(trained, folder, dtype, samples):
    """Parity of a folder of `export.write_vision`: the feature map; see above."""
    need("images", samples.images)
    model, params = in_fp32(trained.model), as_written(trained.params, dtype)
    config, pixels = model.config, decoded(trained, samples)
    normal = normalize_images(pixels, config.image_mean, config.image_std, "float32")
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p: model.apply({"params": p}, pixels, method=MMGem.feature_map))(
            params
        )
    theirs = loaded(AutoModel, folder)
    states = theirs(torch.from_numpy(np.array(normal)).permute(0, 3, 1, 2)).last_hidden_state
    cells = theirs.post_layernorm(states[:, 1:]).numpy().reshape(ours.shape)
    ours = {"feature_map": np.asarray(ours)}
    return checked(ours, {"feature_map": cells}, [], [], samples, dtype)


# ---- what they share -----------------------------------------------------------------------------


def decoded(trained, samples):
    """The images as the model reads them, uint8 [B, h, w, 3]."""
    size = trained.config.model.vision.image_size
    return np.stack(
        [images.resize_and_crop(images.decode(encoded), size) for encoded in samples.images]
    )


def in_fp32(model):
    """The model with all its computation in fp32."""
    config = model.config
    towers = {
        name: dataclasses.replace(getattr(config, name), dtype="float32")
        for name in ("vision", "decoder")
    }
    return MMGem(dataclasses.replace(config, **towers))


def as_written(params, dtype):
    """The parameters, fp32, with the values that the dtype has left of them."""
    # Outside jit, where XLA would take the two conversions for none.
    return jax.tree.map(lambda x: x.astype(DTYPES[dtype]).astype(jnp.float32), params)


def loaded(auto, folder, **options):
    """The folder's model in fp32; UserError where its names are not those of the model's class."""
    model, found = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    for kind, names in found.items():
        if names:
            raise UserError(f"verification: {kind}: found {sorted(names)}; expected none")
    return model.eval()


@contextlib.contextmanager
def own_module_cache():
    """The folder's code is imported by way of a temporary folder, not the user's own cache."""
    cache, path, modules = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        dynamic_module_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = cache, path
            for name in set(sys.modules) - modules:
                if name.startswith("transformers_modules"):
                    del sys.modules[name]


def checked(ours, theirs, captions, their_captions, samples, dtype):
    """What parity.json says of equal outputs; UserError where they are not."""
    # In the order of the computation: the first that is off says where to look.
    differences = {name: difference(ours[name], value) for name, value in theirs.items()}
    for name, found in differences.items():
        if not found <= BOUND:
            raise UserError(
                f"verification: {name}: found a difference of {found:.3g} between JAX and PyTorch; "
                f"expected at most {BOUND:g}"
            )
    pairs = list(zip(captions, their_captions, strict=True))
    for expected, found in pairs:
        if found != expected:
            raise UserError(
                f"verification: greedy text: found {found!r} in PyTorch; expected {expected!r}"
            )
    return {
        "bound": BOUND,
        "largest_difference": differences,
        "greedy_texts_equal": sum(expected == found for expected, found in pairs),
        "greedy_texts": captions,
        "written_dtype": dtype,
        "computed_in": "float32",
        "images": len(samples.images),
        "texts": len(samples.texts),
        "samples": samples.source,
        "versions": {
            "mmgem_jax": mmgem_jax.__version__,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def difference(ours, theirs):
    """The largest difference of two arrays; infinite where their shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max())
