"""TPUs that are not there, in processes of their own: the tests' own has 8 CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
import tiny

def get_config():
    return tiny.config({changes})
"""


def run_python(*arguments):
    """A Python process from the checkout's root, which finds the tests' modules and the configs."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'configs'}"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def absent_tpu():
    """What absent_tpu.py found."""
    done = run_python(ROOT / "tests" / "preflight" / "absent_tpu.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def preflight(tmp_path_factory):
    """`preflight(changes, *flags)`: tools/preflight.py on the tiny config with changes."""

    def run(changes, *flags):
        config = tmp_path_factory.mktemp("config") / "tiny_config.py"
        config.write_text(TINY.format(changes=changes))
        return run_python("tools/preflight.py", "--config", config, *flags)

    return run
