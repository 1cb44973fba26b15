"""A Llama in a GGUF file, as if it were a folder of Hugging Face's: names, shapes, config.

Source: the GGUF specification (docs/gguf.md of ggml) and llama.cpp's convert_hf_to_gguf.py.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np

from mmgem_jax.convert.source import Source, Tensor
from mmgem_jax.errors import UserError, first_line

# GGUF's name: Hugging Face's.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent where it is the embedding
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def open_gguf(path: Path) -> Source:
    """What the GGUF file of a Llama holds; a tensor is dequantised when it is read.

    Raises:
      UserError: the package gguf is not installed, the file is damaged, or it holds something
        else than one whole Llama.
    """
    reader, metadata = _opened(path)
    _check_kind(path, metadata)
    shapes = {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape))
        for tensor in reader.tensors
    }
    config = _config(path, metadata, shapes)
    heads_of = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    tensors = {}
    for tensor in reader.tensors:
        name, shape = tensor.name, shapes[tensor.name]
        heads = heads_of.get(name.split(".", 2)[-1])
        if heads and shape[0] != heads * config["head_dim"]:
            raise UserError(
                f"{path}: tensor {name}: found {shape[0]} rows; expected {heads} heads of "
                f"{config['head_dim']}"
            )
        place = (tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes))
        read = functools.partial(_read, path, name, shape, place, heads)
        tensors[_their_name(path, name)] = Tensor(shape, read)
    return Source(path, config, tensors, path.stat().st_size)


def undo_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, ...] of a query or key matrix, in Hugging Face's order.

    RoPE turns pairs of rows. Hugging Face pairs row i of a head with row i + head_dim / 2;
    llama.cpp puts the two of a pair next to each other.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _gguf():
    try:
        import gguf
    except ImportError:
        raise UserError(
            "gguf: the package is not installed, expected it for *.gguf files "
            "(pip install 'mmgem_jax[gguf]')"
        ) from None
    return gguf


def _opened(path: Path):
    """The reader and its metadata. It maps the file, so that it must not outlive the opening."""
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith(("general.", "llama.", "split."))
        }
    except Exception as error:  # it trusts the file: a damaged one ends in errors of any kind
        raise UserError(f"{path}: expected a whole GGUF file ({first_line(error)})") from error
    if reader.byte_order != "I":
        raise UserError(f"{path}: found the other byte order; expected this machine's")
    return reader, metadata


def _check_kind(path: Path, metadata: dict):
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture: found {architecture!r}; expected llama")
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: found one of {metadata['split.count']} parts; expected a whole file "
            "(join them with llama.cpp's llama-gguf-split --merge)"
        )


def _their_name(path: Path, name: str) -> str:
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}"
    if name in NAMES:
        return NAMES[name]
    if name == "rope_freqs.weight":
        raise UserError(
            f"{path}: found {name}, a table of RoPE's scaling without the settings that made it "
            "(Llama 3.1 and later); expected a model without, or its folder of safetensors"
        )
    raise UserError(f"{path}: found tensor {name!r}; expected a plain Llama's tensors alone")


def _config(path: Path, metadata: dict, shapes: dict) -> dict:
    """The fields of a LlamaForCausalLM's config.json."""

    def field(key, kind, default=None):
        value = metadata.get(f"llama.{key}", default)
        if type(value) is not kind or not value > 0:
            raise UserError(f"{path}: llama.{key}: found {value}; expected {kind.__name__} above 0")
        # The file has float32: 1e-05 in it is 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else value

    if len(shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{path}: found no matrix token_embd.weight; expected it")
    width, heads = field("embedding_length", int), field("attention.head_count", int)
    head_dim = field("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := field(key, int, head_dim)) != head_dim:
            raise UserError(f"{path}: llama.{key}: found {found}; expected {head_dim}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length", int),
        "num_hidden_layers": field("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(metadata, field),
        "max_position_embeddings": field("context_length", int),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _rope_parameters(metadata: dict, field) -> dict:
    """RoPE as config.json says it; kinds that we lack are handed on under their own name."""
    rope = {"rope_theta": field("rope.freq_base", float, 10000.0)}
    if "llama.rope.scale_linear" in metadata:  # the older name
        return rope | {"rope_type": "linear", "factor": field("rope.scale_linear", float)}
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return rope | {"rope_type": "default"}
    rope |= {"rope_type": kind, "factor": field("rope.scaling.factor", float)}
    if "llama.rope.scaling.original_context_length" in metadata:
        original = field("rope.scaling.original_context_length", int)
        rope["original_max_position_embeddings"] = original
    return rope


def _read(path: Path, name: str, shape, place, heads: int | None) -> np.ndarray:
    """One tensor of the file.

    Args:
      place: its quantisation, where its bytes begin, and how many there are.
      heads: of a query or key matrix, else None.
    """
    kind, offset, size = place
    try:
        packed = np.fromfile(path, np.uint8, size, offset=offset)
        rows = packed.reshape(math.prod(shape[:-1]), -1)
        values = _gguf().dequantize(rows, kind).reshape(shape)
    except (NotImplementedError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: tensor {name}: cannot be read as {kind.name} ({first_line(error)})"
        ) from error
    return undo_permutation(values, heads) if heads else values
