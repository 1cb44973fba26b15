"""The PyTorch model of exported folders against ours, on random parameters."""

import copy
import shutil
import types

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from torch_mmgem import (
    BOXES,
    LENGTH,
    TEXTS,
    VARIANTS,
    B,
    R,
    close,
    loading,
    our_captions,
    ours,
    pictures,
    rows,
    setup,
    tokenizer,
)

from mmgem_jax.convert import modeling_mmgem, table
from mmgem_jax.generate import Decoding
from mmgem_jax.models.pooling import pool


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(variant or folder, **options)`: the model of an exported folder."""
    with loading(tmp_path_factory.mktemp("exported")) as load:
        yield load


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_ours(variant, load):
    model, expected = load(variant), ours(variant)
    images = pictures()
    close(model.feature_map(images), expected["feature_map"], 1e-5)
    close(model.encode_image(images), expected["images"], 1e-5)
    close(model.encode_regions(images, BOXES), expected["regions"], 1e-5)
    close(model.encode_text(TEXTS), expected["texts"], 1e-5)
    close(model.visual_tokens(images, BOXES), expected["visual"], 2e-5)
    logits = model.caption_logits(images, BOXES, torch.from_numpy(rows()).long())
    close(logits.flatten(0, 1), expected["logits"], 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("decoding", "options"),
    [
        (Decoding(length=LENGTH), {}),
        (
            Decoding("beam", LENGTH, beams=3, length_penalty=0.5),
            {"num_beams": 3, "length_penalty": 0.5},
        ),
    ],
    ids=["greedy", "beam"],
)
def test_captions_equal_ours(variant, decoding, options, load):
    expected = our_captions(variant, decoding)
    ended = (expected == tokenizer().eos_token_id).any(axis=1)
    assert len({row.tobytes() for row in expected}) > 3 and 0 < ended.sum() < len(ended), expected
    captions = load(variant).generate_caption(pictures(), BOXES, **options)
    words = [tokenizer().decode(row, skip_special_tokens=True) for row in expected]
    assert captions == [words[i : i + R] for i in range(0, B * R, R)]


@pytest.mark.parametrize(("size", "grid"), [((9, 5), 2), ((4, 7), 6), ((21, 21), 1)])
def test_pooling_equals_ours(size, grid):
    random = np.random.default_rng(grid)
    maps = random.standard_normal((3, *size, 4)).astype(np.float32)
    boxes = tiny.random_boxes(random, (3, 20))
    boxes[:, 0] *= 0.05  # smaller than a cell
    boxes[:, 1] = (0, 0, 1, 1)
    boxes[:, 2:5, 2:] = 1.0  # up to the edge
    boxes[:, 5] = (1 / 21, 1 / 21, 2 / 21, 3 / 21)
    found = modeling_mmgem.pool(torch.from_numpy(maps), torch.from_numpy(boxes), grid)
    np.testing.assert_allclose(found, pool(maps, boxes, grid), rtol=0, atol=1e-5)


def test_a_whole_image_is_captioned_without_a_box(load):
    model, images = load("untied"), pictures()
    whole = model.generate_caption(images, [[(0, 0, 1, 1)]] * B, max_new_tokens=3)
    assert model.generate_caption(images, max_new_tokens=3) == [own for (own,) in whole]
    assert model.generate_caption(images[0], max_new_tokens=3) == whole[0]


def test_a_similarity_map_has_the_cosine_of_each_cell(load):
    model, images = load("untied"), pictures()
    texts = model.encode_text(TEXTS)
    boxes = [(x / 4, y / 4, (x + 1) / 4, (y + 1) / 4) for y in range(4) for x in range(4)]
    regions = model.encode_regions(images, [boxes] * B)
    expected = (regions * texts[:, None]).sum(-1).detach().reshape(B, 4, 4).numpy()
    close(model.similarity_map(images, TEXTS), expected, 1e-6)
    one = model.similarity_map(images, TEXTS[0])
    close(one[0], expected[0], 1e-6)
    assert one.shape == (B, 4, 4) and np.abs(expected.std(axis=(1, 2))).min() > 0.01
    # A window of three cells is cut at the edge; one of seven is the whole image in the middle.
    corner = model.encode_regions(images, [[(0, 0, 0.5, 0.5)]] * B)[:, 0]
    cosine = (corner * texts).sum(-1).detach().numpy()
    close(model.similarity_map(images, TEXTS, window=3)[:, 0, 0], cosine, 1e-6)
    cosine = (model.encode_image(images) * texts).sum(-1).detach().numpy()
    close(model.similarity_map(images, TEXTS, window=7)[:, 1, 2], cosine, 1e-6)


def test_forward_trains(load):
    model = load("tied")
    out = model(pictures(), TEXTS)
    scale = np.exp(setup("tied")[1]["logit_scale"])
    expected = scale * ours("tied")["images"] @ ours("tied")["texts"].T
    close(out.logits_per_image, expected, 2e-4)
    out.logits_per_text.logsumexp(dim=-1).sum().backward()
    tokens = torch.from_numpy(rows()).long()
    model.caption_logits(pictures(), BOXES, tokens).logsumexp(dim=-1).sum().backward()
    lost = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad()
    assert lost == []


def test_saved_and_loaded_again(load, tmp_path):
    model = load("tied")
    model.save_pretrained(tmp_path)
    names = set(table.model_places(setup("tied")[0].config))
    assert set(load_file(tmp_path / "model.safetensors")) == names
    again = load(str(tmp_path))
    assert torch.equal(again.encode_image(pictures()), model.encode_image(pictures()))
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert again.generate_caption(pictures()) == model.generate_caption(pictures())
    assert again.config.text_config.to_dict() == model.config.text_config.to_dict()


def test_the_tokenizer_is_of_where_the_weights_are(load, tmp_path, monkeypatch):
    """Of a relative path, also after a change of folder; of a hub's cache, of a revision."""
    expected = load("tied").encode_text(TEXTS)
    snapshot = tmp_path / "cache" / "models--me--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(load("tied").name_or_path, snapshot)
    refs = tmp_path / "cache" / "models--me--tiny" / "refs"
    refs.mkdir()
    (refs / "mine").write_text("0" * 40)
    monkeypatch.chdir(tmp_path / "cache" / "models--me--tiny" / "snapshots")
    hub = {"cache_dir": str(tmp_path / "cache"), "revision": "mine", "local_files_only": True}
    models = [load("0" * 40), load("me/tiny", **hub)]
    monkeypatch.chdir(tmp_path)
    for model in models:
        assert torch.equal(model.encode_text(TEXTS), expected)


def test_a_folder_without_a_tokenizer_says_so_where_one_is_needed(load, tmp_path):
    folder = shutil.copytree(load("tied").name_or_path, tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model = load(str(folder))
    assert torch.equal(model.encode_image(pictures()), load("tied").encode_image(pictures()))
    with pytest.raises(ValueError, match=r"tokenizer: found none in '.*bare'; expected one beside"):
        model.encode_text(TEXTS)
    with pytest.raises(ValueError, match=r"or set as `model\.tokenizer`"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.tokenizer = tokenizer()
    assert torch.equal(model.encode_text(TEXTS), load("tied").encode_text(TEXTS))


def test_names_are_those_of_the_table(load):
    for variant in VARIANTS:
        state = load(variant).state_dict()
        tied = {"language_model.lm_head.weight"} if variant == "tied" else set()
        assert set(state) - tied == set(table.model_places(setup(variant)[0].config))


@pytest.mark.parametrize("special", [{}, {"bos_token_id": 2}], ids=["apart", "shared"])
def test_special_and_unused_ids_are_never_produced(special, load):
    """Whatever the head says; where <s> is </s>, captions still end."""
    model = copy.deepcopy(load("untied"))
    model.config.update(special)
    config, head = model.config, model.language_model.lm_head.weight.data
    banned = [config.pad_token_id, config.emb_token_id, *range(config.used_vocab_size, 384)]
    if not special:
        banned.append(config.bos_token_id)
    head[banned] = 100 * head[[5]] * (-1.0) ** torch.arange(len(banned))[:, None]
    produced = []
    model.tokenizer = types.SimpleNamespace(decode=lambda row, **_: produced.append(row.tolist()))
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        model.generate_caption(pictures(), BOXES, max_new_tokens=4, **options)
    assert len(produced) == 3 * B * R
    for row in produced:
        end = row.index(config.eos_token_id) if config.eos_token_id in row else len(row)
        assert not set(row[:end]) & set(banned) and set(row[end + 1 :]) <= {config.pad_token_id}
    assert any(config.eos_token_id in row for row in produced)


def test_a_user_may_forbid_more(load):
    model, produced = copy.deepcopy(load("untied")), []
    model.tokenizer = types.SimpleNamespace(decode=lambda row, **_: produced.append(row.tolist()))
    model.generate_caption(pictures(), BOXES)
    first = {row[0] for row in produced}
    produced.clear()
    model.generate_caption(pictures(), BOXES, suppress_tokens=list(first))
    found = {token for row in produced for token in row}
    assert found and not found & (
        first | set(model._never_produced()) - {model.config.pad_token_id}
    )
