"""A compiled train step in a file: it does what the step does, and only for the run it is of."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from stopped_runs import lines_of, on_devices, parts_of, reproducible, start

from mmgem_jax import run, saved_program, sharding, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step


@pytest.fixture(autouse=True)
def without_cache():
    """On CPUs a program that comes out of the cache of compiled programs cannot be saved whole."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@functools.cache
def made():
    """Config, mesh, fresh state's maker, batch, jitted step and fingerprint of the tiny run."""
    config = tiny.config({"mesh.fsdp": 2})
    mesh = sharding.make_mesh(config.mesh)
    model, optimizer = run.build_model(config.model), make_optimizer(config.optimizer)
    shapes = run.batch_shapes(config)
    abstract = train_state.abstract_state(model, optimizer, False, shapes, mesh)
    shardings = train_state.shardings_of(abstract)
    step = compile_step(
        make_train_step(model, optimizer, config), shardings, mesh, config.tpu_options
    )
    start = functools.partial(train_state.init_state, model, optimizer, abstract, shapes, 0)
    batch = sharding.to_global(tiny.batch(config), mesh)
    return mesh, start, batch, step, saved_program.fingerprint_of(config, shapes, mesh)


def test_a_loaded_step_is_the_step(tmp_path):
    mesh, start, batch, step, fingerprint = made()
    with sharding.use_mesh(mesh):
        compiled = step.lower(start(), batch).compile()
        saved_program.save_program(tmp_path / "step", compiled, fingerprint)
        loaded = saved_program.load_program(tmp_path / "step", fingerprint, mesh)
        ours, theirs = loaded(start(), batch), compiled(start(), batch)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((ours, theirs)))


def test_another_run_s_program_is_refused_by_what_differs(tmp_path):
    mesh, start, batch, step, fingerprint = made()
    with sharding.use_mesh(mesh):
        compiled = step.lower(start(), batch).compile()
    saved_program.save_program(tmp_path / "step", compiled, fingerprint)
    for changes, message in (
        ({"model.decoder.remat": "full"}, "config.model.decoder.remat is 'none' there and 'full'"),
        ({"accumulation_steps": 2}, "config.accumulation_steps is 1 there and 2 here"),
        ({"loss.mask_overlap": 0.7}, "config.loss.mask_overlap is 0.5 there and 0.7 here"),
    ):
        config = tiny.config({"mesh.fsdp": 2} | changes)
        other = saved_program.fingerprint_of(config, run.batch_shapes(config), mesh)
        with pytest.raises(UserError, match=message):
            saved_program.load_program(tmp_path / "step", other, mesh)
    turned = sharding.make_mesh(tiny.config({"mesh.fsdp": 4}).mesh)
    other = saved_program.fingerprint_of(tiny.config(), run.batch_shapes(tiny.config()), turned)
    with pytest.raises(UserError, match="mesh is slice=1, data=4, fsdp=2, tensor=1 there"):
        saved_program.load_program(tmp_path / "step", other, turned)


@pytest.mark.parametrize("content", [None, b"", b"no pickle", b"\x80\x04K\x01."])
def test_a_file_that_is_none_of_ours_is_one_line(tmp_path, content):
    path = tmp_path / "step"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"step: .*; expected a program of"):
        saved_program.load_program(path, {}, None)


SHORT = {"steps": 3, "log.every": 1, "log.conflict_every": 0, "compile_cache": ""}
SHORT |= {"eval.splits": (), "eval.final_splits": ("unseen",), "eval.sample_split": ""}


def test_a_run_may_start_from_a_compiled_step(emoji_config, tmp_path):
    changes = SHORT | {"compiled_step": str(tmp_path / "step")}
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 2)
        config, mesh, model, _, abstract = parts_of(emoji_config(SHORT))
    shapes = run.batch_shapes(config)
    step = make_train_step(model, make_optimizer(config.optimizer), config)
    step = compile_step(step, train_state.shardings_of(abstract), mesh, config.tpu_options)
    rows = sharding.batch_sharding(mesh)
    batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for n, x in shapes.items()}
    with sharding.use_mesh(mesh):
        compiled = step.lower(abstract, batch).compile()
    fingerprint = saved_program.fingerprint_of(config, shapes, mesh)
    saved_program.save_program(tmp_path / "step", compiled, fingerprint)
    results = [
        start(emoji_config(asked), tmp_path / str(len(asked)), 2) for asked in (SHORT, changes)
    ]
    assert results[0]["splits"] == results[1]["splits"]
    lines = [lines_of(tmp_path / str(len(asked))) for asked in (SHORT, changes)]
    assert reproducible(lines[0]) == reproducible(lines[1])
