"""Folders as transformers saves them, read back without torch, and all that can be wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch_llama import from_torch, torch_model
from transformers import AutoModelForCausalLM

from mmgem_jax.convert.table import decoder_places, to_params
from mmgem_jax.convert.weight_files import INDEX, SINGLE, open_source
from mmgem_jax.errors import UserError
from mmgem_jax.run import build_model

CONFIG = build_model(tiny.config({"model.decoder.tie_embeddings": False}).model).config.decoder


@pytest.fixture(scope="module")
def model():
    return torch_model(CONFIG, seed=0)


@pytest.fixture
def folder(tmp_path):
    """A folder with a config.json and as yet no weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def shards(folder):
    """Two shards with a tensor each, and their index."""
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "2.safetensors")
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def told(folder, name=""):
    """The one line, about the folder or a file in it, that opening the folder ends in."""
    with pytest.raises(UserError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_what_transformers_saved_and_loads_is_what_we_read(model, dtype, shard_size, tmp_path):
    theirs = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_size == "20KB") == (tmp_path / INDEX).exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()

    source = open_source(str(tmp_path))
    assert source.path == tmp_path
    assert source.config == json.loads((tmp_path / "config.json").read_text())
    assert source.largest_file == max(file.stat().st_size for file in files)
    assert source.tensors.keys() == loaded.keys()
    for name, tensor in source.tensors.items():
        array = tensor.read()
        assert array.dtype == np.float32 and array.shape == tensor.shape
        np.testing.assert_array_equal(array, loaded[name].numpy(), err_msg=name)


def test_what_is_read_is_our_decoder(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = {name: tensor.read() for name, tensor in open_source(tmp_path).tensors.items()}
    ours = to_params(weights, decoder_places(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, ours, from_torch(model, CONFIG))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_exactly(dtype, folder):
    """All 65536 of them: subnormals, both zeros, infinities and what is no number."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    save_file({"a": numbers}, folder / SINGLE)
    read, expected = open_source(folder).tensors["a"].read(), numbers.float().numpy()
    np.testing.assert_array_equal(np.isnan(read), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(read[known].view(np.int32), expected[known].view(np.int32))


def test_a_single_file_may_have_another_name(folder):
    save_file({"a": torch.ones(2)}, folder / "weights.safetensors")
    assert open_source(folder).tensors["a"].shape == (2,)
    save_file({"b": torch.ones(2)}, folder / "more.safetensors")
    assert f"found 2 *.safetensors files; expected {INDEX}" in told(folder)
    save_file({"c": torch.ones(2)}, folder / SINGLE)
    assert list(open_source(folder).tensors) == ["c"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float8_e4m3fn])
def test_other_numbers_are_refused_only_when_they_are_read(dtype, folder):
    held = {"position_ids": torch.ones(1, 4).to(dtype), "a": torch.ones(2)}
    save_file(held, folder / SINGLE)
    tensors = open_source(folder).tensors
    assert tensors["position_ids"].shape == (1, 4)
    assert tensors["a"].read().tolist() == [1, 1]
    with pytest.raises(UserError, match=r"tensor position_ids: found [FI]\d.*; expected one of"):
        tensors["position_ids"].read()


def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_kept(folder):
    file = folder / SINGLE
    save_file({"a": torch.ones(2)}, file)
    tensor = open_source(folder).tensors["a"]
    save_file({"a": torch.full((2,), 7.0)}, file)
    array = tensor.read()
    file.unlink()
    assert array.tolist() == [7, 7]
    with pytest.raises(UserError, match=re.escape(f"{file}: expected a safetensors file")):
        tensor.read()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tensor_at_a_time_is_in_memory(folder):
    tensors = {str(i): torch.ones(2**20) for i in range(64)}  # 4 MiB each, 256 together
    save_file(tensors, folder / SINGLE)
    program = (
        "import re, sys\n"
        "from mmgem_jax.convert.weight_files import open_source\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status())[1]) // 1024\n"
        "before = peak()\n"
        "total = sum(t.read().sum() for t in open_source(sys.argv[1]).tensors.values())\n"
        "assert total == 2**26\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) < 32  # MiB


def test_a_path_that_is_no_folder_of_a_model(tmp_path):
    assert "does not exist; expected a folder or a *.gguf file" in told(tmp_path / "absent")
    assert "does not exist" in told(tmp_path / "absent.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "found a single file; expected its folder" in told(tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        assert "pickle is never loaded because it can run code" in told(tmp_path / name)
    assert "config.json: does not exist" in told(tmp_path, "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[1]", "found a list; expected a JSON object"),
    ],
)
def test_a_config_that_is_no_object(content, message, folder):
    (folder / "config.json").write_bytes(content)
    assert message in told(folder, "config.json")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"])
def test_pickle_and_other_formats_are_never_loaded(suffix, folder):
    assert f"found no weights; expected {SINGLE}" in told(folder)
    (folder / f"weights{suffix}").write_bytes(b"anything")
    message = told(folder)
    assert f"found weights{suffix}; expected safetensors" in message
    assert "pickle is never loaded because it can run code" in message


def test_shards_that_agree_with_their_index(shards):
    tensors = open_source(shards).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2,), "b": (3,)}
    save_file({"c": torch.ones(4)}, shards / SINGLE)  # goes before the index, as in transformers
    assert list(open_source(shards).tensors) == ["c"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map: expected an object"),
        ({}, "weight_map: expected an object"),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "names 3.safetensors, which is not there"),
        (
            {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
            "tensor c: found in no shard; the index says 2.safetensors",
        ),
        (
            {"a": "1.safetensors", "b": "1.safetensors"},
            "tensor b: found in no shard; the index says 1.safetensors",
        ),
        (
            {"a": "2.safetensors", "b": "1.safetensors"},
            "tensor a: found in 1.safetensors; the index says 2.safetensors",
        ),
        ({"a": 1}, "found shard 1; expected the name of a file beside it"),
        ({"a": "../1.safetensors"}, "expected the name of a file beside it"),
        ({"a": "/1.safetensors"}, "expected the name of a file beside it"),
        ({"a": "x\\1.safetensors"}, "expected the name of a file beside it"),
        ({"a": ".."}, "expected a *.safetensors file"),
        ({"a": "pytorch_model-1.bin"}, "expected a *.safetensors file"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards(weight_map, message, shards):
    write_index(shards, weight_map)
    assert message in told(shards, INDEX)


def test_a_tensor_that_the_index_lacks(shards):
    save_file({"b": torch.ones(3), "c": torch.ones(3)}, shards / "2.safetensors")
    message = "tensor c: found in 2.safetensors; the index says nothing of it"
    assert message in told(shards, INDEX)


def test_a_tensor_that_is_set_twice(shards):
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, shards / "2.safetensors")
    message = "tensor a is set twice, here and in 1.safetensors"
    assert message in told(shards, "2.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_damaged_file(kept, shards):
    file = shards / "2.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "expected a safetensors file" in told(shards, file.name)
    file.write_bytes(b"\xff" * 64)
    assert "expected a safetensors file" in told(shards, file.name)
    file.unlink()
    file.mkdir()
    assert "expected a safetensors file" in told(shards, file.name)
