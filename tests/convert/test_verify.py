"""The comparison that every export goes through finds what differs."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from mmgem_jax import trained_run
from mmgem_jax.convert import export, verify, verify_samples
from mmgem_jax.errors import UserError


@pytest.fixture(scope="module")
def run(trained):
    return trained_run.load(trained[0])


@pytest.fixture(scope="module")
def samples(run):
    return verify_samples.run_samples(run.config)


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    """Every kind of folder, by name."""
    path = tmp_path_factory.mktemp("exported")
    for what in ("model", "decoder", "vision"):
        (path / what).mkdir()
    export.write_model(run, path / "model", "bfloat16")
    export.write_decoder(run, path / "decoder")
    export.write_vision(run, path / "vision")
    return path


def spoil(folder, to, name, change):
    """A copy of the folder with one tensor changed."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_model_that_agrees(run, folders, samples):
    before = set(os.listdir(folders / "model"))
    parity = verify.verify_model(run, folders / "model", "bfloat16", samples)
    assert json.loads(json.dumps(parity)) == parity
    assert set(parity["largest_difference"]) == {
        *("feature_map", "pooled_embedding_grid", "pooled_generation_grid", "visual_tokens"),
        *("image_embeddings", "region_embeddings", "text_embeddings", "caption_logits"),
    }
    assert 0 < max(parity["largest_difference"].values()) <= parity["bound"] == 1e-4
    assert (parity["images"], parity["texts"], parity["boxes"]) == (8, 8, 4)
    assert parity["greedy_texts_equal"] == len(parity["greedy_texts"]) == 32
    assert len(set(parity["greedy_texts"])) > 8
    assert parity["written_dtype"] == "bfloat16" and parity["samples"] == "emoji/fixture test"
    assert parity["versions"]["torch"] == torch.__version__
    assert parity["versions"]["jax"] == jax.__version__
    assert set(os.listdir(folders / "model")) == before


def test_a_dtype_that_is_not_the_files(run, folders, samples):
    with pytest.raises(UserError, match=r"feature_map: found a difference of .* at most 0.0001"):
        verify.verify_model(run, folders / "model", "float32", samples)


def test_a_decoder_that_agrees_and_one_that_does_not(run, folders, samples, tmp_path):
    few = verify_samples.Samples([], samples.texts[:3], "")
    parity = verify.verify_decoder(run, folders / "decoder", "float32", few)
    assert list(parity["largest_difference"]) == ["logits"]
    assert len(parity["greedy_texts"]) == 3 and any(parity["greedy_texts"])
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = spoil(folders / "decoder", tmp_path / "broken", name, lambda x: x.flip(0))
    with pytest.raises(UserError, match="verification: logits: found a difference"):
        verify.verify_decoder(run, broken, "float32", few)
    fields = json.loads((folders / "decoder" / "generation_config.json").read_text())
    words = {"suppress_tokens": list(range(3, fields["suppress_tokens"][-1] + 1, 2))}
    other = shutil.copytree(folders / "decoder", tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps(fields | words))
    with pytest.raises(UserError, match=r"greedy text: found '.*' in PyTorch; expected '"):
        verify.verify_decoder(run, other, "float32", few)


def test_a_vision_tower_that_agrees_and_one_that_does_not(run, folders, samples, tmp_path):
    parity = verify.verify_vision(run, folders / "vision", "float32", samples)
    assert list(parity["largest_difference"]) == ["feature_map"] and not parity["greedy_texts"]
    name = "vision_model.embeddings.patch_embedding.weight"
    turned = spoil(folders / "vision", tmp_path / "turned", name, lambda x: x.mT.contiguous())
    with pytest.raises(UserError, match="verification: feature_map: found a difference"):
        verify.verify_vision(run, turned, "float32", samples)


def test_a_tensor_that_is_missing(run, folders, samples, tmp_path):
    broken = shutil.copytree(folders / "vision", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys: found \['post_layernorm.bias'\]"):
        verify.verify_vision(run, broken, "float32", samples)


@pytest.mark.parametrize("theirs", [np.full(3, np.nan), np.zeros(3) + 1.01e-4, np.zeros((1, 3))])
def test_no_number_a_number_off_and_another_shape_are_differences(theirs):
    samples = verify_samples.Samples([], [], "")
    arguments = [], [], samples, "float32"
    verify.checked({"x": np.zeros(3)}, {"x": np.zeros(3) + 0.99e-4}, *arguments)
    with pytest.raises(UserError, match="verification: x: found"):
        verify.checked({"x": np.zeros(3)}, {"x": theirs}, *arguments)


def test_the_parameters_are_rounded_in_our_own_side_too():
    written = verify.as_written({"x": jax.numpy.float32(1 + 2**-9)}, "bfloat16")["x"]
    assert (written.dtype, float(written)) == (np.float32, 1.0)


def test_the_folders_code_is_nowhere_afterwards(tmp_path):
    before = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path)
    with pytest.raises(ZeroDivisionError), verify.own_module_cache():
        cache = Path(dynamic_module_utils.HF_MODULES_CACHE)
        dynamic_module_utils.init_hf_modules()
        assert str(cache) in sys.path and cache.is_dir()
        raise ZeroDivisionError
    assert (dynamic_module_utils.HF_MODULES_CACHE, sys.path) == before
    assert not cache.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.name": ""}, "data.name: the run has none; expected --images and --texts"),
        ({"data.dir": "nowhere"}, "no data set .* or pass --images and --texts, or --no-verify"),
        ({"eval.final_splits": ("none",)}, "has no split 'none'.* or pass --images"),
        ({"eval.caption_field": "story"}, "eval.caption_field: .* no field 'story'; expected --im"),
    ],
)
def test_data_that_are_not_there(run, changes, message):
    config = ConfigDict(run.config.to_dict())
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        verify_samples.run_samples(config)


def test_images_and_texts_of_the_users_own(run, folders, tmp_path):
    path = tmp_path / "not.png"
    with pytest.raises(UserError, match=r"--images .*not.png: No such file"):
        verify_samples.given_samples([path], ["a hat"])
    path.write_bytes(b"words")
    with pytest.raises(UserError, match=r"--images .*not.png: found no whole image; expected"):
        verify_samples.given_samples([path], ["a hat"])
    only_texts = verify_samples.given_samples([], ["a hat"])
    with pytest.raises(UserError, match="--images: found none; expected one or more"):
        verify.verify_model(run, folders / "model", "bfloat16", only_texts)
    with pytest.raises(UserError, match="--texts: found none; expected one or more"):
        verify.verify_decoder(
            run, folders / "decoder", "float32", verify_samples.Samples([], [], "")
        )
