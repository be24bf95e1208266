"""Which sample stands at which position: a pure function of the seed and of the number of samples seen.

    epoch ── permute the shards by (seed, epoch) ── one long sequence of samples
          ── cut it into C equal spans, one a stream (the remainder is left out of this epoch)
          ── a stream reads its span in windows, and permutes inside a window by (seed, epoch, stream, window)
    step t, global sample position p = t·batch + j·C + c  ──  the j-th sample that stream c gives in this step

Nothing here knows of ranks: rank r of W takes the positions ≡ r (mod W), which are those of the streams ≡ r (mod W).
Every position is found by arithmetic and two small permutations, so starting at sample 20 million costs what starting
at 0 costs. The permutations sort raw Philox words: NumPy promises the raw words of a bit generator for ever, but not
the numbers that a Generator makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mcf.errors import UserError

_WORD = (1 << 64) - 1
_SHARDS, _WINDOW = 0, 1  # what a permutation is for: a counter word, so that the two never share random numbers


class Location(NamedTuple):
    """Where a position's sample lies: epoch, number of the shard in the manifest, row in the shard."""

    epoch: int
    shard: int
    row: int


class Segment(NamedTuple):
    """A run of neighbouring rows of one shard: `rows` of them from `first`."""

    shard: int
    first: int
    rows: int


class Window(NamedTuple):
    """What a stream reads at once: the runs of rows in the order they lie, and the order in which they are given.

    The `permutation[i]`-th row of the segments laid end to end is the i-th sample the window gives.
    """

    segments: tuple[Segment, ...]
    permutation: np.ndarray  # int64 [rows]


class Places(NamedTuple):
    """For positions [n]: epoch, stream, window of the stream, and how many samples of the window come before it."""

    epoch: np.ndarray
    stream: np.ndarray
    window: np.ndarray
    offset: np.ndarray


class Order:
    """The order of a data set for one (seed, batch, streams, window); positions count on through the epochs.

    counts: samples of each shard, int64 [shards]. batch: samples of a step. streams: C, divides batch. window: samples
    read and permuted together; the first window of stream c is shorter by c/C of it, so that the streams do not all
    turn to a new window in the same step. Raises UserError when the numbers do not fit each other.
    """

    def __init__(self, counts: np.ndarray, *, batch: int, streams: int, window: int, seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.batch, self.streams, self.window_size, self.seed = batch, streams, window, seed
        self.samples = int(self.counts.sum())
        if batch % streams:
            raise UserError(f"data.streams={streams} does not divide batch={batch}; {_nearest_streams(batch, streams)}")
        if self.samples < batch:
            raise UserError(
                f"the data has {self.samples} samples, fewer than one batch={batch}; set batch to at most {self.samples} "
                f"(and data.streams={streams} to a divisor of it), or pack more images"
            )
        self.per_step = batch // streams
        self.steps_per_epoch = self.samples // batch
        self.span = self.steps_per_epoch * self.per_step
        self.samples_per_epoch = self.steps_per_epoch * batch
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)

    def places(self, positions: np.ndarray) -> Places:
        """Stream and window of every position, int64 [n] each: arithmetic alone."""
        step, in_step = np.divmod(np.asarray(positions, dtype=np.int64), self.batch)
        turn, stream = np.divmod(in_step, self.streams)
        epoch, step = np.divmod(step, self.steps_per_epoch)
        lead = self._lead(stream)
        window, offset = np.divmod(step * self.per_step + turn + lead, self.window_size)
        return Places(epoch, stream, window, np.where(window == 0, offset - lead, offset))

    def window(self, epoch: int, stream: int, index: int) -> Window:
        """The rows of a window, and the order inside it. Memory O(window + shards)."""
        lead = int(self._lead(stream))
        start = max(0, index * self.window_size - lead)
        stop = min(self.span, (index + 1) * self.window_size - lead)
        if not (0 <= stream < self.streams and index >= 0 and start < stop):
            raise IndexError(f"no window {index} in stream {stream}")
        permutation = _permutation(stop - start, self.seed, epoch, _WINDOW, stream, index)
        first = stream * self.span + start
        return Window(tuple(self._segments(epoch, first, first + stop - start)), permutation)

    def segments(self, epoch: int, stream: int) -> Iterator[Segment]:
        """The runs of rows that a stream reads in an epoch, in their order."""
        return self._segments(epoch, stream * self.span, (stream + 1) * self.span)

    def locate(self, position: int) -> Location:
        """Where the sample of one position lies."""
        epoch, stream, index, offset = (int(value[0]) for value in self.places(np.array([position])))
        window = self.window(epoch, stream, index)
        row = int(window.permutation[offset])
        for segment in window.segments:
            if row < segment.rows:
                return Location(epoch, segment.shard, segment.first + row)
            row -= segment.rows
        raise AssertionError("a window is as long as its segments")

    def _lead(self, stream):
        return stream * self.window_size // self.streams

    def _segments(self, epoch: int, start: int, stop: int):
        """Cut [start, stop) of the epoch's sequence at the ends of shards."""
        shards, ends = self._shards(epoch)
        at = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            shard, end = int(shards[at]), int(ends[at])
            count = min(stop, end) - start
            if count:
                yield Segment(shard, start - (end - int(self.counts[shard])), count)
            start, at = start + count, at + 1

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each ends in the epoch's sequence."""
        shards = _permutation(len(self.counts), self.seed, epoch, _SHARDS)
        return shards, np.cumsum(self.counts[shards])


def _permutation(count: int, seed: int, epoch: int, purpose: int, stream: int = 0, window: int = 0) -> np.ndarray:
    """A permutation of range(count), int64, that depends on the arguments alone (Philox4x64-10)."""
    key = np.array([seed & _WORD, epoch], dtype=np.uint64)
    counter = np.array([0, window, stream, purpose], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


def _nearest_streams(batch: int, streams: int) -> str:
    """The remedy: the largest number of streams that is not above the wished one and divides the batch."""
    return f"set it to {next(c for c in range(min(streams, batch), 0, -1) if batch % c == 0)}"
