"""Meshes over tori of chips that are not there, as far as the pre-flight asks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Device:
    """What is asked of a device."""

    coords: tuple
    slice_index: int = 0


@dataclass(frozen=True)
class Mesh:
    """What is asked of a mesh."""

    devices: np.ndarray
    axis_names: tuple


def torus_mesh(torus, shape, names, slices=1):
    """A mesh of this shape over the chips of a torus, in the torus's own order."""
    chips = [Device(tuple(map(int, c)), s) for s in range(slices) for c in np.ndindex(*torus)]
    array = np.empty(len(chips), object)
    array[:] = chips
    return Mesh(array.reshape(shape), names)
