"""A trained run as folders of Hugging Face's: the whole model, its decoder, its vision tower.

Each writer fills an empty folder. Tensors go to disk one at a time: beside the parameters, which
stay where they are, the host holds about one file of them.
"""

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

import mmgem_jax
from mmgem_jax.convert.hf_config import clip_config, llama_config
from mmgem_jax.convert.table import decoder_places, model_places, to_weights, vision_places
from mmgem_jax.errors import UserError
from mmgem_jax.new_folder import umask
from mmgem_jax.trained_run import caption_tokens

DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
MODELING = Path(__file__).with_name("modeling_mmgem.py")  # goes along as it is


def write_model(trained, folder, dtype="float32", max_shard_size="5GB"):
    """The whole model, for `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    Args:
      trained: a TrainedRun.
      folder: an empty folder.
      dtype: of the tensors, a key of DTYPES.
      max_shard_size: bytes of a file at most, or a text such as 5GB.

    Raises:
      UserError: float16 does not hold the parameters.
    """
    config, tokens = trained.model.config, caption_tokens(trained.tokenizer)
    ids = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.pad}
    fields = {
        "model_type": "mmgem",
        "architectures": ["MMGemModel"],
        "auto_map": {
            "AutoConfig": "modeling_mmgem.MMGemConfig",
            "AutoModel": "modeling_mmgem.MMGemModel",
        },
        "vision_config": clip_config(config.vision) | {"dtype": dtype},
        "text_config": llama_config(config.decoder, **ids) | {"dtype": dtype},
        "joint_dim": config.joint_dim,
        "embedding_grid": config.embedding_grid,
        "generation_grid": config.generation_grid,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "text_length": trained.config.data.text_length,
        "caption_length": trained.config.data.caption_length,
        **{f"{role}_token_id": number for role, number in ids.items()},
        "emb_token_id": tokens.emb,
        "used_vocab_size": tokens.vocabulary,
        "dtype": dtype,
        "mmgem_jax_version": mmgem_jax.__version__,
    }
    write_json(folder / "config.json", fields)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    write_tokenizer(trained.tokenizer, folder)
    shutil.copyfile(MODELING, folder / MODELING.name)
    write_tensors(folder, trained.params, model_places(config), dtype, max_shard_size)


def write_decoder(trained, folder, dtype="float32", max_shard_size="5GB"):
    """The decoder alone, a plain `LlamaForCausalLM`; arguments and errors of `write_model`."""
    config, tokens = trained.model.config.decoder, caption_tokens(trained.tokenizer)
    ids = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.pad}
    write_json(folder / "config.json", llama_config(config, **ids) | {"dtype": dtype})
    generation = {f"{role}_token_id": number for role, number in ids.items()}
    generation["suppress_tokens"] = never_generated(tokens, config.vocab_size)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(trained.tokenizer, folder)
    params = trained.params["decoder"]
    write_tensors(folder, params, decoder_places(config), dtype, max_shard_size)


def write_vision(trained, folder, dtype="float32", max_shard_size="5GB"):
    """The vision tower alone, a plain `CLIPVisionModel`; arguments and errors of `write_model`."""
    config = trained.model.config
    write_json(folder / "config.json", clip_config(config.vision) | {"dtype": dtype})
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    # Older readers nest the tower under this name, newer ones take it off.
    places = {f"vision_model.{name}": at for name, at in vision_places(config.vision).items()}
    write_tensors(folder, trained.params["vision"], places, dtype, max_shard_size)


def write_tokenizer(tokenizer, folder):
    """The tokenizer's files, in names that transformers 4 knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    for how_it_was_loaded in ("is_local", "local_files_only"):
        fields.pop(how_it_was_loaded, None)
    # tokenizer.json is all of it: a class of another name could build something else.
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    write_json(path, fields)


def write_tensors(folder, params, places, dtype, max_shard_size):
    """Safetensors of our parameters under Hugging Face's names, in files of at most that size.

    Raises:
      UserError: the size cannot be read, or a value is beyond what the dtype holds.
    """
    dtype = np.dtype(DTYPES[dtype])
    plan = split_state_dict_into_shards_factory(
        {name: place.their_shape(params) for name, place in places.items()},
        get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    waiting = {file: {} for file in plan.filename_to_tensors}
    for name, tensor in to_weights(params, places):
        file = plan.tensor_to_filename[name]
        waiting[file][name] = rounded(name, tensor, dtype)
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~umask())  # safetensors' is for its maker alone
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def rounded(name, tensor, dtype):
    """The tensor in the dtype; UserError where a value gets lost for being too large."""
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if not np.isfinite(result).all():
        raise UserError(
            f"--dtype {dtype}: {name} has values up to {np.abs(tensor).max():g}; expected values "
            f"of at most {jnp.finfo(dtype).max:g}"
        )
    return result


def never_generated(tokens, vocab_size):
    """Ids that no text goes on with; </s> ends one, also where it is <s> as well."""
    special = {tokens.bos, tokens.pad, tokens.emb} - {tokens.eos}
    return [*sorted(special), *range(tokens.vocabulary, vocab_size)]


def preprocessor_config(config):
    """The JSON of a `CLIPImageProcessor` nearest to `mmgem_jax.data.images`.

    It drops transparency, and crops an odd margin a pixel further on.
    """
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def write_json(path, fields):
    """A JSON file for people to read."""
    path.write_text(json.dumps(fields, indent=2) + "\n")
