"""Exported folders, loaded as a user loads them, against the run that they are from."""

import copy
import dataclasses
import functools
import io
import json
import types

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
)

from mmgem_jax import trained_run
from mmgem_jax.convert import export, verify, verify_samples
from mmgem_jax.convert.table import model_places, to_params, vision_places
from mmgem_jax.data.tfds_records import open_split
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.predictor import Predictor
from mmgem_jax.evaluation.tfds_sets import open_pairs
from mmgem_jax.generate import Decoding
from mmgem_jax.models.mmgem import MMGem

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def run(trained):
    """The TrainedRun of the fixture, on its own mesh of 8 devices."""
    return trained_run.load(trained[0])


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The whole model, exported."""
    path = tmp_path_factory.mktemp("model")
    export.write_model(run, path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    """The same, loaded in PyTorch."""
    with verify.own_module_cache():
        model, found = AutoModel.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not any(found.values())
        yield model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def drawings(run):
    """The test split's encoded images."""
    source = open_split(run.config.data, "test")
    return [source[i]["image"] for i in range(len(source))]


def pictures(encoded):
    return [Image.open(io.BytesIO(content)) for content in encoded]


def tensors_of(folder):
    """All tensors of a folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# ---- the whole model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoding", "options"),
    [({"method": "greedy"}, {}), ({"method": "beam", "beams": 3}, {"num_beams": 3})],
)
def test_embeddings_and_captions_are_those_of_our_evaluation(
    run, model, drawings, decoding, options
):
    decoding = Decoding(length=run.config.data.caption_length - 1, **decoding)
    predictor = Predictor(run.config, run.model, run.tokenizer, run.mesh, decoding)
    data = run.config.data
    dataset = open_pairs(data.name, data, "test", "name", "")
    captions, embeddings = [], []
    for places, feature_map in predictor.read_images(run.params, dataset):
        found, visual = predictor.look_at_whole(run.params, feature_map)
        embeddings.append(jax.device_get(found)[: len(places)])
        captions += predictor.captions(run.params, places, visual)
    images = pictures(drawings)
    np.testing.assert_allclose(
        model.encode_image(images), np.concatenate(embeddings), rtol=0, atol=TOLERANCE
    )
    texts = [*dataset.texts, "[PAD] </s> is text", "a text that is longer than its row " * 3]
    found, _ = predictor.embed_texts(run.params, texts)
    np.testing.assert_allclose(model.encode_text(texts), found, rtol=0, atol=TOLERANCE)
    assert model.generate_caption(images, **options) == captions
    assert len(set(captions)) > len(captions) // 2


def test_regions_are_ours(run, model, drawings):
    boxes = np.asarray(verify.BOXES, np.float32)[None]
    samples = verify_samples.Samples(drawings[:1], [], "")
    pixels = verify.decoded(run, samples)
    apply = jax.jit(functools.partial(run.model.apply, method=MMGem.encode_regions))
    ours = apply({"params": run.params}, pixels, boxes)
    found = model.encode_regions(pictures(drawings[:1]), boxes)
    np.testing.assert_allclose(found, ours, rtol=0, atol=TOLERANCE)
    assert np.abs(np.diff(ours, axis=1)).max() > 0.1


def test_there_and_back_is_bit_identical(run, folder):
    weights = {name: tensor.numpy() for name, tensor in tensors_of(folder).items()}
    back = to_params(weights, model_places(run.model.config))
    assert jax.tree.structure(back) == jax.tree.structure(run.params)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(run.params))


def test_the_mesh_makes_no_difference(trained, folder, tmp_path):
    split = trained_run.load(trained[0], {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    export.write_model(split, tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_files_of_a_size_at_most(run, folder, tmp_path):
    limit = 40_000
    export.write_model(run, tmp_path, max_shard_size=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        held = load_file(file)
        assert {name for name, own in weight_map.items() if own == file.name} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    whole = tensors_of(folder)
    assert weight_map.keys() == whole.keys()
    for name, tensor in tensors_of(tmp_path).items():
        assert torch.equal(tensor, whole[name])
    with verify.own_module_cache():
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_rounds_as_torch_does(run, folder, tmp_path, dtype):
    export.write_model(run, tmp_path, dtype)
    whole = tensors_of(folder)
    for name, tensor in tensors_of(tmp_path).items():
        assert torch.equal(tensor, whole[name].to(getattr(torch, dtype))), name
    with verify.own_module_cache():
        model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_what_float16_does_not_hold_is_no_number_of_another_size(run, tmp_path):
    params = run.params | {"logit_scale": np.float32(1e5)}
    large = dataclasses.replace(run, params=params)
    with pytest.raises(UserError, match="float16: logit_scale has values up to 100000; expected"):
        export.write_model(large, tmp_path, "float16")


def test_a_parameter_without_a_name_of_theirs_is_not_left_out(run, tmp_path):
    more = dataclasses.replace(run, params=run.params | {"adapter": np.zeros(2)})
    with pytest.raises(ValueError, match="adapter"):
        export.write_model(more, tmp_path)


def test_the_tokenizer_is_the_runs(run, folder):
    with verify.own_module_cache():
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert fingerprint(found) == fingerprint(run.tokenizer)


@pytest.mark.parametrize("write", [export.write_model, export.write_decoder])
def test_the_tokenizers_files_are_known_to_older_readers(run, tmp_path, write):
    """transformers 4 has no class TokenizersBackend, and fails on a list of extra tokens."""
    write(run, tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["[EMB]"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(fields)
    found = load_tokenizer(str(tmp_path))
    assert fingerprint(found) == fingerprint(run.tokenizer)
    assert found.extra_special_tokens == ["[EMB]"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_never_generated_is_what_the_model_in_pytorch_leaves_out(run, model, shared):
    tokens = export.caption_tokens(run.tokenizer)
    config = copy.deepcopy(model.config)
    if shared:
        tokens = dataclasses.replace(tokens, bos=tokens.eos)
        config.bos_token_id = config.eos_token_id
    vocab_size = run.model.config.decoder.vocab_size
    found = type(model)._never_produced(types.SimpleNamespace(config=config))
    assert found == export.never_generated(tokens, vocab_size)
    assert tokens.eos not in found and len(found) == vocab_size - tokens.vocabulary + 3 - shared


def test_all_files_can_be_read_by_others(folder):
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~export.umask()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- a tower -------------------------------------------------------------------------------------


def test_the_decoder_is_a_plain_llama(run, tmp_path, model):
    export.write_decoder(run, tmp_path)
    assert not list(tmp_path.glob("*.py"))
    plain, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain).__name__ == "LlamaForCausalLM" and not any(found.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(tokenizer) == fingerprint(run.tokenizer)
    rows = torch.arange(5, 25)[None]
    assert torch.equal(plain(rows).logits, model.language_model(rows).logits)
    # What has the highest logit is left out where it is no word.
    with torch.no_grad():
        plain.model.norm.weight.zero_()
    tokens = export.caption_tokens(tokenizer)
    banned = export.never_generated(tokens, plain.config.vocab_size)
    assert {tokens.pad, tokens.emb, tokens.bos} <= set(banned) and tokens.eos not in banned
    row = plain.generate(torch.tensor([[tokens.bos]]), max_new_tokens=3, do_sample=False)
    assert not set(row[0, 1:].tolist()) & set(banned)


@pytest.mark.parametrize("auto", [CLIPVisionModel, AutoModel])
def test_the_vision_tower_is_a_plain_clip(run, tmp_path, model, drawings, auto):
    export.write_vision(run, tmp_path)
    # Nested as all releases of transformers can read them.
    names = {f"vision_model.{name}" for name in vision_places(run.model.config.vision)}
    assert tensors_of(tmp_path).keys() == names
    plain, found = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is CLIPVisionModel and not any(found.values())
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    opaque = [Image.new("RGB", (40, 40), "red"), pictures(drawings)[0].convert("RGB")]
    pixels = processor(images=opaque, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, model.preprocess(opaque), rtol=0, atol=1e-5)
    states = plain(pixels).last_hidden_state
    cells = plain.post_layernorm(states[:, 1:]).unflatten(1, (4, 4))
    torch.testing.assert_close(cells, model.feature_map(opaque), rtol=0, atol=TOLERANCE)
