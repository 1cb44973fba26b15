"""The data sheet of the chips."""

import pytest

from mmgem_jax.chips import CHIPS, chip_of

# FLOPs a cycle of the matrix units: number, rows, columns, multiply and add.
MATRIX_UNITS = {"v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)}


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_is_found_by_what_jax_calls_it_and_its_figures_agree(name):
    chip = CHIPS[name]
    assert chip_of(chip.device_kind) is chip
    units, side = MATRIX_UNITS[name]
    assert units * side * side * 2 * chip.clock == pytest.approx(chip.flops, rel=0.003)
    assert 1e11 < chip.hbm_bandwidth < 1e13 and 10e9 < chip.hbm < 110e9


def test_other_devices_have_no_data_sheet():
    assert chip_of("cpu") is None


def test_which_axes_of_a_slice_are_rings():
    assert CHIPS["v5e"].wraps(16) and not CHIPS["v5e"].wraps(8)
    assert CHIPS["v5p"].wraps(8) and not CHIPS["v5p"].wraps(2)
