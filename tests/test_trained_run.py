"""A run's folder read back, whole or a step of it, on any mesh; and what is no run."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from mmgem_jax import sharding, trained_run
from mmgem_jax.data.tokenizer import train_bpe
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.results import parameters_fingerprint
from mmgem_jax.models.vision import interpolated_positions


@pytest.fixture(scope="module")
def saved(trained):
    """A run's folder, and the states that are saved there, by step."""
    workdir, _, states = trained
    return workdir, states


@pytest.fixture
def copy(saved, tmp_path):
    """The same folder, to spoil."""
    return shutil.copytree(saved[0], tmp_path / "run")


def assert_equal(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, jax.device_get(expected))


@pytest.mark.parametrize(("part", "step"), [("", 3), ("checkpoints/3", 3), ("checkpoints/2", 2)])
def test_the_average_of_the_newest_or_of_the_asked_step(saved, part, step):
    workdir, states = saved
    assert states.keys() == {2, 3}
    trained = trained_run.load(workdir / part)
    assert trained.step == step
    assert_equal(trained.params, states[step].average)
    assert trained.config.model.vision.width == 32
    assert trained.config.data.text_templates[0] == "{name}"
    assert trained.tokenizer.convert_tokens_to_ids("[EMB]") > 0


def test_the_parameters_where_no_average_is_kept(saved, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"average_decay": 0.0}))
    assert_equal(trained_run.load(copy).params, saved[1][3].params)


def test_another_mesh_gives_the_same_parameters_with_the_same_fingerprint(saved, monkeypatch):
    workdir, states = saved
    sizes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    eight = trained_run.load(workdir, sizes)
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda s: make_mesh(s, jax.devices()[:1]))
    one = trained_run.load(workdir)
    assert one.mesh.size == 1
    assert dict(eight.mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
    split = eight.params["decoder"]["embedding"]
    assert split.addressable_shards[0].data.size == split.size // 4
    assert_equal(eight.params, jax.device_get(one.params))
    prints = {parameters_fingerprint(found.params) for found in (one, eight)}
    assert prints == {parameters_fingerprint(states[3].average)}
    assert prints != {parameters_fingerprint(states[3].params)}


# ---- mistakes ------------------------------------------------------------------------------------


def refused(folder, message, overrides=()):
    with pytest.raises(UserError, match=message) as error:
        trained_run.load(folder, overrides)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_run(saved, tmp_path):
    expected = r"no config\.json and checkpoints/ there; expected a workdir of training, or a step"
    for folder in (tmp_path, tmp_path / "nowhere", saved[0] / "checkpoints", tmp_path / "3"):
        refused(folder, f"^checkpoint {re.escape(str(folder))}: {expected}")
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_there(saved, copy):
    refused(saved[0] / "checkpoints" / "5", r"no such complete step; there are \[2, 3\]$")
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    refused(copy, r"no such complete step; there are \[\]$")


def test_another_tokenizer_than_the_trainings(copy):
    train_bpe(["a", "frog"], 300).save_pretrained(copy / "tokenizer")
    refused(copy, r"the tokenizer in tokenizer/ is \w{12}; expected \w{12}, that of the training$")
    shutil.rmtree(copy / "tokenizer")
    refused(copy, r"^tokenizer: .*run/tokenizer does not exist")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tokenizer": "x"}', "\xff"])
def test_a_config_that_is_none(copy, content):
    (copy / "config.json").write_text(content, encoding="latin-1")
    refused(copy, r"config\.json: .*; expected the config of a run$")


def test_a_run_of_an_earlier_version(copy):
    """Its config has no field for what came later."""
    config = json.loads((copy / "config.json").read_text())
    del config["model"]["decoder"]["attention"]
    (copy / "config.json").write_text(json.dumps(config))
    missing = r"model\.decoder\.attention: missing; expected one of plain, .*"
    refused(copy, rf"/config\.json: {missing}; expected the config of a run$")


def test_a_model_of_other_sizes(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["vision"]["mlp"] = 32
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, r"checkpoint .*: average/vision/.* is .*; this config has ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh.fsdp": 3}, r"mesh: .*, data=-1, fsdp=3, tensor=1 does not multiply to the 8 dev"),
        ({"mesh.data": 1, "mesh.tensor": 8}, r"mesh: model\.vision\.heads is 2"),
        ({"eval.batch_size": 12}, r"batch_size: 12 is not a multiple of the 8 parts"),
    ],
)
def test_a_mesh_that_does_not_fit(saved, overrides, message):
    refused(saved[0], message, overrides)


# ---- another image size --------------------------------------------------------------------------


def test_another_image_size_interpolates_the_position_embeddings(saved):
    workdir, states = saved  # of 32 pixels and patches of 8
    table = np.asarray(states[3].average["vision"]["position"])
    found = trained_run.load(workdir, {"model.vision.image_size": 48})
    assert found.model.config.vision.map_size == 6
    expected = interpolated_positions(table, 6)
    np.testing.assert_array_equal(found.params["vision"]["position"], expected)
    assert found.params["vision"]["position"].sharding.mesh == found.mesh
    same = states[3].average | {"vision": states[3].average["vision"] | {"position": expected}}
    assert_equal(found.params, same)


def test_an_image_size_that_is_no_multiple_of_the_patch(saved):
    refused(
        saved[0], r"model\.vision\.image_size 50 is not a mult", {"model.vision.image_size": 50}
    )


def test_a_run_of_packed_rows_in_parts_is_evaluated_in_whole_batches(saved, copy):
    """Its groups of 4 images and 2 parts would not divide a batch of 8 over 8 devices."""
    config = json.loads((copy / "config.json").read_text())
    sizes = {"images": 4, "rows": 4, "row_length": 20, "targets": 36}
    config["data"]["packing"] |= sizes
    config["accumulation_steps"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    found = trained_run.load(copy, {"mesh.data": 8, "eval.batch_size": 8})
    assert found.config.batch_size == 8
    assert_equal(found.params, saved[1][3].average)
