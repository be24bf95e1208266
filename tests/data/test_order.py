"""The order of samples: checked against the definition written out naively, and at the size of the real data."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcf.data.order import Location, Order
from mcf.errors import UserError


def whole(order: Order, first: int, count: int) -> list[Location]:
    return [order.locate(p) for p in range(first, first + count)]


def rows_of_epoch(order: Order, epoch: int) -> list[tuple[int, int]]:
    n = order.samples_per_epoch
    return [(shard, row) for _, shard, row in whole(order, epoch * n, n)]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    streams=st.integers(1, 6),
    per_step=st.integers(1, 4),
    window=st.integers(1, 30),
    seed=st.integers(0, 2**65),
)
def test_an_epoch_is_the_spans_of_one_shuffled_sequence_each_sample_at_most_once(
    counts, streams, per_step, window, seed
):
    batch = streams * per_step
    if sum(counts) < batch:
        return
    order = Order(np.array(counts), batch=batch, streams=streams, window=window, seed=seed)
    assert order.samples_per_epoch == sum(counts) // batch * batch
    for epoch in (0, 3):
        rows = rows_of_epoch(order, epoch)
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < counts[shard] for shard, row in rows)
        # Laid end to end, the streams' spans are whole shards in some order, but for what is left out at the end:
        spans = [sorted_by_window(order, epoch, stream) for stream in range(streams)]
        sequence = [row for span in spans for row in span]
        assert set(sequence) == set(rows)
        for (shard, row), (after, after_row) in itertools.pairwise(sequence):
            if after == shard:
                assert after_row == row + 1, "rows of a span are contiguous"
            else:
                assert (row, after_row) == (counts[shard] - 1, 0), "a shard is read from its start to its end"


def sorted_by_window(order: Order, epoch: int, stream: int) -> list[tuple[int, int]]:
    """The stream's rows with the permutation inside each window undone, found through the windows' segments."""
    rows, index = [], 0
    while len(rows) < order.span:
        window = order.window(epoch, stream, index)
        here = [(s.shard, s.first + i) for s in window.segments for i in range(s.rows)]
        assert sorted(window.permutation.tolist()) == list(range(len(here)))
        assert len(here) <= order.window_size
        rows += here
        index += 1
    return rows


def test_positions_run_round_robin_over_the_streams_and_windows_in_order():
    order = Order(np.array([30, 50, 40]), batch=12, streams=4, window=8, seed=1)
    epoch = order.samples_per_epoch
    for stream in range(4):
        first = range(epoch + stream, epoch + stream + 12 * order.steps_per_epoch, 12)
        got = [order.locate(position + turn * 4)[1:] for position in first for turn in range(3)]
        expected, index = [], 0
        while len(expected) < order.span:
            window = order.window(1, stream, index)
            here = [(s.shard, s.first + i) for s in window.segments for i in range(s.rows)]
            expected += [here[i] for i in window.permutation]
            index += 1
        assert got == expected


def test_epochs_and_seeds_and_windows_differ():
    def rows(seed, epoch):
        return rows_of_epoch(Order(np.full(10, 60), batch=20, streams=5, window=30, seed=seed), epoch)

    assert rows(0, 0) == rows(0, 0)
    for other in (rows(0, 1), rows(1, 0), rows(1, 1), rows(2**32, 0)):
        assert sum(a == b for a, b in zip(rows(0, 0), other)) < 60  # of 600 places; chance alone gives 1

    order = Order(np.full(10, 60), batch=20, streams=5, window=30, seed=0)
    orders = {order.window(0, stream, 1).permutation.tobytes() for stream in range(5)}
    orders |= {order.window(epoch, 0, index).permutation.tobytes() for epoch in range(2) for index in range(1, 4)}
    assert len(orders) == 5 + 6 - 1


def test_the_order_is_the_one_of_earlier_versions():
    """Golden: a resumed run must meet the order it began with, under any version of NumPy and of mcf."""
    order = Order(np.array([7, 5, 9, 4]), batch=6, streams=3, window=4, seed=42)
    assert [tuple(place) for place in whole(order, 0, 8)] == GOLDEN
    assert tuple(order.locate(6_000_000_001)) == GOLDEN_FAR


# Written down from the first version, (epoch, shard, row) each.
GOLDEN = [(0, 1, 0), (0, 0, 0), (0, 2, 0), (0, 1, 2), (0, 3, 3), (0, 2, 1), (0, 1, 3), (0, 0, 1)]
GOLDEN_FAR = (250000000, 3, 1)


def test_the_places_of_20_million_samples_are_found_at_once_wherever_they_are():
    rng = np.random.default_rng(0)
    counts = rng.integers(5_000, 15_001, size=2_000)
    counts[-1] += 20_000_000 - counts.sum() if counts.sum() < 20_000_000 else 0

    def first_batch(position):
        began = time.perf_counter()
        order = Order(counts, batch=4096, streams=512, window=256, seed=0)
        places = order.places(np.arange(position, position + 64))
        windows = {(int(e), int(s), int(w)) for e, s, w in zip(*places[:3])}
        for window in windows:
            order.window(*window)
        return time.perf_counter() - began

    first_batch(0)
    start = min(first_batch(0) for _ in range(5))
    far = min(first_batch(19_000_000 // 4096 * 4096) for _ in range(5))
    # About 4 ms here; 100 ms leaves room for a busy machine and is far under a walk over 19 million samples (seconds).
    assert start < 0.1 and far < 0.1
    assert far < 10 * start


def test_streams_do_not_all_turn_to_a_new_window_in_the_same_step():
    order = Order(np.full(4, 40_000), batch=64, streams=64, window=128, seed=0)
    places = order.places(np.arange(64 * 1000, 64 * 1128))
    begun = (places.offset == 0).reshape(128, 64).sum(1)
    assert begun.sum() == 64 and begun.max() == 1


@pytest.mark.parametrize(
    ("samples", "batch", "streams", "words"),
    [
        (100, 128, 64, ("100 samples", "batch=128", "at most 100")),
        (100, 96, 36, ("data.streams=36", "batch=96", "set it to 32")),
        (10, 4, 8, ("data.streams=8", "batch=4", "set it to 4")),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_remedy(samples, batch, streams, words):
    with pytest.raises(UserError) as error:
        Order(np.array([samples]), batch=batch, streams=streams, window=16, seed=0)
    assert all(word in str(error.value) for word in words)
