"""GGUF files that ggml's own writer made of random Llamas, against transformers' reading."""

import re
import sys

import gguf
import jax
import numpy as np
import pytest
import tiny
from torch_llama import from_torch, torch_model
from transformers import AutoModelForCausalLM

from mmgem_jax.convert.gguf_file import undo_permutation
from mmgem_jax.convert.table import decoder_places, to_params
from mmgem_jax.convert.weight_files import open_source
from mmgem_jax.errors import UserError
from mmgem_jax.run import build_model

F32 = gguf.GGMLQuantizationType.F32
# Names of ggml's own, so that ours are not their own measure.
GGUF_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)


def decoder_config(**changes):
    """Rows of a multiple of 32 numbers, which the quantised formats need."""
    sizes = {"width": 64, "mlp": 96, "heads": 4, "kv_heads": 2, "head_dim": 16} | changes
    changes = {f"model.decoder.{name}": value for name, value in sizes.items()}
    return build_model(tiny.config(changes).model).config.decoder


def permuted(rows, heads):
    """A query or key matrix as llama.cpp's converter stores it."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model, config):
    """GGUF's name: array, of a torch model."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            heads = config.heads if "q_proj" in name else config.kv_heads
            weights[name] = permuted(weights[name], heads)
    return {
        GGUF_NAMES.get_name(name, try_suffixes=(".weight",)): value
        for name, value in weights.items()
    }


def metadata_of(config):
    """Key: value, as llama.cpp's converter writes them."""
    return {
        "context_length": 128,
        "embedding_length": config.width,
        "block_count": config.depth,
        "feed_forward_length": config.mlp,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "vocab_size": config.vocab_size,
    }


def write(path, metadata, tensors, kind=F32, architecture="llama"):
    """A GGUF file; `kind` is that of the matrices."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        key = key if key.startswith("split.") else f"llama.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, array in tensors.items():
        if array.dtype == np.float32:
            own = kind if array.ndim == 2 else F32
            writer.add_tensor(name, gguf.quants.quantize(array, own), raw_dtype=own)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def parts():
    """The metadata and tensors of a tied Llama."""
    config = decoder_config()
    return metadata_of(config), tensors_of(torch_model(config, seed=0), config)


def told(path):
    """The one line that opening the file ends in."""
    with pytest.raises(UserError) as caught:
        open_source(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 4, "tie_embeddings": True},
        {"kv_heads": 2, "tie_embeddings": False, "rope_theta": 5e5},
        {"kv_heads": 1, "tie_embeddings": True, "head_dim": 32, "norm_epsilon": 1e-6},
    ],
)
def test_equals_the_reading_of_transformers(changes, kind, tmp_path):
    config = decoder_config(**changes)
    model = torch_model(config, seed=1)
    kind = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "a.gguf", metadata_of(config), tensors_of(model, config), kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    loaded = theirs.state_dict()
    if config.tie_embeddings:
        del loaded["lm_head.weight"]

    source = open_source(str(path))
    assert source.path == path and source.largest_file == path.stat().st_size
    assert source.tensors.keys() == loaded.keys()
    for name, tensor in source.tensors.items():
        array = tensor.read()
        assert array.dtype == np.float32 and array.shape == tensor.shape
        np.testing.assert_array_equal(array, loaded[name].numpy(), err_msg=name)

    expected = theirs.config.to_dict()
    ours = {name: source.config[name] for name in expected if name in source.config}
    # They leave the float32 as it is and do not say the class.
    assert ours.pop("rms_norm_eps") == config.norm_epsilon
    assert ours.pop("architectures") == ["LlamaForCausalLM"]
    assert ours == {name: expected[name] for name in ours}
    assert len(ours) == 14 and ours["rope_parameters"]["rope_theta"] == config.rope_theta


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_file_without_loss_is_our_decoder(kv_heads, tmp_path):
    config = decoder_config(kv_heads=kv_heads, tie_embeddings=False)
    model = torch_model(config, seed=2)
    path = write(tmp_path / "a.gguf", metadata_of(config), tensors_of(model, config))
    weights = {name: tensor.read() for name, tensor in open_source(path).tensors.items()}
    ours = to_params(weights, decoder_places(config))
    jax.tree.map(np.testing.assert_array_equal, ours, from_torch(model, config))


@pytest.mark.parametrize("seed", range(20))
def test_undoing_the_permutation_is_its_inverse(seed):
    random = np.random.default_rng(seed)
    heads, half, columns = random.integers(1, 9, 3)
    rows = random.normal(size=(heads * 2 * half, columns))
    np.testing.assert_array_equal(undo_permutation(permuted(rows, heads), heads), rows)
    np.testing.assert_array_equal(permuted(undo_permutation(rows, heads), heads), rows)


def test_pairs_that_lie_together_come_half_a_head_apart():
    """Two heads of six rows; a row's number is its pair's, and its sign says which of the two."""
    stored = np.array([1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6])
    assert undo_permutation(stored, 2).tolist() == [1, 2, 3, -1, -2, -3, 4, 5, 6, -4, -5, -6]


def test_fields_that_a_file_may_leave_out(parts, tmp_path):
    metadata, tensors = parts
    optional = {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
    metadata = {key: value for key, value in metadata.items() if key not in optional}
    tensors = {name: value for name, value in tensors.items() if "attn_k" not in name}
    config = open_source(write(tmp_path / "a.gguf", metadata, tensors)).config
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == 16
    assert config["vocab_size"] == 128
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none"}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 2048},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        ),
    ],
)
def test_the_scaling_of_rope_is_handed_on(scaling, expected, parts, tmp_path):
    scaling = {f"rope.scaling.{key}": value for key, value in scaling.items()}
    path = write(tmp_path / "a.gguf", parts[0] | scaling, parts[1])
    assert open_source(path).config["rope_parameters"] == {"rope_theta": 10000.0} | expected


def test_the_older_name_of_a_linear_scaling(parts, tmp_path):
    path = write(tmp_path / "a.gguf", parts[0] | {"rope.scale_linear": 2.0}, parts[1])
    expected = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert open_source(path).config["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.count": 2}, "found one of 2 parts; expected a whole file"),
        ({"attention.head_count": None}, "attention.head_count: found None; expected int above 0"),
        ({"attention.head_count": [4, 4]}, "attention.head_count: found [4, 4]; expected int"),
        ({"block_count": 0}, "block_count: found 0; expected int above 0"),
        ({"embedding_length": 64.0}, "embedding_length: found 64.0; expected int above 0"),
        ({"attention.key_length": 8}, "attention.value_length: found 16; expected 8"),
        ({"rope.dimension_count": 8}, "rope.dimension_count: found 8; expected 16"),
        ({"attention.head_count": 2}, "attn_q.weight: found 64 rows; expected 2 heads of 16"),
        ({"attention.head_count_kv": 4}, "attn_k.weight: found 32 rows; expected 4 heads of 16"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.factor: found None; expected float"),
    ],
)
def test_metadata_that_does_not_fit(changes, message, parts, tmp_path):
    metadata = {key: value for key, value in (parts[0] | changes).items() if value is not None}
    assert message in told(write(tmp_path / "a.gguf", metadata, parts[1]))


def test_another_architecture_is_named(parts, tmp_path):
    path = write(tmp_path / "a.gguf", *parts, architecture="qwen2")
    assert "general.architecture: found 'qwen2'; expected llama" in told(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", "a table of RoPE's scaling without the settings that made it"),
        ("blk.0.attn_q.bias", "expected a plain Llama's tensors alone"),
        ("blk.0.ffn_gate_inp.weight", "expected a plain Llama's tensors alone"),
    ],
)
def test_a_tensor_that_a_plain_llama_lacks(name, message, parts, tmp_path):
    tensors = parts[1] | {name: np.ones(8, np.float32)}
    said = told(write(tmp_path / "a.gguf", parts[0], tensors))
    assert name in said and message in said


def test_a_file_without_embedding(parts, tmp_path):
    tensors = {name: value for name, value in parts[1].items() if name != "token_embd.weight"}
    path = write(tmp_path / "a.gguf", parts[0], tensors)
    assert "found no matrix token_embd.weight" in told(path)


@pytest.mark.parametrize("kept", [0, 3, 4, 23, 24, 100, 600, 2000, -1])
def test_a_damaged_file(kept, parts, tmp_path):
    path = write(tmp_path / "a.gguf", *parts)
    path.write_bytes(path.read_bytes()[:kept])
    assert "expected a whole GGUF file" in told(path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\3\4" * 100)
    assert "expected a whole GGUF file (GGUF magic invalid)" in told(path)


def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_kept(parts, tmp_path):
    path = write(tmp_path / "a.gguf", *parts)
    tensor = open_source(path).tensors["model.norm.weight"]
    content = path.read_bytes()
    old, new = parts[1]["output_norm.weight"], np.arange(64, dtype=np.float32)
    assert content.count(old.tobytes()) == 1
    path.write_bytes(content.replace(old.tobytes(), new.tobytes()))
    array = tensor.read()
    np.testing.assert_array_equal(array, new)
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert str(path) not in maps.read()
    for damage in (lambda: path.write_bytes(content[:100]), path.unlink):
        damage()
        with pytest.raises(UserError, match=re.escape(f"{path}: tensor output_norm.weight: ")):
            tensor.read()


def test_numbers_that_ggml_cannot_make_floats_of(parts, tmp_path):
    tensors = {"token_embd.weight": np.ones((128, 64), np.int8)}
    path = write(tmp_path / "a.gguf", parts[0], tensors)
    tensor = open_source(path).tensors["model.embed_tokens.weight"]
    with pytest.raises(UserError, match=r"token_embd\.weight: cannot be read as I8"):
        tensor.read()


def test_without_the_package_the_extra_is_named(parts, tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", *parts)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'mmgem_jax\[gguf\]'"):
        open_source(path)
