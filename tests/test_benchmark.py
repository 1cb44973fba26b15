"""tools/benchmark.py: what it times side by side does the same work; its figures on paper."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mmgem_jax import run
from mmgem_jax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "emoji_fixture.py"
SIZES = {
    "batch_size": 8,
    "mesh.data": 8,
    "model.vision.image_size": 16,
    "model.embedding_grid": 2,
    "model.generation_grid": 4,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture
def tool(monkeypatch):
    """The modules of the tools, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return __import__


def whole_images(config):
    """A batch of whole images, of which two pairs share an id."""
    batch = tiny.batch(config)
    batch["boxes"][:] = 0, 0, 1, 1
    batch["group_ids"][5] = batch["group_ids"][2]
    return batch


@pytest.mark.parametrize("changes", [{}, {"model.decoder.tie_embeddings": True}])
def test_ours_and_hugging_faces_step_do_the_same_work(tool, changes):
    measure, train = tool("measure"), tool("train_benchmark")
    config = measure.with_adamw(tiny.config(SIZES | changes))
    batch = whole_images(config)
    ours = measure.OurStep(config, batch)
    theirs, absent = train.reference_steps(config, batch, ours.params, forms=("eager",))
    assert not absent
    rows = train.agreement(ours(), theirs)
    assert [line["name"] for line in rows] == ["loss_emb", "loss_gen"]
    # The gradients as well: else the losses would part after some steps.
    for _ in range(4):
        metrics, expected = ours(), theirs["eager"]()
        found = [float(metrics["loss_emb"]), float(metrics["loss_gen"])]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    start = rows[0]["ours"], rows[1]["ours"]
    assert np.abs(np.subtract(start, found)).min() > 0.01  # it learns


def test_steps_that_do_other_work_are_not_timed(tool):
    measure, train = tool("measure"), tool("train_benchmark")
    config = measure.with_adamw(tiny.config(SIZES))
    batch = whole_images(config)
    ours = measure.OurStep(config, batch)
    theirs, _ = train.reference_steps(config, batch, ours.params, forms=("eager",))
    ours.params["text_projection"]["kernel"] *= -1
    ours.begin_from(ours.params)
    with pytest.raises(UserError, match=r"loss_emb is .*expected the same to 0\.0001"):
        train.agreement(ours(), theirs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.vision.dtype": "bfloat16"}, r"model\.vision\.dtype: bfloat16; expected float32"),
        ({"loss.generation_weight": 0.0}, r"loss: .*expected both"),
        ({"model.generation_grid": 3}, r"model\.generation_grid: 3; expected a divisor of 4"),
    ],
)
def test_a_step_that_hugging_face_has_not_is_absent_with_a_reason(tool, changes, reason):
    config = tool("measure").with_adamw(tiny.config(SIZES | changes))
    train, batch = tool("train_benchmark"), whole_images(config)
    steps, absent = train.reference_steps(config, batch, {}, train.FORMS)
    assert not steps
    assert set(absent) == {"eager", "torch.compile"}
    with pytest.raises(UserError, match=reason):
        raise UserError(absent["eager"])


def test_regions_are_absent_with_a_reason(tool):
    config = tool("measure").with_adamw(tiny.config(SIZES))
    batch = tiny.batch(config, regions=2)
    _, absent = tool("train_benchmark").reference_steps(config, batch, {}, ("eager",))
    assert "expected whole images" in absent["eager"]


def test_without_torch_the_reference_is_absent_with_what_to_install(tool, monkeypatch):
    train = tool("train_benchmark")
    monkeypatch.setitem(sys.modules, "torch_step", None)
    steps, absent = train.reference_steps(None, None, None, train.FORMS)
    assert not steps
    assert absent["eager"].endswith("pip install -e '.[torch]'")


def test_calls_take_turns_and_the_first_do_not_count(tool):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = tool("measure").times_in_turns(functions, 3)
    assert calls == ["a", "b"] * 5
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_an_exponent_is_that_of_the_larger_half(tool):
    exponent = tool("growth_benchmark").exponent
    assert exponent([1, 2, 4, 8, 16], [5, 5, 4**2, 8**2, 16**2]) == pytest.approx(2)


def test_every_growth_changes_its_shapes_alone_and_trains(tool):
    growth, measure = tool("growth_benchmark"), tool("measure")
    base = growth.base_config(tiny.config({"mesh.data": 8}))
    before = {name: x.shape for name, x in growth.synthetic_batch(base).items()}
    for name, each in growth.GROWTHS.items():
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict(each.fields(base, each.values[1]))
        batch = growth.synthetic_batch(config)
        shapes = run.batch_shapes(config)
        assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
            key: (x.shape, x.dtype) for key, x in shapes.items()
        }
        assert {key: x.shape for key, x in batch.items()} != before, name
    metrics = measure.OurStep(config, batch)()  # that of the regions
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    assert metrics["masked_share"] < 1


def test_numbers_of_the_products_on_paper(tool):
    growth = tool("growth_benchmark")
    config = tiny.config()
    shapes = run.batch_shapes(config)
    # 16 cells and the class token, width 32, mlp 48, 4 heads, 2 layers.
    vision = 16 * 32 + 2 * (17 * (6 * 32 + 48) + 4 * 17**2)
    # Heads of 4 x 8, key heads of 2 x 8; rows of 7 tokens, and of 4 cells and 5 tokens.
    of_row = lambda T: 2 * (T * (2 * 32 + 2 * 16 + 2 * 32 + 2 * 48) + 4 * T**2)  # noqa: E731
    region = (1 + 4) * 32 + 4 * 32 + 2 * 16 + of_row(7) + of_row(9) + 5 * 128
    assert growth.product_numbers(config, shapes) == 8 * (vision + region) + 8**2


def run_tool(*arguments):
    """The benchmark in a process of its own, from the checkout's root."""
    command = [sys.executable, "tools/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_train_gives_rows_for_ours_and_theirs(tool, emoji_config, monkeypatch):
    train = tool("train_benchmark")
    monkeypatch.setattr(train, "FORMS", ("eager",))  # the other one is compiled for a minute
    torch_step = tool("torch_step")
    monkeypatch.setattr(torch_step.os, "cpu_count", lambda: 1)  # its threads wait for each other
    monkeypatch.setattr(train, "ROUNDS", 10)  # more than the steps of the config's schedule
    found = train.benchmark_train(emoji_config())
    rows = {row["name"]: row for row in json.loads(json.dumps(found))}
    assert all(set(row) >= {"name", "ours", "reference", "ratio", "unit"} for row in rows.values())
    assert rows["train step"]["ours"] >= rows["fastest train step"]["ours"] > 0
    assert rows["train step's rate"]["ratio"] > 0
    assert rows["AdamW step beside eager"]["ratio"] > 0


def test_what_it_does_not_know_it_refuses():
    done = run_tool("everything", "--config", CONFIG)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: arguments: found everything; expected one of train, growth, accumulation, "
        "checkpoint, data, faults, contrastive, caption_loss, packing, decode"
    ]


def test_a_picture_of_another_benchmark_is_refused(tmp_path):
    done = run_tool("data", "--config", CONFIG, "--plot", tmp_path / "curves.png")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --plot: given with data; expected it with growth alone"
    ]
