"""What is read of programs that the TPU compiler made (absent_tpu.py) is what was asked for."""

import pytest


def test_collectives_have_their_kind_axis_count_and_bytes(absent_tpu):
    total, gathered = absent_tpu["collectives"]
    if total["kind"] != "all-reduce":
        total, gathered = gathered, total
    assert (total["kind"], total["axes"], total["count"]) == ("all-reduce", "rows", 1)
    assert (gathered["kind"], gathered["axes"], gathered["count"]) == ("all-gather", "columns", 1)
    assert total["bytes"] == 1024 // 4 * 2048 // 4 * 4
    assert gathered["bytes"] == 1024 // 4 * 2048 * 4
    # Four chips of sixteen on an axis are a line: 3 / 4 of the bytes over one link of 45 GB/s.
    assert total["seconds"] == pytest.approx(2 * total["bytes"] * 0.75 / 4.5e10)
    assert gathered["seconds"] == pytest.approx(gathered["bytes"] * 0.75 / 4.5e10)


def test_between_slices_it_is_the_network_that_counts(absent_tpu):
    (row,) = absent_tpu["between_slices"]
    assert (row["kind"], row["axes"], row["count"]) == ("all-reduce", "slice", 1)
    assert row["bytes"] == 1024 * 1024 // 4 * 4
    assert row["seconds"] == pytest.approx(2 * row["bytes"] / 2 / 3.125e9)


def test_a_loop_costs_its_body_times_its_trips(absent_tpu):
    three, twelve = absent_tpu["matmuls"]
    assert twelve == pytest.approx(4 * three, rel=0.02)
    assert 0.6 < 3 * 2 * 2048**3 / three / 197e12 < 1


def test_what_the_partitioner_regrets_is_seen(absent_tpu):
    bad, good = absent_tpu["regrets"]
    assert len(bad) == 1 and bad[0].startswith("Involuntary full rematerialization")
    assert good == []


def test_a_stack_gathered_at_once_is_a_problem_and_layer_by_layer_is_none(absent_tpu):
    at_once, one_by_one = absent_tpu["gathers"]
    assert len(at_once) == 1
    assert "every layer of tower/blocks/kernel at once over fsdp" in at_once[0]
    assert one_by_one == []


def test_kernels_written_by_hand_are_listed_with_their_trips(absent_tpu):
    (known,), (unknown,) = absent_tpu["kernels"]
    assert known["count"] == unknown["count"] == 5
    assert unknown["least_seconds"] is None
    assert known["least_seconds"] == pytest.approx(5e-6)


def test_a_kernel_with_a_schedule_costs_its_steps(absent_tpu):
    (*counts, eight, left), (*_, sixteen, _) = absent_tpu["schedules"]
    assert counts == [1, 5] and left == []
    assert sixteen == pytest.approx(2 * eight, rel=0.02)
    assert 0.5 < 5 * 8 * 2 * 512**3 / eight / 197e12 < 1


def test_the_attentions_compile_up_to_their_limits(absent_tpu):
    needed, most = absent_tpu["attention"]
    assert all(0.6 * most < bytes_needed <= most for bytes_needed in needed)


def test_each_program_of_an_evaluation_takes_what_the_one_before_gives(absent_tpu):
    assert absent_tpu["evaluation"] == [True, True]


def test_a_large_matmul_is_predicted_near_the_peak(absent_tpu):
    found = absent_tpu["calibrations"]
    assert set(found) == {"v4", "v5e", "v5p", "v6e"}
    assert all(0.7 < share < 1 for share in found.values())
