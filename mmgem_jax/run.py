"""What a run is made of before it takes a step: a checked config, mesh, tokenizer and model."""

from pathlib import Path

import jax
import numpy as np

from mmgem_jax import sharding
from mmgem_jax.config_checks import check_fields, check_together
from mmgem_jax.data.pipeline import packings
from mmgem_jax.data.sources import regions_an_image, sources
from mmgem_jax.data.tfds_records import find_builder
from mmgem_jax.data.tokenizer import load_tokenizer, padded_vocab_size
from mmgem_jax.errors import UserError
from mmgem_jax.models.attention import LANES
from mmgem_jax.models.decoder import DecoderConfig
from mmgem_jax.models.mmgem import MMGem, MMGemConfig
from mmgem_jax.models.rotary import RopeScaling
from mmgem_jax.models.row_attention import FAST_MEMORY, fast_memory
from mmgem_jax.models.vision import VisionConfig
from mmgem_jax.run_folder import find_run

TEXT_LENGTHS = ("text_length", "caption_length")


def build_model(config):
    """The model of `config.model`.

    Raises:
      UserError: sizes that do not fit together.
    """
    fields = config.to_dict()
    try:
        fields["vision"] = VisionConfig(**fields["vision"])
        fields["decoder"]["rope_scaling"] = RopeScaling(**fields["decoder"]["rope_scaling"])
        fields["decoder"] = DecoderConfig(**fields["decoder"])
        return MMGem(MMGemConfig(**fields))
    except ValueError as error:
        raise UserError(f"model.{error}") from None


def load_run_tokenizer(config, workdir=None):
    """The tokenizer that `config.data` names, or that of `init_from`, or of the data set.

    Args:
      config: the whole config.
      workdir: of the run. Where it has begun, its own copy stands for that of `init_from`.

    Raises:
      UserError: a field of the config is wrong, or there is no tokenizer.
    """
    check_fields(config)  # here too: nothing else has looked at the config yet
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    if not config.init_from:
        folder = data_set_folder(config.data)
    elif workdir and (Path(workdir) / "tokenizer").is_dir():
        folder = Path(workdir)
    else:
        folder, _ = find_run(config.init_from)
    return load_tokenizer(str(folder / "tokenizer"))


def data_set_folder(data):
    """The folder of `config.data.name`, in which its tokenizer is."""
    if not data.name and (data.files or data.mixture):
        what = "data.files" if data.files else "a mixture"
        raise UserError(
            f"data.tokenizer: empty, as data.name is; with {what} expected a folder or a hub name"
        )
    return find_builder(data).data_path


def complete(config, tokenizer):
    """The config with what the tokenizer and the run's length decide filled in.

    Raises:
      UserError: a field that is wrong, or fields that do not fit together.
    """
    check_fields(config)
    config = config.copy_and_resolve_references()
    needed = padded_vocab_size(tokenizer)
    decoder = config.model.decoder
    if decoder.vocab_size and decoder.vocab_size < needed:
        raise UserError(
            f"model.decoder.vocab_size: {decoder.vocab_size} is below the {needed} that the "
            "tokenizer needs"
        )
    decoder.vocab_size = decoder.vocab_size or needed
    with config.optimizer.unlocked():
        config.optimizer.total_steps = config.steps
    check_together(config)
    build_model(config.model)  # raises where its sizes do not fit
    return config


def only_evaluate(config):
    """Makes an evaluation's batch the only one of a config: whole, of padded rows."""
    config.batch_size, config.accumulation_steps = config.eval.batch_size, 1
    config.data.packing.images = 0


def keep_programs(config):
    """Has JAX keep compiled programs where the config says, if it names a folder.

    But not those of several processes on CPUs. There the first alone would find what was kept, the
    others compile it anew, and the two need not send in the same order.
    """
    alike = jax.process_count() == 1 or jax.default_backend() != "cpu"
    if config.compile_cache and alike:
        jax.config.update("jax_compilation_cache_dir", config.compile_cache)


def check_mesh(config, mesh):
    """Raises UserError where the mesh does not divide the batch or the heads."""
    shards, model = sharding.head_shards(mesh), config.model
    heads = {
        "vision.heads": model.vision.heads,
        "decoder.heads": model.decoder.heads,
        "decoder.kv_heads": model.decoder.kv_heads,
    }
    for name, count in heads.items():
        if count % shards:
            raise UserError(
                f"mesh: model.{name} is {count}; expected a multiple of the {shards} parts that "
                f"the mesh {dict(mesh.shape)} splits heads into"
            )
    for problem in rows_problems(config, shards).values():
        raise UserError(problem)
    shards = sharding.batch_shards(mesh)
    for name, size in (("", config.batch_size), ("eval.", config.eval.batch_size)):
        if size % shards:
            raise UserError(
                f"{name}batch_size: {size} is not a multiple of the {shards} parts that the mesh "
                f"{dict(mesh.shape)} splits a batch into"
            )
    images, parts = config.data.packing.images, config.accumulation_steps
    units = config.batch_size // images if images else config.batch_size
    if units % (shards * parts):
        found = f"batch_size: {config.batch_size}"
        found += f", in {units} groups of data.packing.images {images}," if images else ""
        raise UserError(
            f"{found} is not a multiple of the {shards} parts that the mesh {dict(mesh.shape)} "
            f"splits a batch into, times accumulation_steps {parts}"
        )


def rows_problems(config, head_shards):
    """Why attention by whole rows does not take a tower's rows or heads, by the tower's name."""
    vision, decoder = config.model.vision, config.model.decoder
    towers = {
        "vision": ((vision.image_size // vision.patch_size) ** 2 + 1, vision.width // vision.heads),
        "decoder": (longest_row(config), decoder.head_dim),
    }
    found = {}
    for name, (tokens, head_dim) in towers.items():
        tower = config.model[name]
        kv_heads = tower.get("kv_heads", tower.heads)
        asked = f"model.{name}.attention: rows, with {kv_heads // head_shards} heads of {head_dim}"
        if tower.attention != "rows":
            continue
        if LANES % head_dim or kv_heads // head_shards * head_dim % LANES:
            found[name] = (
                f"{asked} on a device; expected heads that fill whole registers of {LANES} lanes, "
                "or another attention"
            )
            continue
        itemsize = np.dtype(tower.dtype).itemsize
        needed = fast_memory(tokens, tower.heads // kv_heads, itemsize, causal=name == "decoder")
        if needed > FAST_MEMORY:
            found[name] = (
                f"{asked} and rows of {tokens} tokens in {tower.dtype}: about "
                f"{needed / 2**20:.1f} MiB of fast memory; expected at most "
                f"{FAST_MEMORY / 2**20:g}, or another attention"
            )
    return found


def longest_row(config):
    """Tokens of the longest rows that the decoder is trained on, visual tokens included."""
    data = sources(config.data).values()
    if config.data.packing.images:
        return max(source.packing.row_length for source in data)
    texts = [source[name] for source in data for name in TEXT_LENGTHS]
    return max(texts) + config.model.generation_grid**2


def batch_shapes(config, source=None):
    """Shapes of a global batch of a source; the first if None.

    See the top of mmgem_jax/objective.py, and where rows are packed of mmgem_jax/data/packing.py.
    """
    B, size = config.batch_size, config.model.vision.image_size
    found = sources(config.data)
    name = next(iter(found)) if source is None else source
    data, packing = found[name], packings(config)[name]
    R = regions_an_image(data)
    shapes = {
        "image": ((B, size, size, 3), np.uint8),
        "boxes": ((B, R, 4), np.float32),
        "region_mask": ((B, R), np.bool_),
        "group_ids": ((B, R, 2), np.int32),
        "truncated": ((B, R, 2), np.bool_),
        "region_counts": ((B, 4), np.int32),
        "source": ((B,), np.int32),
    }
    if packing:
        shapes |= packed_shapes(packing, B, R)
    else:
        shapes |= {
            "text_tokens": ((B, R, data.text_length), np.int32),
            "embed_index": ((B, R), np.int32),
            "caption_tokens": ((B, R, data.caption_length), np.int32),
            "caption_length": ((B, R), np.int32),
        }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def packed_shapes(packing, B, R):
    """The entries of `batch_shapes` that padded rows do not have."""
    A = B // packing.images
    row, target = (A * packing.rows, packing.row_length), (A, packing.targets)
    mixed = A * (packing.rows - packing.text_rows), packing.row_length
    return {
        "tokens": (row, np.int32),
        "segment_ids": (row, np.int32),
        "positions": (row, np.int32),
        "visual_index": (mixed, np.int32),
        "embed_place": ((B, R), np.int32),
        "target_place": (target, np.int32),
        "targets": (target, np.int32),
        "target_mask": (target, np.bool_),
        "data_position": ((A, 1 + packing.waiting), np.int32),
    }
