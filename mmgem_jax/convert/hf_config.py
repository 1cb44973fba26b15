"""Hugging Face's config.json of CLIP and Llama, and the fields of our configs, both ways.

What our towers do not compute is refused here, before any weight is read.
"""

import copy
import dataclasses
import math

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig

from mmgem_jax.errors import UserError
from mmgem_jax.models.layers import ACTIVATIONS
from mmgem_jax.models.rotary import RopeScaling

# Fields that a type of rope scaling reads; a config may say anything in the others.
ROPE_FIELDS = {
    "none": ("type",),
    "linear": ("type", "factor"),
    "llama3": tuple(field.name for field in dataclasses.fields(RopeScaling)),
}
ROPE_TYPES = ("default", "linear", "llama3")  # theirs, that our decoder computes
LEFT_TO_THE_CALLER = ("vocab_size",)  # ours is padded, and has tokens of its own


# ---- theirs to ours ------------------------------------------------------------------------------


def vision_fields(config):
    """Fields of our VisionConfig, from what config.json says.

    Args:
      config: the content of the config.json of a `CLIPVisionModel` or a `CLIPModel`.

    Returns:
      image_size, patch_size, width, depth, heads, mlp, activation and norm_epsilon.

    Raises:
      UserError: another model, or one that our vision transformer cannot compute.
    """
    expect(config, "model_type", ("clip", "clip_vision_model"))
    if config["model_type"] == "clip":
        # Older files have both; CLIPConfig lets the second change the first.
        parts = {name: config.get(name) or {} for name in ("vision_config", "vision_config_dict")}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise UserError(f"config.json: {name}: found {part!r}; expected an object")
        config = parts["vision_config"] | parts["vision_config_dict"]
    theirs = parsed(CLIPVisionConfig, config)
    expect(theirs, "num_channels", (3,))
    expect(theirs, "hidden_act", tuple(ACTIVATIONS))
    for name in ("image_size", "patch_size"):
        if not isinstance(theirs[name], int):
            raise UserError(f"config.json: {name}: found {theirs[name]!r}; expected one number")
    return {
        "image_size": theirs["image_size"],
        "patch_size": theirs["patch_size"],
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "mlp": theirs["intermediate_size"],
        "activation": theirs["hidden_act"],
        "norm_epsilon": float(theirs["layer_norm_eps"]),
    }


def decoder_fields(config):
    """Fields of our DecoderConfig, from what config.json says.

    Args:
      config: the content of the config.json of a `LlamaForCausalLM`.

    Returns:
      width, depth, heads, kv_heads, head_dim, mlp, rope_theta, rope_scaling (a dict of the fields
      of RopeScaling), norm_epsilon, tie_embeddings; and vocab_size, theirs, not padded.

    Raises:
      UserError: another model, or one that our decoder cannot compute.
    """
    expect(config, "model_type", ("llama",))
    for name in ("rope_scaling", "rope_parameters"):  # as they are written: the old and the new
        rope = config.get(name)
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type", "default"))
            expect({f"{name}.rope_type": kind}, f"{name}.rope_type", ROPE_TYPES)
            if kind == "default":  # a factor of no type scales nothing, and was meant to
                expect({f"{name}.factor": rope.get("factor", 1)}, f"{name}.factor", (1,))
    theirs = parsed(LlamaConfig, config)
    expect(theirs, "hidden_act", ("silu",))
    expect(theirs, "attention_bias", (False,))
    expect(theirs, "mlp_bias", (False,))
    expect(theirs, "sliding_window", (None,))
    rope = theirs["rope_parameters"]
    expect(rope, "partial_rotary_factor", (None, 1))
    return {
        "vocab_size": theirs["vocab_size"],
        "width": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "heads": theirs["num_attention_heads"],
        "kv_heads": theirs["num_key_value_heads"],
        "head_dim": theirs["head_dim"],
        "mlp": theirs["intermediate_size"],
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": dataclasses.asdict(rope_scaling(rope)),
        "norm_epsilon": float(theirs["rms_norm_eps"]),
        "tie_embeddings": theirs["tie_word_embeddings"],
    }


def rope_scaling(rope):
    """Our RopeScaling of the `rope_parameters` of a LlamaConfig.

    Raises:
      UserError: numbers that make none.
    """
    try:
        if rope["rope_type"] == "default":
            return RopeScaling()
        if rope["rope_type"] == "linear":
            return RopeScaling("linear", float(rope["factor"]))
        return RopeScaling(
            type="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_length=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"config.json: rope_parameters: found {rope}; expected all of what "
            f"{rope['rope_type']!r} needs ({one_line(error)})"
        ) from None


def expect(config, name, known):
    """Raises UserError where a field is none of the known values."""
    found = config.get(name)
    if found not in known:
        values = " or ".join(repr(value) for value in known if value is not None)
        found = repr(found) if name in config else "nothing"
        raise UserError(f"config.json: {name}: found {found}; expected {values or 'none'}")


def parsed(kind, config):
    """All fields of a config class of transformers, with its defaults and its spellings.

    Raises:
      UserError: the class does not take the values.
    """
    try:
        # A copy: the class writes into the dicts that it is given.
        return vars(kind(**copy.deepcopy(config)))
    except (StrictDataclassError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"config.json: found what {kind.__name__} does not take ({one_line(error)}); expected "
            f"the config of a {kind.model_type} model"
        ) from None


def one_line(error):
    """What an error says, in one line."""
    return " ".join(str(error).split())


# ---- against our config --------------------------------------------------------------------------


def check_fields(found, config, name, source, ignore=()):
    """Compares what config.json says with a tower of our config.

    Args:
      found: of `vision_fields` or `decoder_fields`.
      config: `config.model.vision` or `config.model.decoder`.
      name: "vision" or "decoder".
      source: the file or folder, for the message.
      ignore: names of fields that may differ, besides vocab_size.

    Raises:
      UserError: every field that differs, and the overrides that make it fit.
    """
    wrong, overrides = [], []
    for field, theirs in flat(found).items():
        if field.partition(".")[0] in (*ignore, *LEFT_TO_THE_CALLER):
            continue
        ours = config
        for part in field.split("."):
            ours = ours[part]
        if not same(ours, theirs):
            wrong.append(f"model.{name}.{field} is {ours}; the weights have {theirs}")
            overrides.append(f"--config.model.{name}.{field}={theirs}")
    if wrong:
        raise UserError(
            f"{source}: {'; '.join(wrong)}; expected the sizes of the weights: "
            f"{' '.join(overrides)}"
        )


def flat(found):
    """The fields by dotted name; of the rope scaling those that its type reads."""
    fields = {}
    for name, value in found.items():
        if name == "rope_scaling":
            fields |= {f"{name}.{inner}": value[inner] for inner in ROPE_FIELDS[value["type"]]}
        else:
            fields[name] = value
    return fields


def same(ours, theirs):
    """Whether two values are equal; floats as far as fp32 tells, which some files keep."""
    if isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


# ---- ours to theirs ------------------------------------------------------------------------------


def clip_config(vision):
    """The config.json of a `CLIPVisionModel` of this VisionConfig."""
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_epsilon,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }


def llama_config(decoder, bos=None, eos=None, pad=None):
    """The config.json of a `LlamaForCausalLM` of this DecoderConfig.

    Rotary positions are spelt as `rope_theta` and `rope_scaling`, which old and new readers know.

    Args:
      decoder: DecoderConfig.
      bos: id of the token that begins a text.
      eos: id of the token that ends it.
      pad: id of the padding.
    """
    scaling = decoder.rope_scaling
    rope = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_length
    stretched = scaling.type != "none"
    # A bound that readers check and that changes no output.
    length = scaling.original_length if scaling.type == "llama3" else 2048
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_epsilon,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": rope if stretched else None,
        "max_position_embeddings": round(length * scaling.factor) if stretched else length,
        "tie_word_embeddings": decoder.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
    }
