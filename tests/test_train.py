"""Whole runs of configs/emoji_fixture.py, in this process."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from stopped_runs import (
    lines_of,
    on_devices,
    parts_of,
    reproducible,
    start,
    state_of,
    stop_at_batch,
    stop_at_line,
)

from mmgem_jax import run, run_folder, sharding, train
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.suite import PROTOCOL, Evaluator, results_table
from mmgem_jax.flops import train_flops

SPLITS = {"validation": 34, "test": 34, "unseen": 6, "unseen_validation": 6}
BRIEF = {"eval.splits": (), "eval.final_splits": ("unseen",), "eval.sample_split": ""}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "log.conflict_every": 0}
TRACE = {"log.peak_flops": 1e12, "log.profile_from": 9, "log.profile_steps": 1}
PACKED = {"data.packing.images": 4, "data.packing.rows": 4, "data.packing.row_length": 20}
PACKED |= {"data.packing.targets": 36, "data.packing.waiting": 3, "accumulation_steps": 2}
CHANGES = {1: TRACE, 8: BRIEF | MESH | {"eval.splits": ("unseen_validation",)}}  # by devices
CHANGES[2] = BRIEF | PACKED | {"eval.splits": (), "mesh.data": 2, "log.conflict_every": 0}


@pytest.fixture(scope="module")
def whole_run(emoji_config, tmp_path_factory):
    """`whole_run(devices)`: the config, results and folder of a run that nothing stops."""
    made = {}

    def get(devices):
        if devices not in made:
            workdir = tmp_path_factory.mktemp(f"whole-{devices}")
            config = emoji_config(CHANGES[devices])
            made[devices] = config, start(config, workdir, devices), workdir
        return made[devices]

    return get


# ---- what a run leaves ---------------------------------------------------------------------------


def test_every_line_of_metrics_has_its_documented_names(whole_run):
    config, _, workdir = whole_run(1)
    lines = lines_of(workdir)
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8, 10]
    names = "loss loss_emb loss_gen temperature grad_norm grad_norm_decoder perplexity"
    for line in training:
        assert {f"train/{name}" for name in names.split()} <= line.keys()
        weighted = config.loss.embedding_weight * line["train/loss_emb"]
        weighted += config.loss.generation_weight * line["train/loss_gen"]
        assert line["train/loss"] == pytest.approx(weighted)
        assert ("train/decoder_grad_cosine" in line) == (line["step"] % 4 == 0)
        assert line["perf/images_per_second"] * line["perf/step_seconds"] == pytest.approx(16)
        assert 0 <= line["perf/data_wait_share"] <= 1
        assert line["perf/mfu"] == pytest.approx(line["perf/teraflops_a_device"])
    assert 0.05 < training[-1]["train/temperature"] < 0.1
    assert training[-1]["train/loss"] < training[0]["train/loss"]

    during = ["unseen_validation", "validation"]
    expected = [*((4, s) for s in during), *((8, s) for s in during), *((10, s) for s in SPLITS)]
    found = []
    for line in lines:
        pattern = r"eval/(\w+)/(?:retrieval|zero_shot|caption)/\w+"
        splits = {re.fullmatch(pattern, name)[1] for name in line if name.startswith("eval/")}
        found += [(line["step"], split) for split in splits]
        assert all(isinstance(value, float) for name, value in line.items() if name != "step")
    assert sorted(found) == sorted(expected)


def test_model_flops_are_those_of_the_steps_taken(whole_run):
    config, _, workdir = whole_run(1)
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        config, *_ = parts_of(config)
    flops = sum(train_flops(config, run.batch_shapes(config)).values())
    for line in lines_of(workdir):
        if "perf/mfu" in line:
            assert line["perf/mfu"] * 1e12 * line["perf/step_seconds"] == pytest.approx(flops)


def test_norms_of_the_towers_make_up_the_whole(whole_run):
    line = next(line for line in lines_of(whole_run(1)[-1]) if "train/loss" in line)
    for kind in ("grad_norm", "param_norm"):
        names = [name for name in line if name.startswith(f"train/{kind}_")]
        assert {f"train/{kind}_vision", f"train/{kind}_decoder"} < set(names)
        assert sum(line[name] ** 2 for name in names) ** 0.5 == pytest.approx(line[f"train/{kind}"])


def test_a_trace_of_the_chosen_step_is_left(whole_run):
    traces = list((whole_run(1)[-1] / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    content = traces[0].read_bytes()
    assert b"train_step" in content and b"step_num" in content
    assert not (whole_run(8)[-1] / "profile").exists()


def test_tensorboard_has_what_the_lines_have(whole_run):
    *_, workdir = whole_run(1)
    assert len(list((workdir / "tensorboard").glob("events.out.tfevents.*"))) >= 1
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    shown = event_accumulator.EventAccumulator(
        str(workdir / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    expected = {}
    for line in lines_of(workdir):
        for name in line.keys() - {"step"}:
            expected.setdefault(name, []).append((line["step"], np.float32(line[name])))
    found = {
        name: [(scalar.step, scalar.value) for scalar in shown.Scalars(name)]
        for name in shown.Tags()["scalars"]
    }
    assert found == expected


def test_results_say_what_was_measured_and_how(whole_run):
    _, results, workdir = whole_run(1)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["protocol"] == PROTOCOL
    assert (results["step"], results["data"]) == (10, "emoji/fixture")
    assert results["config"]["model"]["vision"]["width"] == 32
    assert {split: found["images"] for split, found in results["splits"].items()} == SPLITS
    for split, found in results["splits"].items():
        assert 0 < found["classes"] <= SPLITS[split]
        assert found["texts"] == SPLITS[split]  # every drawing of a split has its own name
        metrics, floors = found["metrics"], found["floors"]
        kinds = {name.split("/")[0] for name in metrics}
        assert kinds == {"retrieval", "zero_shot", "caption"}
        for name, value in metrics.items():
            assert 0 <= value <= (SPLITS[split] if name.endswith("median_rank") else 1)
        assert floors["chance"]["retrieval/image_to_text_r1"] == pytest.approx(1 / SPLITS[split])
        # Only drawings of known names can be found by their likeness to training drawings.
        assert ("pixels" in floors) == (split in ("validation", "test"))
    final = {k: v for line in lines_of(workdir) if line["step"] == 10 for k, v in line.items()}
    for split, found in results["splits"].items():
        assert {k: final[f"eval/{split}/{k}"] for k in found["metrics"]} == found["metrics"]
    table = results_table(results)
    for split, found in results["splits"].items():
        assert split in table
        assert f"{found['metrics']['caption/token_f1']:.3f}" in table
    with Image.open(workdir / "samples.png") as picture:
        assert picture.width > 300 and picture.height > 300


def test_the_evaluation_uses_the_averaged_parameters(whole_run):
    config, results, workdir = whole_run(1)
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        config, mesh, model, tokenizer, abstract = parts_of(config)
    state = state_of(workdir, abstract)
    evaluator = Evaluator(config, model, tokenizer, mesh)
    with sharding.use_mesh(mesh):
        for split in ("test", "unseen"):
            metrics = results["splits"][split]["metrics"]
            assert evaluator.evaluate(state.average, split) == metrics
        assert evaluator.evaluate(state.params, "test") != results["splits"]["test"]["metrics"]


# ---- stopping and starting -----------------------------------------------------------------------


def assert_same_run(config, workdir, results, whole, devices):
    _, whole_results, whole_workdir = whole
    assert results["splits"] == whole_results["splits"]
    assert reproducible(lines_of(workdir)) == reproducible(lines_of(whole_workdir))
    pictures = [list(folder.glob("samples.png")) for folder in (workdir, whole_workdir)]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, devices)
        *_, abstract = parts_of(config)
    states = [state_of(folder, abstract) for folder in (workdir, whole_workdir)]
    assert int(states[0].step) == 10
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), *states)


def test_a_run_stopped_and_started_again_is_the_whole_run(whole_run, emoji_config, tmp_path):
    whole = whole_run(1)
    config = emoji_config({"data.workers": 1})  # whoever makes the batches
    # The evaluation of step 4 is half written, and no checkpoint is there yet.
    start(config, tmp_path, 1, stop_at_line, 4, "eval/unseen_validation")
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 4]
    # The data end at the seventh batch; the checkpoint is of step 4.
    start(config, tmp_path, 1, stop_at_batch, 7)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 4, 4, 6]
    results = start(config, tmp_path, 1)
    assert_same_run(config, tmp_path, results, whole, 1)


def test_so_it_is_on_a_mesh_of_eight_devices(whole_run, emoji_config, tmp_path):
    whole = whole_run(8)
    config = emoji_config(CHANGES[8])
    start(config, tmp_path, 8, stop_at_batch, 7)
    results = start(config, tmp_path, 8)
    assert_same_run(config, tmp_path, results, whole, 8)


def test_so_it_is_with_packed_rows_in_parts(whole_run, emoji_config, tmp_path):
    whole = whole_run(2)
    config = emoji_config(CHANGES[2])
    start(config, tmp_path, 2, stop_at_batch, 7)
    results = start(config, tmp_path, 2)
    assert_same_run(config, tmp_path, results, whole, 2)
    training = [line for line in lines_of(tmp_path) if "train/loss" in line]
    assert all(0.5 < line["train/packed_share"] <= 1 for line in training)
    assert all(line["perf/teraflops_a_device"] > 0 for line in training)
    assert training[-1]["train/loss"] < training[0]["train/loss"]


def test_eight_devices_train_as_one_does(whole_run):
    one, eight = (lines_of(whole_run(devices)[-1]) for devices in (1, 8))
    one, eight = ([line for line in lines if "train/loss" in line] for lines in (one, eight))
    assert [line["step"] for line in one] == [line["step"] for line in eight]
    for name in ("train/loss", "train/loss_emb", "train/loss_gen"):
        expected = pytest.approx([line[name] for line in one], rel=1e-4)
        assert [line[name] for line in eight] == expected


def test_a_finished_run_started_again_trains_nothing(whole_run, emoji_config, capsys, monkeypatch):
    """And no other comes into its folder while it is at that."""
    _, results, workdir = whole_run(8)
    before, evaluation = lines_of(workdir), train.final_evaluation
    stop_at_batch(monkeypatch, 1)
    monkeypatch.setattr(run_folder, "PATIENCE", 0)

    def final_evaluation(*arguments):
        with pytest.raises(UserError, match="is at work in it"), run_folder.held(workdir):
            raise AssertionError
        return evaluation(*arguments)

    monkeypatch.setattr(train, "final_evaluation", final_evaluation)
    config = emoji_config(CHANGES[8])
    assert train.train(config, workdir)["splits"] == results["splits"]
    assert lines_of(workdir) == before
    assert "resumed at 10" in capsys.readouterr().out
    with run_folder.held(workdir):  # it is free again
        pass


# ---- one objective alone -------------------------------------------------------------------------

SHORT = BRIEF | {"steps": 4, "log.every": 1, "log.conflict_every": 2, "checkpoint.every": 0}


@pytest.mark.parametrize(
    ("alone", "other"), [("embedding", "generation"), ("generation", "embedding")]
)
def test_an_objective_alone(emoji_config, tmp_path, alone, other):
    weights = {f"loss.{alone}_weight": 2.0, f"loss.{other}_weight": 0.0}
    results = start(emoji_config(SHORT | weights), tmp_path, 1)
    training = [line for line in lines_of(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line["train/loss"] == pytest.approx(2 * line[f"train/loss_{alone[:3]}"])
        assert f"train/loss_{other[:3]}" not in line
        assert "train/decoder_grad_cosine" not in line
        idle = "text_projection" if alone == "generation" else "visual_token_projection"
        assert line[f"train/grad_norm_{idle}"] == 0
    # Not at once: until a decoder's block adds something, captions do not see the image.
    assert training[-1]["train/grad_norm_vision"] > 0
    assert results["splits"].keys() == {"unseen"}
    assert not (tmp_path / "samples.png").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
