"""From the order to bytes: the windows of a rank's streams, read ahead.

    Reader.take(n)   the rank's next n samples, as JPEG bytes
      ├─ looks ahead along the rank's positions, and hands each window that comes into sight to a few threads
      ├─ a thread reads a window with one contiguous read a shard (ShardFiles), and cuts the JPEGs out of it
      └─ a sample's bytes are let go when it is taken: what is held is the windows begun and those in sight

A read that fails is tried again for some seconds; after that its samples are taken as bad: named, with the reason, and left
to the loader. But where nothing else can be read either, it is the storage that fails (network file systems answer EIO and
ESTALE while they fail over, for a minute and more): then reading waits for it, and no sample is bad. Only storage that stays
away ends a run.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mcf.data.order import Order, Segment
from mcf.data.shards import Manifest, index_path
from mcf.data.staging import Stage
from mcf.data.storage import EndsEarly, Storage
from mcf.data.ustar import BLOCK
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE

log = logging.getLogger(__name__)

PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try of a failed read
PATIENCE = 240.0  # seconds that storage may be away: well under what the watchdog gives a step (watchdog.timeout)
_LONGEST = 10.0  # seconds between two tries then
_SLOW = 10.0  # seconds of waiting for one window after which that is said, again and again
_FEW = 6  # stand-ins that are looked for behind a URL
_HEADER = re.compile(  # what NumPy writes for the rows of an index (mcf.data.shards)
    rb"\{'descr': \[\('offset', '<i8'\), \('size', '<i8'\), \('key', '\|S([1-9]\d*)'\)\], "
    rb"'fortran_order': False, 'shape': \((\d+),\), \} *\n"
)
_THREADS = 4  # reads in flight a rank: enough to hide the latency of a network file system


@dataclass(slots=True)
class Stored:
    """A sample as it lies in a shard: its JPEG (uint8 [bytes]), or None and the reason why it cannot be had."""

    shard: int
    row: int
    key: str
    jpeg: np.ndarray | None
    error: str | None = None
    staged: bool = False  # read from a staged copy, which may have been damaged since it was made


class Sample(NamedTuple):
    """A sample at its global position."""

    position: int
    stored: Stored


class ShardFiles:
    """All access to files: from their storage, or from staged copies. Safe to use from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        pauses: tuple[float, ...] = PAUSES,
        stage: Stage | None = None,
        closing: threading.Event | None = None,
    ):
        self.manifest = manifest
        self.pauses = pauses
        self.stage = stage
        self.storage = manifest.storage
        self.closing = closing or threading.Event()  # set: no more waiting between tries
        self._header = lru_cache(maxsize=4096)(self._read_header)

    def read(self, segment: Segment, *, retry: bool = True, staged: bool = True) -> list[Stored]:
        """The samples of a run of rows, in order: one read of the index, one of the tar. Bad files make bad samples.

        Where the storage itself fails, this waits for it; after PATIENCE seconds it raises UserError (status UNAVAILABLE).
        staged: from the staged copy, if there is one from which all of them can be had.
        """
        if staged and self.stage is not None and (copy := self.stage.use(segment.shard)) is not self.storage:
            samples, _ = self._tried(segment, (), copy)
            if all(sample.jpeg is not None for sample in samples):
                return [replace(sample, staged=True) for sample in samples]
            self.stage.forget(segment.shard)
        samples, error = self._tried(segment, self.pauses if retry else (), self.storage)
        if error is None:
            return samples
        if not isinstance(error, (FileNotFoundError, EndsEarly)):
            samples, error = self._when_it_answers(segment, samples, error)
        if error is not None and segment.rows > 1 and self._in_part(error) and not self.closing.is_set():
            rows = range(segment.first, segment.first + segment.rows)
            return [self.read(Segment(segment.shard, row, 1), retry=False, staged=False)[0] for row in rows]
        return samples

    def _when_it_answers(
        self, segment: Segment, samples: list[Stored], error: OSError
    ) -> tuple[list[Stored], OSError | None]:
        """What a failed read gives when the storage gives anything at all: at once, where only this read fails."""
        began, pause = time.monotonic(), max(self.pauses, default=0.1)
        name, folder = self.manifest.shards[segment.shard].name, self.manifest.url or self.manifest.path
        failing: OSError | None = error
        while failing is not None and not self.closing.is_set():
            if self._answers(segment.shard):
                return self._tried(segment, (), self.storage)  # it may have come back between the two
            if (away := time.monotonic() - began) > PATIENCE:
                raise UserError(
                    f"{folder}: {name} cannot be read ({_text(failing)}), nor can the other shards, for {away:.0f} s now; "
                    "launch again when the storage answers",
                    UNAVAILABLE,
                )
            if failing is error:
                log.warning("%s: %s, of other shards too; waiting for %s to come back", name, _text(error), folder)
            self.closing.wait(pause)
            pause = min(2 * pause, _LONGEST)
            samples, failing = self._tried(segment, (), self.storage)
        return samples, failing

    def _answers(self, shard: int) -> bool:
        """Whether the storage gives anything: the ends of some other shards (nobody reads those, so no cache has them),
        or a part of this one. That a file is not there, or is short, is an answer."""
        shards = self.manifest.shards
        others = [shards[(shard + i) % len(shards)] for i in range(1, min(4, len(shards)))]
        places = [(other.name, other.bytes - BLOCK) for other in others]
        places += [(shards[shard].name, (shards[shard].bytes - BLOCK) * part // 2) for part in range(3)]
        for name, start in places:
            try:
                self.storage.read(name, start, BLOCK)
            except (FileNotFoundError, EndsEarly):
                return True
            except OSError:
                continue
            return True
        return False

    def _tried(
        self, segment: Segment, pauses: tuple[float, ...], source: Storage
    ) -> tuple[list[Stored], OSError | None]:
        """The samples, bad ones where they cannot be had, and the failure of the storage that made them bad."""
        rows = range(segment.first, segment.first + segment.rows)
        name = self.manifest.shards[segment.shard].name
        try:
            index = self._again(lambda: self._index(segment, source), pauses)
        except (OSError, ValueError) as error:
            reason = f"index of {name}: {_text(error)}"
            failed = error if isinstance(error, OSError) else None
            return [Stored(segment.shard, row, f"{name}:{row}", None, reason) for row in rows], failed
        keys = [key.decode(errors="replace") for key in index["key"]]
        start = int(index["offset"].min())
        size = int((index["offset"] + index["size"]).max()) - start
        if start < 0 or index["size"].min() < 0 or size > self.manifest.shards[segment.shard].bytes:
            return [Stored(segment.shard, r, k, None, f"index of {name}: damaged") for r, k in zip(rows, keys)], None
        try:
            content = self._again(lambda: source.read(name, start, size), pauses)
        except OSError as error:
            reason = f"{name}: {_text(error)}"
            return [Stored(segment.shard, row, key, None, reason) for row, key in zip(rows, keys)], error
        result = []
        for row, key, offset, length in zip(rows, keys, index["offset"] - start, index["size"]):
            # A copy, so that the window's buffer goes and a sample's bytes go when the sample is taken.
            jpeg = np.frombuffer(content, np.uint8, int(length), int(offset)).copy()
            result.append(Stored(segment.shard, row, key, jpeg))
        return result, None

    def _in_part(self, error: OSError) -> bool:
        """Whether only some rows may be lost: one sector, or the tail of the file. A server fails as a whole."""
        return isinstance(error, EndsEarly) or not (self.manifest.url or isinstance(error, FileNotFoundError))

    def _again(self, read, pauses: tuple[float, ...]):
        try:
            return read()
        except OSError:
            if not pauses:
                raise
        self.closing.wait(pauses[0])
        return self._again(read, pauses[1:])

    def _index(self, segment: Segment, source: Storage) -> np.ndarray:
        """Rows of an index. Read, not mapped: a mapped file that shrinks or goes stale kills the process (SIGBUS)."""
        dtype, data, rows = self._header(segment.shard, source)
        expected = self.manifest.shards[segment.shard].samples
        if rows != expected:
            raise ValueError(f"{rows} rows of {dtype}, the manifest says {expected} samples")
        start, size = data + segment.first * dtype.itemsize, segment.rows * dtype.itemsize
        return np.frombuffer(source.read(self._index_name(segment.shard), start, size), dtype)

    def _read_header(self, shard: int, source: Storage) -> tuple[np.dtype, int, int]:
        """dtype, offset of the first row in the file, and number of rows."""
        name = self._index_name(shard)
        major, _ = np.lib.format.read_magic(io.BytesIO(source.read(name, 0, np.lib.format.MAGIC_LEN)))
        width = 2 if major == 1 else 4  # bytes of the header's length
        begin = np.lib.format.MAGIC_LEN + width
        length = int.from_bytes(source.read(name, np.lib.format.MAGIC_LEN, width), "little")
        if length > 1 << 16:
            raise ValueError(f"a header of {length} bytes")
        # From the start, where a read has just gone well: each new place of a file may fail anew.
        header = source.read(name, 0, begin + length)[begin:]
        # Not by NumPy, which has Python's parser do it: of CPython 3.11 that fails now and then where other threads parse
        # or import at the same time ("SystemError: AST constructor recursion depth mismatch").
        if not (found := _HEADER.fullmatch(header)):
            raise ValueError(f"its header is {header[:100]!r}")
        dtype = np.dtype([("offset", "<i8"), ("size", "<i8"), ("key", f"S{int(found[1])}")])
        return dtype, begin + length, int(found[2])

    def _index_name(self, shard: int) -> str:
        return index_path(Path(self.manifest.shards[shard].name)).name


def _text(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class _OpenWindow:
    """A window that is read or being read: its samples in the order in which they are given."""

    def __init__(self, future: Future, rows: int, shards: str):
        self.future, self.rows, self.shards = future, rows, shards

    def take(self, offset: int) -> Stored:
        while not self.future.done() and not wait([self.future], timeout=_SLOW).done:  # the first costs far less
            log.warning(
                "still waiting for the storage to read from %s; nothing is lost, training waits too", self.shards
            )
        samples = self.future.result()
        sample, samples[offset] = samples[offset], None
        return sample


class Reader:
    """The samples of rank `rank` of `world_size`, from the global position `start` (a multiple of the batch) on.

    ahead: how many samples of the rank beyond the last one taken are in sight of the reading threads. stage: copies to
    read from, told how far the reading has come; it is closed by its owner. closing: set by others, from any thread, it
    ends all waiting for the storage.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        *,
        rank: int,
        world_size: int,
        start: int = 0,
        ahead: int = 512,
        pauses: tuple[float, ...] = PAUSES,
        stage: Stage | None = None,
        closing: threading.Event | None = None,
    ):
        self.files = ShardFiles(manifest, pauses, stage, closing)
        self._stage = stage
        self.order = order
        self._position, self._stride = start + rank, world_size  # of the next sample to plan
        self._ahead = ahead
        self._planned: deque[tuple[int, tuple[int, int, int], int]] = deque()  # position, window, offset in it
        self._open: dict[tuple[int, int, int], _OpenWindow] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="mcf-read")

    def take(self, count: int) -> list[Sample]:
        """The rank's next `count` samples, in order."""
        self._plan(count + self._ahead)
        samples = [self._next() for _ in range(count)]
        if self._stage is not None and samples:
            self._stage.passed(samples[-1].position)
        return samples

    def neighbours(self, shard: int, row: int, limit: int = 64) -> Iterator[Stored]:
        """Readable samples that may stand in for a bad one: those after it in its shard, then the starts of the next.

        It depends on the bad sample's place alone, so the stand-in is the same on any number of ranks and in any
        micro-batch, whatever is staged. At most `limit` candidates are looked at, few where each may be a server's time-out.
        """
        limit = min(limit, _FEW) if self.files.manifest.url else limit
        counts = self.order.counts
        rows = [(shard, (row + i) % int(counts[shard])) for i in range(1, min(limit // 2 + 1, int(counts[shard])))]
        others = ((shard + i) % len(counts) for i in range(1, len(counts)))
        rows += [(other, 0) for other in others if counts[other]][: limit - len(rows)]
        for candidate_shard, candidate_row in rows:
            (stored,) = self.files.read(Segment(candidate_shard, candidate_row, 1), retry=False, staged=False)
            if stored.jpeg is not None:
                yield stored

    def from_source(self, stored: Stored) -> Stored | None:
        """A sample that came from a staged copy, which is used no longer, read again; None if it came from the source."""
        if not stored.staged or self._stage is None:
            return None
        self._stage.forget(stored.shard)
        return self.files.read(Segment(stored.shard, stored.row, 1), staged=False)[0]

    def close(self) -> None:
        """End the threads; reads that have not begun are dropped."""
        self.files.closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        self._planned.clear()

    def _next(self) -> Sample:
        position, window, offset = self._planned.popleft()
        opened = self._open[window]
        stored = opened.take(offset)
        if offset == opened.rows - 1:  # offsets come in order: nothing of this window is asked for again
            del self._open[window]
        return Sample(position, stored)

    def _plan(self, count: int) -> None:
        """Have at least `count` samples planned, and the windows they lie in on their way."""
        missing = count - len(self._planned)
        if missing <= 0:
            return
        positions = self._position + self._stride * np.arange(missing, dtype=np.int64)
        self._position += self._stride * missing
        places = self.order.places(positions)
        for position, epoch, stream, index, offset in zip(positions.tolist(), *(part.tolist() for part in places)):
            window = (epoch, stream, index)
            if window not in self._open:
                self._open[window] = self._submit(window, offset)
            self._planned.append((position, window, offset))

    def _submit(self, window: tuple[int, int, int], first: int) -> _OpenWindow:
        content = self.order.window(*window)

        def read() -> list[Stored | None]:
            stored = [sample for segment in content.segments for sample in self.files.read(segment)]
            given: list[Stored | None] = [stored[row] for row in content.permutation]
            given[:first] = [None] * first  # given before the restart
            return given

        shards = sorted({self.files.manifest.shards[segment.shard].name for segment in content.segments})
        return _OpenWindow(self._pool.submit(read), len(content.permutation), ", ".join(shards))
