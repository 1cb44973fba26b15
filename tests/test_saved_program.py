"""A compiled train step in a file: it does what the step does, and only for the run it is of."""

import functools

import jax
import numpy as np
import pytest
import tiny

from mmgem_jax import run, saved_program, sharding, train_state
from mmgem_jax.errors import UserError
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step


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
