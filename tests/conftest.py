"""Every test runs on 8 virtual CPU devices, with JAX's checks on and all warnings errors."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import jax
import pytest
from absl import flags

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "configs", "tools")]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Tests compile much and run little: plain machine code takes a sixth of the time to make.
QUICK_COMPILATION = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
# And XLA's pool has a thread a device, all of which can be waiting in collectives for the device
# that has none: a deadlock, which more threads undo.
environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}", "NPROC": "32"}
before = {name: os.environ.get(name) for name in environment}
os.environ.update(environment)
jax.devices()  # reads them; the processes that tests start are to run without them
for name, value in before.items():
    os.environ.pop(name)
    if value is not None:
        os.environ[name] = value

# The same examples every time, however long one takes, and no folder of those that failed.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])  # Grain's worker processes ask for parsed flags


def pytest_configure(config):
    """A cache entry that another test process is still writing is no error: JAX compiles anew."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


@pytest.fixture(scope="session")
def quick_compilation():
    """XLA's flags for a process that compiles much and runs little."""
    return QUICK_COMPILATION


@pytest.fixture(scope="session")
def emoji_config(tmp_path_factory):
    """`emoji_config(changes)`: configs/emoji_fixture.py, on the drawings of tests/fixture."""
    import emoji_fixture

    from mmgem_jax.data import emoji

    data_dir = str(tmp_path_factory.mktemp("data"))
    emoji.build(data_dir, "fixture", packages=str(ROOT / "tests" / "fixture" / "emoji"))

    def make(changes=()):
        config = emoji_fixture.get_config()
        own = {"data.dir": data_dir, "compile_cache": ""}  # "": that of the tests stays
        config.update_from_flattened_dict(own | dict(changes))
        return config

    return make


@pytest.fixture(scope="session")
def regions_config(emoji_config):
    """`regions_config(changes)`: configs/emoji_regions_fixture.py, on scenes of those drawings."""
    import emoji_regions_fixture

    from mmgem_jax.data import scenes

    data_dir = emoji_config().data.dir
    scenes.build(data_dir, "fixture")

    def make(changes=()):
        config = emoji_regions_fixture.get_config()
        own = {"data.dir": data_dir, "compile_cache": "", "init_from": ""}
        config.update_from_flattened_dict(own | dict(changes))
        return config

    return make


@pytest.fixture
def call_tool(monkeypatch, capsys):
    """`call_tool(name, *arguments)` in this process: exit status, and what is on stdout, stderr."""

    def call(name, *arguments):
        path = ROOT / "tools" / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = 0
        try:
            tool.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def trained(emoji_config, tmp_path_factory):
    """What training leaves, of noise: the workdir, its results, and the states of steps 2 and 3."""
    import tiny_run

    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = emoji_config({"eval.final_splits": ("test",), "eval.sample_split": ""})
    return workdir, *tiny_run.save_run(config, workdir, (2, 3))
