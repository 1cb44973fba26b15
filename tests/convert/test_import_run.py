"""A folder to start from, out of what PyTorch wrote; and every mistake in one line."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mmgem_jax import run, run_folder, sharding, train, train_state, trained_run
from mmgem_jax.convert.import_run import import_run
from mmgem_jax.data.tokenizer import EMB, PAD, load_tokenizer
from mmgem_jax.errors import UserError
from mmgem_jax.models.mmgem import MMGem
from mmgem_jax.optimizer import make_optimizer

TEXTS = ["a red hat", "two hats on a cat", "the cat sat", "an orange and a lemon"]
WHOLE_TOLERANCE = 1e-4
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def noisy(model):
    """The model with every parameter random, of a size that makes a tolerance mean something."""
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim < 2:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    """A Llama's own tokenizer, without [EMB] and [PAD]."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def towers(tokenizer, tmp_path_factory):
    """Folders of a CLIPModel and of a Llama in three shards, and both models."""
    folder = tmp_path_factory.mktemp("hugging_face")
    torch.manual_seed(0)
    text = VISION | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    clip = noisy(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text)))
    clip.save_pretrained(folder / "clip")
    sizes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    llama = noisy(LlamaForCausalLM(sizes))
    llama.save_pretrained(folder / "llama", max_shard_size="40KB")
    assert len(list((folder / "llama").glob("*.safetensors"))) >= 3
    tokenizer.save_pretrained(folder / "llama")
    return folder / "clip", folder / "llama", clip, llama


@pytest.fixture(scope="module")
def imported(towers, emoji_config, tmp_path_factory):
    """The folder made of both, and the report."""
    out = tmp_path_factory.mktemp("imported") / "start"
    return out, import_run(emoji_config(), out, str(towers[0]), str(towers[1]))


def test_both_towers_compute_what_pytorch_does(towers, imported):
    _, _, clip, llama = towers
    out, report = imported
    loaded = trained_run.load(out)
    assert loaded.step == 0
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    found = loaded.model.apply({"params": loaded.params}, images, method=MMGem.feature_map)
    mean, std = (np.asarray(x, np.float32) for x in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    pixels = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    tower = clip.vision_model
    states = tower.post_layernorm(tower(pixels).last_hidden_state)[:, 1:].reshape(2, 4, 4, 32)
    assert states.std() > 0.3
    np.testing.assert_allclose(found, states, rtol=0, atol=WHOLE_TOLERANCE)

    rows = loaded.tokenizer(TEXTS[:1], return_tensors="np")["input_ids"].astype(np.int32)

    def logits(model, rows):
        positions = np.arange(rows.shape[1], dtype=np.int32)[None]
        states = model.decoder(model.decoder.embed(rows), positions, np.ones_like(rows))
        return model.decoder.logits(states)

    ours = loaded.model.apply({"params": loaded.params}, rows, method=logits)
    theirs = llama(torch.from_numpy(rows).long()).logits
    assert theirs.std() > 0.3
    np.testing.assert_allclose(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=WHOLE_TOLERANCE)
    counted = sum(x.numel() for x in tower.parameters())
    assert report["parameters"]["vision"] == counted
    assert report == json.loads((out / "import.json").read_text())
    assert report["memory_taken_bytes"] > 0


def test_the_vocabulary_has_our_tokens(towers, imported, tokenizer):
    loaded = trained_run.load(imported[0])
    table, old = loaded.params["decoder"]["embedding"], len(tokenizer)
    assert table.shape == (384, 32)
    assert {loaded.tokenizer.convert_tokens_to_ids(t) for t in (EMB, PAD)} == {old, old + 1}
    mean = towers[3].model.embed_tokens.weight.numpy().mean(axis=0)
    np.testing.assert_allclose(table[old:], np.tile(mean, (384 - old, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(towers, imported, emoji_config, tmp_path, dtype):
    folder, model = tmp_path / "clip", towers[2].vision_model
    rounded = {name: value.to(dtype) for name, value in model.state_dict().items()}
    copy.deepcopy(towers[2]).to(dtype).save_pretrained(folder)
    import_run(emoji_config(), tmp_path / "out", str(folder))
    found = trained_run.load(tmp_path / "out").params["vision"]
    expected = rounded["encoder.layers.1.mlp.fc1.weight"].float().numpy().T
    np.testing.assert_array_equal(found["blocks"]["up"]["kernel"][1], expected)


def test_positions_are_interpolated_only_when_asked_to(towers, emoji_config, tmp_path):
    changes = {"model.vision.image_size": 48}
    arguments = (emoji_config(changes), tmp_path / "out", str(towers[0]))
    with pytest.raises(UserError, match=r"model.vision.image_size is 48; the weights have 32"):
        import_run(*arguments)
    import_run(*arguments, interpolate_positions=True)
    vision = trained_run.load(tmp_path / "out").params["vision"]
    expected = towers[2].vision_model.embeddings.interpolate_pos_encoding(
        torch.zeros(1, 37, 32), 48, 48
    )
    np.testing.assert_allclose(vision["position"], expected[0], rtol=0, atol=5e-6)


def test_training_starts_from_it_leaves_what_is_frozen_and_resumes_without_it(
    imported, emoji_config, tmp_path
):
    start = shutil.copytree(imported[0], tmp_path / "start")
    changes = {
        "init_from": str(start),
        "steps": 2,
        "optimizer.warmup_steps": 1,
        "eval.splits": (),
        "eval.final_splits": ("unseen",),
        "eval.sample_split": "",
        "log.conflict_every": 0,
    }
    config = emoji_config(changes)
    config.optimizer.groups.decoder.pattern = "decoder/.*"
    config.optimizer.groups.decoder.algorithm = "frozen"
    config.optimizer.groups.rest.pattern = "(?!decoder/)(?!.*kernel).*"
    results = train.train(config, tmp_path / "run")
    started, ended = trained_run.load(start), trained_run.load(tmp_path / "run")
    same = jax.tree.map(np.array_equal, started.params["decoder"], ended.params["decoder"])
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), started.params["vision"], ended.params["vision"]
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.2
    assert (ended.step, run_folder.find_run(tmp_path / "run" / "checkpoints" / "2")[1]) == (2, 2)
    shutil.rmtree(start)
    assert train.train(config, tmp_path / "run")["splits"] == results["splits"]


def test_a_start_that_does_not_fit_leaves_no_workdir(imported, emoji_config, tmp_path):
    config = emoji_config({"init_from": str(imported[0]), "model.vision.heads": 4})
    with pytest.raises(UserError, match="holds another model"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def abstract(emoji_config, imported):
    """`abstract(changes)`: the config of a training from the import, tokenizer and shapes."""

    def make(changes=()):
        config = emoji_config({"init_from": str(imported[0])} | dict(changes))
        tokenizer = run.load_run_tokenizer(config)
        config = run.complete(config, tokenizer)
        mesh, model = sharding.make_mesh(config.mesh), run.build_model(config.model)
        optimizer, shapes = make_optimizer(config.optimizer), run.batch_shapes(config)
        state = train_state.abstract_state(model, optimizer, True, shapes, mesh)
        return config, tokenizer, optimizer, state

    return make


def test_the_state_at_the_start(abstract, imported):
    config, tokenizer, optimizer, shapes = abstract({"mesh.data": 4, "mesh.fsdp": 2})
    expected = jax.device_get(trained_run.load(imported[0]).params)
    params = trained_run.params_to_start_from(config, tokenizer, shapes.params)
    state = train_state.init_state_from(params, optimizer, shapes)
    assert jax.tree.map(lambda x: x.sharding, state) == train_state.shardings_of(shapes)
    for tree in (state.params, state.average):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), expected)
    fresh = jax.device_get(optimizer.init(expected))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), fresh)
    assert state.step == 0


def test_of_a_training_the_average_is_taken(trained, emoji_config):
    workdir, _, states = trained
    config = emoji_config({"init_from": str(workdir / "checkpoints" / "2")})
    config = run.complete(config, run.load_run_tokenizer(config))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[2].params
    )
    tokenizer = run.load_run_tokenizer(config)
    params = trained_run.params_to_start_from(config, tokenizer, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(states[2].average))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.decoder.rope_theta": 5e5}, r"holds another model: model.decoder.rope_theta is"),
        ({"model.vision.heads": 4}, r"holds another model: model.vision.heads is 2 there and 4"),
        ({"model.joint_dim": 64}, r"model.joint_dim is 32 there and 64 here"),
    ],
)
def test_another_model_does_not_start_from_it(abstract, changes, message):
    config, tokenizer, _, shapes = abstract(changes)
    with pytest.raises(UserError, match=message):
        trained_run.params_to_start_from(config, tokenizer, shapes.params)


def test_another_tokenizer_does_not_start_from_it(abstract, trained):
    config, _, _, shapes = abstract()
    other = load_tokenizer(str(trained[0] / "tokenizer"))
    with pytest.raises(UserError, match=r"its tokenizer is \w{12}, the run's \w{12}; expected the"):
        trained_run.params_to_start_from(config, other, shapes.params)


def test_a_folder_that_is_no_run_is_named(emoji_config, tmp_path):
    with pytest.raises(UserError, match=r"no config.json and checkpoints/ there"):
        run.load_run_tokenizer(emoji_config({"init_from": str(tmp_path)}))


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda clip, llama: (llama / "config.json").unlink(), {}, "config.json"),
        (lambda clip, llama: replace(llama, "model_type", "mamba"), {}, "model_type.*'mamba'"),
        (lambda clip, llama: replace(clip, "model_type", "siglip"), {}, "model_type.*'siglip'"),
        (lambda clip, llama: None, {"model.decoder.width": 64}, "model.decoder.width is 64; the"),
        (lambda clip, llama: None, {"model.decoder.depth": 1}, "model.decoder.depth is 1; the"),
        (lambda clip, llama: (llama / "tokenizer.json").unlink(), {}, "tokenizer"),
        (lambda clip, llama: replace(llama, "bos_token", None, "tokenizer_config.json"), {}, "bos"),
        (lambda clip, llama: only_pickle(clip), {}, r"\.bin"),
        (
            lambda clip, llama: (clip / "preprocessor_config.json").write_text(
                '{"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.5]}'
            ),
            {},
            r"model.image_mean is \(0.5, 0.5, 0.5\).*image_mean=\(0.5, 0.5, 0.4\)'$",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    towers, emoji_config, tmp_path, spoil, changes, message
):
    clip, llama = (shutil.copytree(towers[i], tmp_path / name) for i, name in ((0, "c"), (1, "l")))
    spoil(clip, llama)
    config = emoji_config(changes)
    with pytest.raises(UserError, match=message) as error:
        import_run(config, tmp_path / "out", str(clip), str(llama))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "l"]


def replace(folder, field, value, name="config.json"):
    """Sets a field of a JSON file, or takes it out."""
    fields = json.loads((folder / name).read_text()) | {field: value}
    fields = {k: v for k, v in fields.items() if v is not None}
    (folder / name).write_text(json.dumps(fields))


def only_pickle(folder):
    """Leaves weights in a format that is never read."""
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "pytorch_model.bin")


def test_a_folder_that_is_not_empty_stays_as_it_is(towers, emoji_config, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already; expected a new or an empty folder"):
        import_run(emoji_config(), tmp_path, str(towers[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_no_tower_is_an_error(emoji_config, tmp_path):
    with pytest.raises(UserError, match="--vision, --decoder: found neither"):
        import_run(emoji_config(), tmp_path / "out")
