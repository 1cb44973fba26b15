"""A run that is killed at random moments, again and again, ends as one that was left alone."""

from kill_runs import kill_often
from small_run import small_run

KILLS = 10


def test_a_run_that_is_killed_ten_times_ends_bit_for_bit_as_one_left_alone(tmp_path):
    found = kill_often(small_run(tmp_path, KILLS), tmp_path, KILLS)
    assert found["bitwise_equal"], found["differences"]
    assert sum(found["killed_in"].values()) == found["kills"] == KILLS
    assert found["killed_in"]["start-up"] >= 1
    assert found["killed_in"]["saving"] >= 1
    assert found["with_workers"] >= 2 and found["orphaned_seconds"] < 30
