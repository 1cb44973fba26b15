"""What a program holds in a chip's HBM, and whether that is too much."""

import jax
import numpy as np


def held_bytes(tree):
    """Bytes of a tree of shapes on one chip, from their shardings."""
    return sum(one_chip_bytes(leaf) for leaf in jax.tree.leaves(tree))


def one_chip_bytes(leaf):
    """Bytes of one array on a chip; without a sharding it is whole."""
    split = getattr(leaf, "sharding", None)
    shape = split.shard_shape(leaf.shape) if split else leaf.shape
    # A random key is an array of two words.
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return int(np.prod(shape)) * size


def memory_row(program, compiled, chip):
    """HBM of a chip in bytes: by what is held, temporaries, peak, capacity, and what is too much.

    Temporaries are all else that there is at the worst moment: activations, gradients, and what
    the layout of arrays in tiles leaves empty.
    """
    held = {name: held_bytes(tree) for name, tree in program.held.items()}
    held["batch"] = held_bytes(program.arguments) - sum(held.values())
    if compiled.executable is None:
        peak = compiled.needed
    else:
        peak = compiled.executable.memory_analysis().peak_memory_in_bytes
    return held | {
        "temporaries": max(0, peak - sum(held.values())),
        "peak": peak,
        "capacity": chip.hbm,
        "exceeds_by": max(0, peak - chip.hbm),
    }
