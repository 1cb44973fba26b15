"""Every test runs on 8 virtual CPU devices, with JAX's checks on and all warnings errors."""

import functools
import sys
from pathlib import Path

import jax
import pytest
from absl import flags

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "configs")]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])  # Grain's worker processes ask for parsed flags


def pytest_configure(config):
    """A cache entry that another test process is still writing is no error: JAX compiles anew."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


@pytest.fixture(scope="session")
def setup():
    """`setup(changes, **sizes)`: the tiny config, model, parameters and batch, made once each."""
    import tiny

    @functools.cache
    def make(changes, sizes):
        return tiny.Setup.make(dict(changes), **dict(sizes))

    return lambda changes=(), **sizes: make(
        tuple(sorted(dict(changes).items())), tuple(sorted(sizes.items()))
    )
