"""TPUs that are not there, as libtpu describes them."""

import importlib.util
import re

import jax
from jax.experimental import topologies

from mmgem_jax.chips import CHIPS
from mmgem_jax.errors import UserError, first_line

# The slices of the chips whose network has two axes; those with three come in many more shapes.
FLAT_SHAPES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
EXPECTED = (
    f"KIND:SHAPE, such as {', '.join(f'v5e:{shape}' for shape in FLAT_SHAPES)} (v6e the same), or "
    "v5p:8x8x4 (v4 the same; axes of 2, or multiples of 4)"
)


def chip_of_topology(topology):
    """The Chip of a topology's name.

    Raises:
      UserError: it is no name of a topology.
    """
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    sizes = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape) and shape.split("x")
    flat = chip and chip.torus_axes == 2 and shape not in FLAT_SHAPES
    if not chip or not sizes or len(sizes) != chip.torus_axes or flat:
        raise UserError(f"--topology: {topology!r}; expected {EXPECTED}")
    return chip


def absent_devices(topology, slices=1):
    """Devices of so many slices of a topology such as `v5e:16x16`; one program compiles for them.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    chip = chip_of_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu: not installed; expected it, which compiles for TPUs without one "
            "(pip install -e '.[preflight]')"
        )
    if slices < 1:
        raise UserError(f"--slices: {slices}; expected at least 1")
    options = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":  # a device is a chip, as on the pods, and not one of its two cores
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"--topology: {topology!r} ({reason}); expected {EXPECTED}") from None
    return found


def torus_shape(devices):
    """Chips on each axis of a slice."""
    return tuple(max(axis) + 1 for axis in zip(*(d.coords for d in devices), strict=True))


def slice_of(device):
    """Which slice a device is of."""
    return getattr(device, "slice_index", 0)
