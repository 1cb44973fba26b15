"""The table of parameters: golden text of the flagship, and what it says of a small tree."""

import functools
import importlib
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from jax.sharding import AbstractMesh

from mmgem_jax import objective, run, sharding, train_state
from mmgem_jax.param_table import param_table

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def flagship():
    """Shapes of the flagship's parameters with their logical names."""
    config = importlib.import_module("vitl_tinyllama_stage1").get_config()
    model, shapes = run.build_model(config.model), run.batch_shapes(config)
    make = functools.partial(objective.init_params, model, train_state.zeros(shapes))
    return jax.eval_shape(make, jax.random.key(0))


def mesh_of(data, fsdp, tensor=1):
    """A mesh without devices."""
    return AbstractMesh((1, data, fsdp, tensor), sharding.MESH_AXES)


@pytest.mark.parametrize(("name", "fsdp"), [("v5e_16x16", 16), ("v5p_8x8x4", 8)])
def test_the_flagship_s_table_is_the_golden_one(name, fsdp):
    """To change it on purpose: write what the function gives to the file, and look at the diff."""
    found = param_table(flagship(), mesh_of(256 // fsdp, fsdp))
    assert found + "\n" == (GOLDEN / f"params_{name}.txt").read_text()


def test_what_a_chip_holds_is_a_share_of_what_is_split():
    box = nn.LogicallyPartitioned
    tree = {
        "matrix": box(jax.ShapeDtypeStruct((8, 16), "float32"), ("embed", "mlp")),
        "scale": box(jax.ShapeDtypeStruct((256,), "bfloat16"), ("norm",)),
    }
    lines = param_table(tree, mesh_of(1, 4, 2)).splitlines()
    assert " ".join(lines[2].split()) == "matrix 8 x 16 float32 embed x mlp fsdp 4 x tensor 2 0.1"
    assert " ".join(lines[3].split()) == "scale 256 bfloat16 norm - 0.5"
    assert lines[-1] == "384 parameters; a chip holds 0.0 of 0.0 MiB"


def test_the_totals_are_those_of_the_parameters():
    found = param_table(flagship(), mesh_of(256, 1)).splitlines()[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(flagship())))
    mib = f"{4 * count / 2**20:,.1f}"
    assert found == f"{count:,} parameters; a chip holds {mib} of {mib} MiB"
