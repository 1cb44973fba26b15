"""What it costs a run to be killed: nothing that can be found in its numbers."""

import tempfile
from pathlib import Path

import jax
from kill_runs import kill_often
from small_run import small_run


def benchmark_faults(kills):
    """A small run (mixed sources, packed rows) killed so many times, beside the same left alone.

    Returns:
      What `kill_often` found, as a dict for JSON.
    """
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        config = small_run(Path(folder), steps=max(10, 2 * kills))
        return kill_often(config, Path(folder), kills)


def faults_text(found):
    """The same in a few lines."""
    places = ", ".join(f"{count} in {place}" for place, count in found["killed_in"].items())
    same = "bit for bit the same" if found["bitwise_equal"] else f"not: {found['differences']}"
    return "\n".join(
        [
            f"kills                       {found['kills']}: {places}",
            f"starts                      {found['starts']}, {found['with_workers']} with a worker",
            f"workers outlived their run  {found['orphaned_seconds']:.2f} s at most",
            f"metrics, parameters, state  {same} after {found['steps']} steps",
        ]
    )
