"""Orders of records: every epoch all of them, none like another, any place without those before."""

import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem_jax.data.order import shuffled, shuffled_by_shard

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


def numbers(order, start, stop):
    """Records of the places start..stop."""
    return [order[place] for place in range(start, stop)]


@settings(max_examples=60)
@given(COUNTS, st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 9))
def test_every_epoch_is_a_permutation_in_which_windows_keep_their_records(
    counts, window, seed, epoch
):
    """An example is less than a window from its place in the epoch's row of shards."""
    total = sum(counts)
    span = epoch * total, (epoch + 1) * total
    found = numbers(shuffled_by_shard(counts, window, seed), *span)
    in_a_row = numbers(shuffled_by_shard(counts, 1, seed), *span)
    assert sorted(found) == list(range(total))
    for start in range(0, total, window):
        assert sorted(found[start : start + window]) == sorted(in_a_row[start : start + window])


def test_what_is_shuffled_as_a_whole_is_all_there_in_every_epoch():
    order = shuffled(200, 3)
    epochs = [tuple(numbers(order, start, start + 200)) for start in (0, 200, 200 * 10**6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(200))] * 3
    assert len(set(epochs)) == 3


def test_a_window_of_one_reads_shard_after_shard_in_another_order_each_epoch():
    counts = [4] * 6
    order = shuffled_by_shard(counts, 1, 3)
    epochs = [tuple(numbers(order, 24 * e, 24 * e + 24)) for e in range(5)]
    for epoch in epochs:
        for start in range(0, 24, 4):
            first = epoch[start]
            assert first % 4 == 0 and epoch[start : start + 4] == tuple(range(first, first + 4))
    assert len(set(epochs)) == 5


def test_epochs_and_seeds_differ_and_nothing_else_does():
    def epochs(seed):
        order = shuffled_by_shard([20, 20], 40, seed)
        return [tuple(numbers(order, 40 * epoch, 40 * epoch + 40)) for epoch in range(4)]

    seen = [epoch for seed in range(4) for epoch in epochs(seed)]
    assert len(set(seen)) == len(seen)
    assert seen[:4] == epochs(0)


def test_windows_of_an_epoch_are_not_shuffled_alike():
    found = numbers(shuffled_by_shard([400], 20, 0), 0, 400)
    within = {tuple(number % 20 for number in found[s : s + 20]) for s in range(0, 400, 20)}
    assert len(within) == 20


def test_records_are_mixed_evenly():
    """Over many epochs each record is as often at each place, within 5 standard deviations."""
    order = shuffled_by_shard([6], 6, 1)
    seen = np.zeros((6, 6))
    for place in range(6 * 1000):
        seen[place % 6, order[place]] += 1
    assert np.abs(seen - 1000 / 6).max() < 5 * np.sqrt(1000 * (1 / 6) * (5 / 6))


@pytest.mark.parametrize("order", [shuffled(300, 5), shuffled_by_shard([100, 0, 200], 16, 5)])
def test_it_is_endless_cut_into_shares_batched_and_pickled(order):
    assert len(order) == sys.maxsize
    first = numbers(order, 0, 24)
    assert [list(order.batch(4)[1::2][i]) for i in range(3)] == [
        first[4:8],
        first[12:16],
        first[20:],
    ]
    assert numbers(pickle.loads(pickle.dumps(order)), 0, 24) == first
    assert 0 <= order[10**15] < 300  # without those before


def test_workers_are_sent_no_more_than_how_large_the_shards_are():
    order = shuffled_by_shard([10_000] * 1000, 100_000, 0)
    assert len({order[place] for place in range(1000)}) == 1000
    assert len(pickle.dumps(order)) < 20_000


def test_the_order_stays_what_it_is():
    """A run that goes on under another version of numpy takes the same examples."""
    assert numbers(shuffled_by_shard([3, 5, 4], 4, 7), 0, 12) == [
        1,
        2,
        0,
        8,
        9,
        3,
        10,
        11,
        7,
        4,
        6,
        5,
    ]
