"""Stage 2 on configs/emoji_regions_fixture.py, from a run of stage 1, in this process."""

import jax
import numpy as np
import pytest
from stopped_runs import lines_of, parts_of, reproducible, start, state_of, stop_at_batch

from mmgem_jax import run, sharding, train_state
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.models.vision import interpolated_positions
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step

SOURCES = ("drawings", "regions", "scenes")
BRIEF = {
    "steps": 8,
    "log.every": 4,
    "checkpoint.every": 4,
    "log.conflict_every": 0,
    "eval.splits": (),
    "eval.final_splits": ("unseen",),
    "eval.sample_split": "",
    "data.mixture.drawings.weight": 1.0,  # so that four batches have all sources
}


def assert_equal(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, expected)


@pytest.fixture(scope="module")
def stage2(regions_config, trained, tmp_path_factory):
    """The config, workdir and results of a run from stage 1 that nothing stops."""
    config = regions_config(BRIEF | {"init_from": str(trained[0])})
    workdir = tmp_path_factory.mktemp("stage2")
    return config, workdir, start(config, workdir, 1)


def test_the_metrics_of_each_source_have_its_name(stage2):
    _, workdir, results = stage2
    lines = [line for line in lines_of(workdir) if any(n.startswith("train/") for n in line)]
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        assert {f"train/{source}/loss" for source in SOURCES} <= line.keys()
        assert 1 < line["train/regions/regions_per_image"] <= 6
        assert 0 < line["train/regions/masked_share"] < 1
        assert line["train/drawings/regions_per_image"] == 0  # but whole images
    assert results["splits"].keys() == {"unseen"}


def test_stage_2_stopped_and_started_again_is_the_whole_run(stage2, tmp_path):
    config, workdir, results = stage2
    start(config, tmp_path, 1, stop_at_batch, 7)
    assert start(config, tmp_path, 1)["splits"] == results["splits"]
    assert reproducible(lines_of(tmp_path)) == reproducible(lines_of(workdir))
    *_, abstract = parts_of(config)
    states = [jax.device_get(state_of(folder, abstract)) for folder in (tmp_path, workdir)]
    assert int(states[0].step) == 8
    assert_equal(*states)


def test_stage_2_begins_with_what_stage_1_came_to(regions_config, trained, tmp_path):
    """No step changes anything where the learning rates are 0."""
    workdir, _, states = trained
    still = {f"optimizer.groups.{g}.learning_rate": 0.0 for g in ("decoder", "vision", "rest")}
    still |= {"steps": 1, "optimizer.warmup_steps": 0, "init_from": str(workdir)}
    config = regions_config(BRIEF | still)
    start(config, tmp_path, 1)
    *_, abstract = parts_of(config)
    found, expected = jax.device_get((state_of(tmp_path, abstract).params, states[3].average))
    position = interpolated_positions(expected["vision"]["position"], 6)
    assert_equal(found, expected | {"vision": expected["vision"] | {"position": position}})


def test_a_step_is_compiled_once_for_any_number_of_regions(regions_config):
    """Of one source, that is; each has its own shape."""
    config, mesh, model, tokenizer, abstract = parts_of(regions_config())
    batches = training_batches(config, tokenizer)
    taken = [next(batches) for _ in range(10)]
    batches.close()
    regions = [batch for batch in taken if SOURCES[batch["source"][0]] == "regions"]
    assert len({int(batch["region_mask"].sum()) for batch in regions}) > 2
    optimizer = make_optimizer(config.optimizer)
    step = make_train_step(model, optimizer, config)
    with sharding.use_mesh(mesh):
        shapes = run.batch_shapes(config)
        state = train_state.init_state(model, optimizer, abstract, shapes, config.seed)
        compiled = compile_step(step, train_state.shardings_of(abstract), mesh, {})
        for batch in taken:
            state, _ = compiled(state, sharding.to_global(batch, mesh))
    assert compiled._cache_size() == len(SOURCES)
