"""Twenty steps at once are twenty in any parts: packed rows of two sources, accumulated."""

import shutil

import jax
import numpy as np
import pytest
from kill_runs import kill_often
from small_run import small_run
from stopped_runs import (
    lines_of,
    on_devices,
    parts_of,
    reproducible,
    start,
    state_of,
    stop_after,
)

from mmgem_jax import train
from mmgem_jax.errors import RunEnded, UserError

STEPS, KILLS = 20, 10
STOPS = (3, 4, 11)  # between lines of metrics, and between checkpoints that are due
CHANGES = {
    "steps": STEPS,
    "log.every": 5,
    "log.conflict_every": 0,
    "checkpoint.every": 6,
    "eval.splits": (),
    "eval.final_splits": (),
    "eval.sample_split": "",
    "data.packing.images": 4,
    "accumulation_steps": 2,
}
PACKING = {
    "drawings": dict(rows=3, row_length=18, targets=36),
    "regions": dict(rows=16, row_length=24, targets=90),
}


@pytest.fixture(scope="module")
def config(regions_config):
    made = regions_config(CHANGES)
    with made.data.mixture.unlocked():
        del made.data.mixture.scenes
        for name, packing in PACKING.items():
            made.data.mixture[name].packing = packing
    return made


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    start(config, workdir, 1)
    return workdir


def start_until(config, workdir, step):
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        stop_after(patch, step)
        with pytest.raises(RunEnded, match=f"stopped after step {step} of 20") as ended:
            train.train(config, workdir)
    assert ended.value.status == 143
    assert f"{step}" in [path.name for path in (workdir / "checkpoints").iterdir()]


def test_any_parts_of_a_run_are_the_whole_run(config, straight, tmp_path):
    for step in STOPS:
        start_until(config, tmp_path, step)
    start(config, tmp_path, 1)
    assert reproducible(lines_of(tmp_path)) == reproducible(lines_of(straight))
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        *_, abstract = parts_of(config)
    states = [state_of(folder, abstract) for folder in (tmp_path, straight)]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), *states)


def test_it_goes_on_with_other_parts_of_a_batch_and_other_rematerialisation(
    config, straight, tmp_path
):
    shutil.copytree(straight, tmp_path / "run")
    for step in (18, 20):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    other = config.copy_and_resolve_references()
    other.accumulation_steps, other.data.workers = 1, 1
    other.model.vision.remat = other.model.decoder.remat = "full"
    start(other, tmp_path / "run", 1)
    lines = [
        [line for line in lines_of(w) if line["step"] > 12] for w in (tmp_path / "run", straight)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for found, expected in zip(*map(reproducible, lines), strict=True):
        losses = {name: value for name, value in expected.items() if "/loss" in name}
        assert {name: found[name] for name in losses} == pytest.approx(losses, rel=1e-4)


def test_every_source_has_a_line_though_no_part_had_all_of_them(straight):
    lines = [line for line in lines_of(straight) if any(n.startswith("train/") for n in line)]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(f"train/{source}/loss" in lines[-1] | lines[-2] for source in PACKING)


def test_a_config_of_other_data_is_refused_with_the_difference(config, straight):
    other = config.copy_and_resolve_references()
    other.seed, other.data.mixture.regions.weight = 7, 3.0
    with pytest.raises(UserError, match=r"weight is .* and 3\.0 here; seed is 0 there and 7"):
        start(other, straight, 1)


# ---- killed at random moments --------------------------------------------------------------------


def test_a_run_that_is_killed_ten_times_ends_bit_for_bit_as_one_left_alone(tmp_path):
    found = kill_often(small_run(tmp_path, 2 * KILLS), tmp_path, KILLS)
    assert found["bitwise_equal"], found["differences"]
    assert sum(found["killed_in"].values()) == found["kills"] == KILLS
    assert found["killed_in"]["start-up"] >= 1
    assert found["killed_in"]["saving"] >= 1
    assert found["with_workers"] >= 2 and found["orphaned_seconds"] < 30
