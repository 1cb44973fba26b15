"""Fingerprints that tell parameters apart, files that are written whole, and comparisons."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import results
from mmgem_jax.evaluation.results import (
    check_writable,
    comparison,
    parameters_fingerprint,
    write_result,
)


def params(**changes):
    made = {
        "tower": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.ones(4, jnp.bfloat16)},
        "scale": jnp.float32(3),
    }
    return made | changes


def test_the_fingerprint_is_the_same_on_every_mesh_and_in_every_order():
    expected = parameters_fingerprint(params())
    mesh = tiny.mesh_of((2, 2, 2))
    specs = {0: PartitionSpec(), 1: PartitionSpec("tensor"), 2: PartitionSpec("fsdp", "tensor")}
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])), params())
    assert parameters_fingerprint(spread) == expected
    assert parameters_fingerprint(dict(reversed(params().items()))) == expected
    assert parameters_fingerprint(jax.device_get(params())) == expected
    assert re.fullmatch("[0-9a-f]{64}", expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": np.nextafter(np.float32(3), np.float32(4))},
        {"scale": jnp.ones(1) * 3},
        {"scale": jnp.bfloat16(3)},
        {"scales": jnp.float32(3)},
        {"tower": {"kernel": jnp.arange(8.0).reshape(2, 4), "bias": jnp.ones(4, jnp.bfloat16)}},
        {"tower": {"bias": jnp.arange(8.0).reshape(4, 2), "kernel": jnp.ones(4, jnp.bfloat16)}},
    ],
)
def test_another_value_shape_type_or_name_has_another_fingerprint(changes):
    assert parameters_fingerprint(params(**changes)) != parameters_fingerprint(params())


def test_one_leaf_at_a_time_comes_to_the_host(monkeypatch):
    gathered, get = [], jax.device_get
    monkeypatch.setattr(results.jax, "device_get", lambda x: gathered.append(x.shape) or get(x))
    parameters_fingerprint(params())
    assert gathered == [(), (4,), (4, 2)]


# ---- files ---------------------------------------------------------------------------------------


def test_where_a_result_cannot_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "no folder" / "a.json", tmp_path / "file" / "a.json"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"^--out {re.escape(str(path))}: .*; expected a file"):
            check_writable(path)


def test_looking_whether_it_can_changes_nothing(tmp_path):
    check_writable(tmp_path / "new.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


def write(path, protocol="p-5k", metrics=None, **stamp):
    write_result(path, {"protocol": protocol, **stamp, "metrics": metrics or {"r1": 0.5}})
    return path


def test_two_results_of_one_protocol_side_by_side(tmp_path):
    first = write(tmp_path / "a.json", metrics={"r1": 0.25, "r5": 0.5}, prompts=["{c}"], texts=3)
    second = write(tmp_path / "b.json", metrics={"r1": 0.375, "r9": 1.0}, prompts=[], texts=3)
    lines = comparison(first, second).splitlines()
    assert [line.split() for line in lines] == [
        ["p-5k"],
        ["A", "B", "B", "-", "A"],
        ["r1", "0.2500", "0.3750", "+0.1250"],
        ["r5", "0.5000"],
        ["r9", "1.0000"],
        ["A", str(first)],
        ["B", str(second)],
        ["not", "the", "same", "in", "both:", "prompts"],
    ]
    assert lines[4].index("1.0000") == lines[2].index("0.3750")
    assert comparison(first, first).splitlines()[-1] == f"B  {first}"


def test_protocols_are_not_mixed(tmp_path):
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json", "q-1k")
    message = f"^--compare: {first} is of the protocol p-5k and {second} of q-1k; expected one"
    with pytest.raises(UserError, match=message):
        comparison(first, second)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": "p"}', '{"metrics": {}}'])
def test_what_is_no_result(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    good = write(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"a\.json: no result; expected JSON with a protocol"):
        comparison(good, path)
    with pytest.raises(UserError, match=r"c\.json: No such file or directory; expected a result"):
        comparison(tmp_path / "c.json", good)


def test_a_result_is_written_whole(tmp_path):
    path = write(tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_result(path, {"metrics": object()})
    assert json.loads(path.read_text())["protocol"] == "p-5k"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
