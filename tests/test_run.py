"""A run before its first step: its folder, and the mistakes that end it there."""

import json
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mmgem_jax import run, run_folder, train
from mmgem_jax.data.tokenizer import load_tokenizer
from mmgem_jax.errors import UserError

# ---- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def claimed(emoji_config, tmp_path):
    """`claim(changes)` claims a folder for the config with these changes, and the folder."""
    tokenizer = run.load_run_tokenizer(emoji_config())
    workdir = tmp_path / "deep" / "run"

    def claim(changes=()):
        run_folder.claim_workdir(workdir, run.complete(emoji_config(changes), tokenizer), tokenizer)

    return claim, workdir


def test_what_only_watches_a_run_may_change_in_its_folder(claimed):
    claim, workdir = claimed
    claim()
    changes = {"log.every": 7, "eval.every": 3, "checkpoint.keep": 9, "mesh.fsdp": 2}
    changes |= {"data.dir": "moved", "data.prefetch": 5, "data.read_threads": 2}
    changes |= {"data.max_bytes": 5, "model.vision.unroll": 2, "model.decoder.unroll": 2}
    claim(changes | {"compile_cache": "elsewhere"})
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["log"]["every"] == 7 and saved["compile_cache"] == "elsewhere"
    assert load_tokenizer(str(workdir / "tokenizer")).convert_tokens_to_ids("[EMB]") > 0


def test_what_makes_a_run_may_not_change_in_its_folder(claimed):
    claim, workdir = claimed
    claim({"optimizer.groups.rest.learning_rate": 0.25})
    before = (workdir / "config.json").read_text()
    changes = {"seed": 1, "optimizer.groups.rest.learning_rate": 0.5, "data.text_length": 9}
    with pytest.raises(UserError, match="holds another config's run: ") as error:
        claim(changes | {"log.every": 7})
    line = str(error.value)
    assert "\n" not in line and "log" not in line
    assert "seed is 0 there and 1 here" in line
    assert "optimizer.groups.rest.learning_rate is 0.25 there and 0.5 here" in line
    assert "data.text_length is 12 there and 9 here" in line
    assert (workdir / "config.json").read_text() == before


def test_what_only_reads_may_change_in_each_source_of_a_mixture_too(claimed):
    claim, workdir = claimed

    def mixture(**fields):
        sources = {"a": fields, "b": {}}
        claim({"data.mixture": ConfigDict(sources)})

    mixture(max_broken_share=0.1)
    mixture(max_broken_share=0.2, max_bytes=10**9)
    found = json.loads((workdir / "config.json").read_text())["data"]["mixture"]
    assert found == {"a": {"max_broken_share": 0.2, "max_bytes": 10**9}, "b": {}}
    with pytest.raises(UserError, match=r"data\.mixture\.a\.max_pixels is None there and 9 here;"):
        mixture(max_pixels=9)


OTHERS = "holds another config's run: "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json is no run's; expected one$"),
        ("[]", r"config\.json is no run's; expected one$"),
        ('{"model": null}', f"{OTHERS}.*expected the same config or an empty folder"),
        ('{"data": 3}', f"{OTHERS}.*expected the same config or an empty folder"),
    ],
)
def test_a_config_that_is_no_run_s_is_refused(claimed, content, message):
    claim, workdir = claimed
    claim()
    (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        claim()


def test_a_folder_that_cannot_be_a_runs_is_refused(claimed):
    claim, workdir = claimed
    workdir.parent.mkdir()
    workdir.write_text("a file in its place")
    expected = r"^workdir .*deep/run: File exists; expected what can be written$"
    with pytest.raises(UserError, match=expected):
        claim()
    workdir.unlink()
    claim()
    config = workdir / "config.json"
    config.write_text(config.read_text()[:-20])
    with pytest.raises(UserError, match=r"config\.json is no run's"):
        claim()


@pytest.mark.parametrize("taken", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_tokenizer_that_cannot_be_saved_is_one_line(claimed, taken):
    """By Python, and by what is written in Rust."""
    claim, workdir = claimed
    path, reason = workdir / taken, "File exists"
    path.parent.mkdir(parents=True)
    if taken == "tokenizer":
        path.write_text("")
    else:
        path.mkdir()
        reason = r"Is a directory \(os error 21\)"
    expected = rf"^{workdir}/tokenizer: {reason}; expected what can be written$"
    with pytest.raises(UserError, match=expected):
        claim()


def test_a_start_that_is_killed_while_it_claims_leaves_the_run_as_it_was(claimed, monkeypatch):
    claim, workdir = claimed
    claim()
    before = (workdir / "config.json").read_text()

    def killed(path, text):
        path.write_bytes(text[:10].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            claim({"log.every": 7})
    assert (workdir / "config.json").read_text() == before
    claim({"log.every": 7})


# ---- mistakes ------------------------------------------------------------------------------------

FULL_HEADS = {f"model.decoder.{name}": 4 for name in ("heads", "kv_heads")}
FULL_HEADS |= {"model.decoder.head_dim": 64}

MISTAKES = [
    ({"steps": 0}, r"steps: 0; expected a whole number from 1"),
    ({"batch_size": 12}, r"batch_size: 12 is not a multiple of the 8 parts"),
    ({"eval.batch_size": 12}, r"eval\.batch_size: 12 is not a multiple of the 8 parts"),
    (
        {"mesh.fsdp": 3},
        r"mesh: slice=1, data=-1, fsdp=3, tensor=1 does not multiply to the 8 devices",
    ),
    (
        {"mesh.tensor": 8, "model.decoder.kv_heads": 4},
        r"mesh: model\..*heads is \d; .* the 8 parts",
    ),
    ({"loss.embedding_weight": 0.0, "loss.generation_weight": 0.0}, r"loss: both weights are 0"),
    ({"model.decoder.vocab_size": 512}, r"model\.decoder\.vocab_size: 512 is below the 1024"),
    ({"model.vision.patch_size": 7}, r"model\.vision.* 32 .*vision\.patch_size 7"),
    ({"model.decoder.kv_heads": 3}, r"model\.decoder.* 4 .*decoder\.kv_heads 3"),
    (
        {"model.decoder.rope_scaling.type": "yarn"},
        r"model\.decoder\.rope_scaling\.type: 'yarn'; expected one of none, linear, llama3",
    ),
    (
        {"model.decoder.rope_scaling.factor": 0.0},
        r"model\.decoder\.rope_scaling\.factor: 0\.0; expected a number from",
    ),
    (
        {"model.decoder.attention": "flash"},
        r"model\.decoder\.attention: 'flash'; expected one of plain, rows, splash",
    ),
    (
        {"model.vision.attention": "rows"},
        r"model\.vision\.attention: rows, with \d heads of \d+ on a device; expected heads that",
    ),
    (
        {"model.decoder.attention": "rows", "data.caption_length": 600} | FULL_HEADS,
        r"model\.decoder\.attention: rows, .* rows of 6\d\d tokens .*; expected at most 16, or",
    ),
    ({"compiled_step": "/nowhere/step"}, r"/nowhere/step: No such file .*; expected a program"),
    ({"optimizer.warmup_steps": 10}, r"optimizer\.warmup_steps: 10 is not below .* 10 steps"),
    ({"optimizer.groups.rest.algorithm": "sgd"}, r"optimizer\.groups\.rest\.algorithm: 'sgd'"),
    ({"optimizer.groups.rest.pattern": "vision/.*"}, r"optimizer\.groups: parameter .* matched by"),
    ({"optimizer.groups.rest.algorithm": "muon"}, r"optimizer\.groups: muon takes matrices"),
    ({"data.tokenizer": "/nowhere/at all"}, r"tokenizer: /nowhere/at all does not exist"),
    ({"data.text_length": 2}, r"data\.text_length: 2; expected a whole number from 3"),
    ({"eval.splits": ("valid",)}, r"eval\.splits: emoji/fixture has no split 'valid'"),
    ({"eval.final_splits": ("tests",)}, r"eval\.final_splits: emoji/fixture has no split 'tests'"),
    ({"eval.caption_field": "caption"}, r"eval\.caption_field: no text field 'caption'; .*'name'"),
    ({"eval.class_field": "keywords"}, r"eval\.class_field: no text field 'keywords'"),
    ({"eval.sample_split": "train"}, r"eval\.sample_split: 'train' is not one of"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_ends_the_run_before_it_leaves_anything(emoji_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.train(emoji_config(changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.name": "", "data.files": ("shards/*.tar",)},
            r"data\.tokenizer: empty, as data\.name is; with data\.files expected a folder",
        ),
        (
            {"data.name": "", "data.mixture": ConfigDict({"a": {"name": "emoji/fixture"}})},
            r"data\.tokenizer: empty, as data\.name is; with a mixture expected a folder",
        ),
        ({"data.name": ""}, r"data\.name: no data set ''"),
        ({"data.tokenizer": None}, r"data\.tokenizer: None; expected text"),
        ({"init_from": "/nowhere"}, r"/nowhere: no config\.json and checkpoints/ there"),
    ],
)
def test_no_tokenizer_is_a_mistake(emoji_config, changes, message):
    with pytest.raises(UserError, match=message):
        run.load_run_tokenizer(emoji_config(changes))


def test_a_run_on_files_may_have_the_tokenizer_of_the_data_set_it_names(emoji_config):
    tokenizer = run.load_run_tokenizer(emoji_config({"data.files": ("shards/*.tar",)}))
    assert tokenizer.get_vocab() == run.load_run_tokenizer(emoji_config()).get_vocab()


def test_a_tokenizer_without_an_end_is_a_mistake(emoji_config, tmp_path):
    words = Tokenizer(models.WordLevel({"frog": 0, "<s>": 1}, unk_token="frog"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = emoji_config({"data.tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError, match=r"^tokenizer: .*/tokenizer has no eos_token, expected one"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("processes", "backend", "kept"),
    [(1, "cpu", True), (2, "tpu", True), (2, "cpu", False)],
)
def test_programs_of_several_processes_on_cpus_are_not_kept(
    processes, backend, kept, emoji_config, tmp_path, monkeypatch
):
    """Of two processes the first would load another program than the second compiles."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    try:
        run.keep_programs(emoji_config({"compile_cache": str(tmp_path)}))
        assert (jax.config.jax_compilation_cache_dir == str(tmp_path)) == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
