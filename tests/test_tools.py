"""The tools as a user calls them, on the fixture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmgem_jax.data import emoji

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixture" / "emoji"
CONFIG = ROOT / "configs" / "emoji_fixture.py"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with the fixture's data set."""
    folder = tmp_path_factory.mktemp("data")
    emoji.build(str(folder), "fixture", packages=str(FIXTURE))
    return folder


def run_tool(*arguments, **environment):
    """A tool in a process of its own, from the checkout's root."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_sweep_runs_every_run_and_prints_their_means(data_dir, tmp_path, quick_compilation):
    done = run_tool(
        *("tools/sweep.py", "--config", CONFIG, "--workdir", tmp_path, "--seeds", "0,1"),
        *("--run", f"joint: steps=3 data.dir={data_dir} eval.pixel_floor=False"),
        XLA_FLAGS=quick_compilation,
    )
    assert done.returncode == 0, done.stderr
    found = [
        json.loads((tmp_path / f"joint-{seed}" / "results.json").read_text())["splits"]["test"]
        for seed in (0, 1)
    ]
    first = [split["metrics"]["retrieval/image_to_text_r10"] for split in found]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| joint | test |"))
    assert f"{sum(first) / 2:.3f} ± " in row.split("|")[5]


def test_sweep_names_the_run_that_failed(tmp_path):
    done = run_tool(
        *("tools/sweep.py", "--config", CONFIG, "--workdir", tmp_path),
        *("--run", "wrong: no_such_field=1"),
    )
    assert done.returncode == 2
    assert "no_such_field" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --run")


def test_an_import_that_fails_says_why_in_one_line_and_leaves_nothing(tmp_path):
    done = run_tool(
        *("tools/import_hf.py", "--config", CONFIG, "--out", tmp_path / "new" / "start"),
        *("--vision", tmp_path / "absent"),
    )
    assert done.returncode == 2
    expected = f"error: {tmp_path / 'absent'}: does not exist; expected a folder or a *.gguf file"
    assert done.stderr.splitlines() == [expected]
    assert list(tmp_path.iterdir()) == []
