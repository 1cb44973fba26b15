"""Data sheet of the TPU chips that we plan for and measure against.

Peak FLOP/s, HBM and link rates are those of "How to Scale Your Model" (Austin et al. 2025,
chapter 2) and of Google Cloud's pages on the TPU versions. What HBM a program may use is what the
TPU compiler itself says when one does not fit. The clock is the peak divided by the FLOPs a cycle
of the chip's matrix units: 4 of 128 x 128 on v5e, 8 on v4 and v5p, 4 of 256 x 256 on v6e, a
multiply and an add each. Of the data-centre network a chip has its share: that of a pod's figure on
Google Cloud's page of v6e (6.4 Tbit/s for 256 v5e, 25.6 for 256 v6e), of 25 GB/s for a host of four
on v4 and v5p.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do; all rates are per second."""

    name: str  # as in the name of a topology
    device_kind: str  # as jax.Device.device_kind says
    clock: float  # cycles
    flops: float  # peak, bf16
    hbm: int  # bytes that a program may use
    hbm_bandwidth: float  # bytes
    link_bandwidth: float  # bytes, one way over one link to a neighbour
    cores: int  # that share the steps of a kernel
    torus_axes: int  # of the chips' network: 2 links on each axis
    network_bandwidth: float  # bytes, to other slices

    def wraps(self, size):
        """Whether so many chips on an axis of a slice are a ring, and not a line."""
        return size == 16 if self.torus_axes == 2 else size % 4 == 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 1.05e9, 275e12, int(30.75 * GIB), 1.2e12, 4.5e10, 2, 3, 6.25e9),
        Chip("v5e", "TPU v5 lite", 1.5e9, 197e12, int(15.75 * GIB), 8.1e11, 4.5e10, 1, 2, 3.125e9),
        Chip("v5p", "TPU v5", 1.75e9, 459e12, int(95.74 * GIB), 2.8e12, 9e10, 2, 3, 6.25e9),
        Chip("v6e", "TPU v6 lite", 1.75e9, 918e12, int(31.25 * GIB), 1.6e12, 9e10, 1, 2, 12.5e9),
    )
}


def chip_of(device_kind):
    """The chip of a jax device's `device_kind`; None where we have no data sheet of it."""
    known = {chip.device_kind: chip for chip in CHIPS.values()}
    return known.get(device_kind)
