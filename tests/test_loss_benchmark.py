"""What the benchmark of the losses compares is the same loss, and all that it says is a row."""

import json

import jax
import loss_benchmark
import numpy as np
import packing_benchmark
import pytest
from measure import row

from mmgem_jax import sharding

SMALL = {"PAIRS": 64, "JOINT_DIM": 16, "CAPTIONS": 2, "TOKENS": 5, "VOCABULARY": 128, "NARROW": 16}


@pytest.fixture
def small(monkeypatch):
    """The benchmark at sizes of a test."""
    for name, value in SMALL.items():
        monkeypatch.setattr(loss_benchmark, name, value)
    monkeypatch.setattr(loss_benchmark, "use_virtual_devices", lambda: None)


@pytest.mark.parametrize("case", [loss_benchmark.contrastive_case, loss_benchmark.caption_case])
def test_both_forms_are_one_loss(small, case):
    mesh = loss_benchmark.mesh_of(jax.devices())
    forms, arguments = loss_benchmark.compiled_forms(case, mesh, real=True)
    with sharding.use_mesh(mesh):
        (ours, gradients), (plain, expected) = (forms[k](*arguments) for k in ("ours", "plain"))
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for found, other in zip(gradients, expected, strict=True):
        atol = 1e-6 * np.abs(other).max()
        np.testing.assert_allclose(found, other, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "benchmark", [loss_benchmark.benchmark_contrastive, loss_benchmark.benchmark_caption_loss]
)
def test_rows_have_a_reference_and_a_ratio(small, benchmark):
    rows = benchmark(None)
    assert [line["unit"] for line in rows] == ["MiB", "s"]
    for line in json.loads(json.dumps(rows)):
        assert line["reference"] > 0 and line["ratio"] > 0


def test_packed_rows_are_fuller_than_padded_ones(monkeypatch):
    monkeypatch.setattr(packing_benchmark, "GROUPS", 40)
    rows = {line["name"]: line for line in packing_benchmark.benchmark_packing(row)}
    for kind, least in {"short": 0.95, "long": 0.9}.items():
        used = rows[f"{kind} captions: positions in use"]
        assert used["ours"] > least and used["ratio"] > 1.9
        assert rows[f"{kind} captions: image slots in use"]["ours"] > 0.98
