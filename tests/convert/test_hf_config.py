"""config.json of CLIP and Llama, against transformers' own classes; and what is refused."""

import copy
import json
import re

import base
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax.linen import meta
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mmgem_jax import objective, run
from mmgem_jax.convert import hf_config
from mmgem_jax.convert.table import decoder_places, to_weights, vision_places
from mmgem_jax.errors import UserError
from mmgem_jax.models.rotary import RopeScaling

# What such files say, shortened: SmolLM2-135M, Llama 3.2 1B, a Llama 2 with linear scaling.
SMOLLM2 = json.loads("""
{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
"initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
"max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
"num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings":
true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
"vocab_size": 49152}
""")
LLAMA3 = json.loads("""
{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act":
"silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
"max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
"rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
"low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}
""")
LLAMA2 = json.loads("""
{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
"intermediate_size": 11008, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers":
32, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4, "type": "linear"},
"vocab_size": 32000}
""")
# ViT-L/14 and ViT-B/32 of CLIP, which leave out or say twice what CLIP has by default.
VIT_L = json.loads("""
{"architectures": ["CLIPModel"], "logit_scale_init_value": 2.6592, "model_type": "clip",
"projection_dim": 768, "text_config": {"hidden_size": 768, "num_attention_heads": 12,
"torch_dtype": null}, "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
"torch_dtype": "float32", "vision_config": {"attention_dropout": 0.0, "bad_words_ids": null,
"dropout": 0.0, "hidden_size": 1024, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
"intermediate_size": 4096, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05,
"max_length": 20, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_beams": 1,
"num_hidden_layers": 24, "patch_size": 14, "pruned_heads": {}, "return_dict": true, "torch_dtype":
null, "transformers_version": "4.16.0.dev0", "use_bfloat16": false}, "vision_config_dict":
{"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}}
""")
VIT_B = {"model_type": "clip", "vision_config": {"dropout": 0.0}, "vision_config_dict": None}

VIT_L_FIELDS = {
    "image_size": 224,
    "patch_size": 14,
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "mlp": 4096,
    "activation": "quick_gelu",
    "norm_epsilon": 1e-5,
}
SMOLLM2_FIELDS = {
    "vocab_size": 49152,
    "width": 576,
    "depth": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "mlp": 1536,
    "rope_theta": 100000.0,
    "rope_scaling": {
        "type": "none",
        "factor": 1.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 8192,
    },
    "norm_epsilon": 1e-5,
    "tie_embeddings": True,
}


# ---- theirs to ours ------------------------------------------------------------------------------


def test_vision_fields_of_published_files():
    assert hf_config.vision_fields(VIT_L) == VIT_L_FIELDS
    alone = VIT_L["vision_config"] | {"image_size": 336, "hidden_act": "gelu"}
    found = hf_config.vision_fields(alone)
    assert found == VIT_L_FIELDS | {"image_size": 336, "activation": "gelu"}
    defaults = {"patch_size": 32, "width": 768, "depth": 12, "heads": 12, "mlp": 3072}
    assert hf_config.vision_fields(VIT_B) == VIT_L_FIELDS | defaults


def test_decoder_fields_of_published_files():
    before = copy.deepcopy(LLAMA3)
    found = hf_config.decoder_fields(SMOLLM2)
    assert found == SMOLLM2_FIELDS and type(found["rope_theta"]) is float
    found = hf_config.decoder_fields(LLAMA3)
    assert RopeScaling(**found["rope_scaling"]) == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (found["rope_theta"], found["kv_heads"], found["head_dim"]) == (500_000.0, 8, 64)
    assert before == LLAMA3
    found = hf_config.decoder_fields(LLAMA2)
    assert RopeScaling(**found["rope_scaling"]) == RopeScaling("linear", 4.0)
    assert (found["rope_theta"], found["kv_heads"], found["head_dim"]) == (10_000.0, 32, 128)
    assert (found["norm_epsilon"], found["tie_embeddings"]) == (1e-6, False)


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA3, LLAMA2])
def test_the_new_spelling_of_rotary_positions_says_the_same(config):
    written = json.loads(LlamaConfig.from_dict(copy.deepcopy(config)).to_json_string())
    assert "rope_parameters" in written and "rope_theta" not in written
    assert hf_config.decoder_fields(written) == hf_config.decoder_fields(config)


def refused(fields, config, message):
    with pytest.raises(UserError, match=rf"^config\.json: {message}") as error:
        fields(copy.deepcopy(config))
    assert "\n" not in str(error.value) and "; expected " in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, "model_type: found 'siglip'; expected 'clip' or 'clip_vision"),
        ({"num_channels": 1}, "num_channels: found 1; expected 3"),
        ({"hidden_act": "gelu_new"}, "hidden_act: found 'gelu_new'; expected 'gelu' or 'quick_g"),
        ({"image_size": [224, 98]}, r"image_size: found \[224, 98\]; expected one number"),
        ({"hidden_size": "x"}, "found what CLIPVisionConfig does not take .*hidden_size"),
        ({"num_attention_heads": 5}, "found what CLIPVisionConfig does not take .*multiple"),
    ],
)
def test_a_clip_that_our_vision_transformer_is_not(changes, message):
    refused(hf_config.vision_fields, VIT_L["vision_config"] | changes, message)
    if "model_type" not in changes:
        refused(hf_config.vision_fields, VIT_L | {"vision_config_dict": changes}, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type: found 'mistral'; expected 'llama'"),
        ({"model_type": "qwen2"}, "model_type: found 'qwen2'; expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias: found True; expected False"),
        ({"mlp_bias": True}, "mlp_bias: found True; expected False"),
        ({"sliding_window": 64}, "sliding_window: found 64; expected none"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5; expected 1"),
        ({"rope_scaling": {"type": "linear"}}, "found .*factor"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor: found 2.0; expected 1"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_parameters: found .*'x'"),
        ({"rope_scaling": "linear"}, "found what LlamaConfig does not take"),
        ({"hidden_size": "576"}, "found what LlamaConfig does not take .*hidden_size"),
        ({"num_attention_heads": 0}, "found what LlamaConfig does not take .*zero"),
    ],
)
def test_a_llama_that_our_decoder_is_not(changes, message):
    refused(hf_config.decoder_fields, SMOLLM2 | changes, message)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "proportional"])
def test_rotary_positions_that_our_decoder_does_not_have(kind):
    expected = f"rope_type: found '{kind}'; expected 'default' or 'linear' or 'llama3'"
    for name, spelling in [("rope_scaling", "type"), ("rope_parameters", "rope_type")]:
        changes = {name: {spelling: kind, "factor": 2.0}}
        refused(hf_config.decoder_fields, SMOLLM2 | changes, rf"{name}\.{expected}")


@pytest.mark.parametrize("fields", [hf_config.vision_fields, hf_config.decoder_fields])
def test_a_config_that_names_no_model(fields):
    refused(fields, {"hidden_size": 64}, "model_type: found nothing; expected '")


# ---- against our config --------------------------------------------------------------------------


def test_a_config_that_fits_the_weights_passes():
    config = base.get_config().model
    found = {**VIT_L_FIELDS, "norm_epsilon": 9.999999747378752e-06}  # of an fp32 in a file
    hf_config.check_fields(found, config.vision, "vision", "folder")
    for name, value in SMOLLM2_FIELDS.items():
        config.decoder[name] = value
    config.decoder.vocab_size = 0
    config.decoder.rope_scaling.factor = 7.0  # which type none does not read
    hf_config.check_fields(SMOLLM2_FIELDS, config.decoder, "decoder", "folder")


def test_every_field_that_differs_is_named_with_the_overrides():
    config = base.get_config().model
    config.vision.update(width=768, activation="gelu")
    with pytest.raises(UserError) as error:
        hf_config.check_fields(VIT_L_FIELDS, config.vision, "vision", "weights/clip")
    assert str(error.value) == (
        "weights/clip: model.vision.width is 768; the weights have 1024; "
        "model.vision.activation is gelu; the weights have quick_gelu; expected the sizes of the "
        "weights: --config.model.vision.width=1024 --config.model.vision.activation=quick_gelu"
    )
    hf_config.check_fields(VIT_L_FIELDS, config.vision, "vision", "x", ("width", "activation"))


def test_rotary_positions_that_differ_are_named_part_by_part():
    decoder, found = base.get_config().model.decoder, hf_config.decoder_fields(LLAMA3)
    ignore = ("width", "depth", "kv_heads", "mlp", "tie_embeddings", "rope_theta")
    with pytest.raises(UserError) as error:
        hf_config.check_fields(found, decoder, "decoder", "x", ignore)
    assert str(error.value).endswith(
        ": --config.model.decoder.rope_scaling.type=llama3 "
        "--config.model.decoder.rope_scaling.factor=32.0"
    )
    hf_config.check_fields(found, decoder, "decoder", "x", (*ignore, "rope_scaling"))


def test_the_overrides_make_the_config_fit():
    config = base.get_config()
    found = hf_config.decoder_fields(LLAMA3)
    with pytest.raises(UserError) as error:
        hf_config.check_fields(found, config.model.decoder, "decoder", "x")
    overrides = re.findall(r"--config\.(\S+)=(\S+)", str(error.value))
    known = {"True": True, "False": False}
    for name, value in overrides:
        value = known.get(value, value)
        if isinstance(value, str) and value[0].isdigit():
            value = float(value) if "." in value else int(value)
        config.update_from_flattened_dict({name: value})
    hf_config.check_fields(found, config.model.decoder, "decoder", "x")


# ---- ours to theirs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """Shapes of our parameters of a model config, as `shapes(config)`."""

    def made(config):
        model = run.build_model(config.model)
        batch = tiny.batch(config)
        make = lambda key: meta.unbox(objective.init_params(model, batch, key))  # noqa: E731
        return model.config, jax.eval_shape(make, jax.random.key(0))

    return made


def assert_same_shapes(params, places, reference):
    """Their tensors, made of zeros of our shapes, are those of the torch model."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    found = {name: array.shape for name, array in to_weights(zeros, places)}
    expected = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    if "lm_head.weight" not in found:
        expected.pop("lm_head.weight", None)
    assert found == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "model.vision.activation": "gelu",
            "model.vision.width": 24,
            "model.vision.norm_epsilon": 1e-3,
        },
    ],
)
def test_a_vision_config_goes_round(shapes, changes):
    config = tiny.config(changes)
    model, params = shapes(config)
    written = json.loads(json.dumps(hf_config.clip_config(model.vision)))
    found = hf_config.vision_fields(written)
    hf_config.check_fields(found, config.model.vision, "vision", "x")
    assert found == {name: getattr(model.vision, name) for name in VIT_L_FIELDS}
    reference = CLIPVisionModel(CLIPVisionConfig.from_dict(written))
    assert_same_shapes(params["vision"], vision_places(model.vision), reference)
    assert written["architectures"] == [type(reference).__name__]


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling(), RopeScaling("linear", 2.5), RopeScaling("llama3", 8.0, 0.5, 3.0, 64)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_config_goes_round(shapes, scaling, tied):
    changes = {"tie_embeddings": tied, "head_dim": 16, "rope_theta": 5e4, "norm_epsilon": 1e-3}
    config = tiny.config(
        {f"model.decoder.{name}": value for name, value in changes.items()}
        | {f"model.decoder.rope_scaling.{name}": value for name, value in vars(scaling).items()}
    )
    model, params = shapes(config)
    written = json.loads(json.dumps(hf_config.llama_config(model.decoder, bos=1, eos=2, pad=100)))
    found = hf_config.decoder_fields(written)
    names = [name for name in SMOLLM2_FIELDS if name != "rope_scaling"]
    assert {name: found[name] for name in names} == {n: getattr(model.decoder, n) for n in names}
    assert RopeScaling(**found["rope_scaling"]) == model.decoder.rope_scaling == scaling
    theirs = LlamaConfig.from_dict(written)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 100)
    reference = LlamaForCausalLM(theirs)
    assert_same_shapes(params["decoder"], decoder_places(model.decoder), reference)


def test_token_ids_are_none_by_default():
    written = hf_config.llama_config(tiny.decoder_config())
    assert {written[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {None}
