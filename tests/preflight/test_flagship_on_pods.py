"""The flagship on pods that are not there: some minutes for each, so only with `-m pods`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PODS = [
    ("vitl_tinyllama_stage1", "v5e:16x16", 0.62),
    ("vitl_tinyllama_stage1_v5p", "v5p:8x8x4", 0.62),
    ("vitl_tinyllama_long", "v5e:16x16", 0.0),
]


@pytest.mark.pods
@pytest.mark.parametrize(("config", "topology", "mfu"), PODS)
def test_it_fits_without_problems_as_fast_as_the_readme_says(config, topology, mfu, tmp_path):
    call = [sys.executable, "tools/preflight.py", "--config", f"configs/{config}.py"]
    call += ["--topology", topology, "--json", str(tmp_path / "report.json")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    report = json.loads((tmp_path / "report.json").read_text())
    (step,) = report["programs"]
    assert step["fits"] and step["problems"] == []
    assert step["prediction"]["useful_mfu"] >= mfu
