"""tools/export_torch.py on a small run: what it writes, and every mistake in one line."""

import functools
import importlib.util
import json
import shutil

import pytest
import tiny_dataset

from mmgem_jax import trained_run
from mmgem_jax.convert import verify
from mmgem_jax.evaluation.results import parameters_fingerprint


@pytest.fixture(scope="module")
def workdir(trained):
    return trained[0]


@pytest.fixture
def export(call_tool):
    """`export(*arguments)` calls the tool."""
    return functools.partial(call_tool, "export_torch.py")


def test_the_whole_model_verified(workdir, export, tmp_path):
    out = tmp_path / "new" / "folder"
    status, printed, err = export("--checkpoint", workdir, "--out", out)
    assert (status, err) == (0, "")
    assert printed.startswith(f"{out}: step 3, model, float32; largest difference ")
    assert printed.endswith(", 32 texts equal\n") and printed.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "modeling_mmgem.py", "parity.json"),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    parity = json.loads((out / "parity.json").read_text())
    assert parity["samples"] == "emoji/fixture test"
    card = (out / "README.md").read_text()
    assert max(map(len, card.splitlines())) <= 100
    assert card.startswith("---\nlibrary_name: transformers\n") and "{" not in card
    assert (
        "from step 3 of a run" in card
        and parameters_fingerprint(trained_run.load(workdir).params) in card
    )
    for name, value in parity["largest_difference"].items():
        assert f"| {name} | {value:.1e} |" in card
    assert "All 32 greedily generated texts are equal" in card
    # A folder that is there is never written over.
    status, _, err = export("--checkpoint", workdir, "--out", out)
    assert status == 2 and "exists already; expected a new or an empty folder" in err


def test_a_tower_in_small_files_with_a_users_own_texts(workdir, export, tmp_path):
    arguments = "--checkpoint", workdir / "checkpoints" / "2", "--out", tmp_path / "llama"
    options = "--what", "decoder", "--dtype", "bfloat16", "--max_shard_size", "40KB"
    status, printed, err = export(*arguments, *options, "--texts", "red hat", "a key")
    assert (status, err) == (0, "")
    assert "step 2, decoder, bfloat16; largest difference" in printed
    names = {path.name for path in (tmp_path / "llama").iterdir()}
    assert {"generation_config.json", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert "modeling_mmgem.py" not in names and "preprocessor_config.json" not in names
    parity = json.loads((tmp_path / "llama" / "parity.json").read_text())
    assert (parity["texts"], parity["images"], parity["samples"]) == (2, 0, "given")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_comparison(workdir, export, tmp_path):
    arguments = "--checkpoint", workdir, "--out", tmp_path / "clip", "--what", "vision"
    status, printed, err = export(*arguments, "--no-verify", "--mesh", "data=4,tensor=2")
    assert (status, err) == (0, "")
    assert "not compared with the run" in printed
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    }
    assert "Not compared" in (tmp_path / "clip" / "README.md").read_text()


def test_what_differs_is_not_written(workdir, export, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BOUND", 1e-12)
    arguments = "--checkpoint", workdir, "--out", tmp_path / "clip", "--what", "vision"
    status, _, err = export(*arguments)
    assert status == 2 and err.count("\n") == 1
    assert "verification: feature_map: found a difference of" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "nowhere"), "checkpoint nowhere: no config.json"),
        (("--checkpoint", "{run}/checkpoints/7"), "no such complete step; there are [2, 3]"),
        (("--checkpoint", "{run}", "--what", "text"), "invalid choice: 'text'"),
        (("--checkpoint", "{run}", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("--checkpoint", "{run}", "--max_shard_size", "5 apples"), "--max_shard_size: found '5 a"),
        (("--checkpoint", "{run}", "--max_shard_size", "0"), "expected a size such as 500MB"),
        (("--checkpoint", "{run}", "--mesh", "data=x"), "--mesh: found 'data=x', expected AXIS"),
        (("--checkpoint", "{run}", "--mesh", "data=3"), "does not multiply to the 8 devices"),
        (
            ("--checkpoint", "{run}", "--images", "no.png", "--texts", "a"),
            "--images no.png: No such file",
        ),
        (("--checkpoint", "{run}", "--texts", "a hat"), "--images: found none; expected one"),
        (
            ("--checkpoint", "{run}", "--no-verify", "--texts", "a"),
            "--no-verify: found --images",
        ),
        ((), "the following arguments are required: --checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(workdir, export, tmp_path, arguments, message):
    arguments = [argument.format(run=workdir) for argument in arguments]
    status, out, err = export(*arguments, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "given", "missing"),
    [
        ("model", ("--images", "1.png"), "texts"),
        ("model", ("--texts", "a hat"), "images"),
        ("decoder", ("--images", "1.png"), "texts"),
        ("vision", ("--texts", "a hat"), "images"),
    ],
)
def test_what_a_comparison_lacks_is_said_before_the_run_is_read(
    workdir, export, tmp_path, monkeypatch, what, given, missing
):
    monkeypatch.setattr(trained_run, "load", None)
    arguments = "--checkpoint", workdir, "--out", tmp_path / "out", "--what", what
    status, _, err = export(*arguments, *given)
    assert status == 2 and f"--{missing}: found none; expected one or more" in err
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be(workdir, export, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    for out in (taken, taken / "inner"):
        status, _, err = export("--checkpoint", workdir, "--out", out)
        assert status == 2 and err.count("\n") == 1 and f"--out {out}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_run_whose_data_are_gone(workdir, export, tmp_path):
    gone = shutil.copytree(workdir, tmp_path / "run")
    fields = json.loads((gone / "config.json").read_text())
    fields["data"]["name"] = ""
    (gone / "config.json").write_text(json.dumps(fields))
    image = tmp_path / "1.png"
    image.write_bytes(tiny_dataset.png(1))
    arguments = "--checkpoint", gone, "--out", tmp_path / "out", "--what", "vision"
    status, _, err = export(*arguments)
    assert status == 2 and "data.name: the run has none; expected --images and --texts" in err
    assert not (tmp_path / "out").exists()
    status, out, err = export(*arguments, "--images", image)
    assert (status, err) == (0, "") and "largest difference" in out


def test_torch_that_is_not_installed(workdir, export, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = export("--checkpoint", workdir, "--out", tmp_path / "out")
    assert status == 2 and "--verify: torch is not installed; expected it, or --no-verify" in err
