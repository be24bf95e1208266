"""Copies of the shards that a rank will need next, on local disk, within a budget.

    the rank's streams ──► shards in the order in which they are first needed (arithmetic: mcf.data.order)
                       ──► a thread copies ahead of the reading, as far as the budget reaches ──► STAGE/FINGERPRINT/rank-R/
    a read             ──► from the copy if it is there, else from the source: a copy that is late, damaged or gone costs time
    a shard read up    ──► deleted when its room is wanted

Each rank stages for itself: streams of different ranks share no more than the shards that their spans' ends cut.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mcf.data.order import Order
from mcf.data.shards import Manifest, index_path
from mcf.data.storage import Local, Storage

log = logging.getLogger(__name__)

_WAIT = 0.05  # seconds between two looks at whether room has become free


class Need(NamedTuple):
    """A stretch of a stream in one shard: the ticks (samples given by each stream so far) at which it begins and ends."""

    begin: int
    end: int
    shard: int


def needs(order: Order, rank: int, world_size: int, start: int) -> Iterator[Need]:
    """The stretches of the rank's streams from the global position `start` on, by when they begin. Without end."""
    streams = range(rank, order.streams, world_size)
    tick = start // order.streams

    def of(stream: int) -> Iterator[Need]:
        epoch = tick // order.span
        while True:
            begin = epoch * order.span
            for segment in order.segments(epoch, stream):
                if begin + segment.rows > tick:
                    yield Need(begin, begin + segment.rows, segment.shard)
                begin += segment.rows
            epoch += 1

    yield from heapq.merge(*(of(stream) for stream in streams))


class Stage:
    """Copies shards of `source` ahead into `folder`, at most `budget` bytes of them.

    `use(shard)` gives the storage to read a shard from; `passed(position)` says how far the rank has come. `close()` ends
    the thread; copies stay for a restart, which uses those it needs.
    """

    def __init__(
        self, manifest: Manifest, source: Storage, order: Order, *, folder: Path, budget: int, rank: int, world_size: int, start: int
    ):  # fmt: skip
        self.manifest, self.source, self.budget = manifest, source, budget
        self.folder = folder / manifest.fingerprint / f"rank-{rank}"
        self.local = Local(self.folder)
        self.copied = 0  # shards copied since the start
        self._streams, self._span = order.streams, order.span
        self._tick = start // order.streams
        self._needs = needs(order, rank, world_size, start)
        self._until: dict[int, int] = {}  # shard → tick after which it is not needed, of those planned
        self._there: dict[int, int] = {}  # shard → bytes, whole copies
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mcf-stage", daemon=True)
        self._thread.start()

    def use(self, shard: int) -> Storage:
        """Where to read a shard from."""
        return self.local if shard in self._there else self.source

    def forget(self, shard: int) -> None:
        """A copy that could not be read: the source is used from now on."""
        if self._there.pop(shard, None) is not None:
            log.warning("the staged copy of %s cannot be read; reading the source", self.manifest.shards[shard].name)

    def passed(self, position: int) -> None:
        """All samples before this global position were taken."""
        self._tick = position // self._streams

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_stock()
            for need in self._needs:
                # No further ahead than an epoch: it has no end, and all there is may have room.
                while need.begin > self._tick + self._span and self._pause():
                    pass
                self._until[need.shard] = max(need.end, self._until.get(need.shard, 0))
                size = self.manifest.shards[need.shard].bytes + self._index_size(need.shard)
                if need.shard not in self._there and size <= self.budget:
                    while not self._make_room(size) and self._pause():
                        pass
                    if need.end > self._tick and not self._closing.is_set():  # else the reading was quicker
                        self._copy(need.shard)
                if self._closing.is_set():
                    return
        except OSError as error:
            # The disk is full or gone: training needs no copies.
            log.warning("staging to %s ends (%s); shards are read from their source", self.folder, error)

    def _pause(self) -> bool:
        """Wait a little; False if it is time to end."""
        return not self._closing.wait(_WAIT)

    def _take_stock(self) -> None:
        """Copies of an earlier run that are what the manifest says are there, with indices copied anew; all else goes."""
        numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        for file in sorted(self.folder.iterdir()):
            if self._closing.is_set():
                return
            number = numbers.get(file.name)
            if number is not None and self._is_whole(number, file) and self._index_again(number):
                self._there[number] = file.stat().st_size + index_path(file).stat().st_size
            elif not file.name.endswith(".index.npy") or file.with_name(file.name[:-10] + ".tar").name not in numbers:
                file.unlink()
        while sum(self._there.values()) > self.budget:
            self._delete(next(iter(self._there)))

    def _is_whole(self, shard: int, tar: Path) -> bool:
        wanted = self.manifest.shards[shard]
        return tar.stat().st_size == wanted.bytes and _sha256(tar) == wanted.sha256

    def _index_again(self, shard: int) -> bool:
        """Copy the index of a shard, of which the manifest has no checksum; whether that could be done."""
        file = index_path(self.folder / self.manifest.shards[shard].name)
        temporary = file.with_name(f"{file.name}.tmp")
        try:
            self.source.fetch(file.name, temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if self._full(error):
                raise
            return False
        temporary.replace(file)
        return True

    def _make_room(self, size: int) -> bool:
        """Delete copies that are read up until there is room; False if what is there is still needed."""
        if sum(self._there.values()) + size <= self.budget:
            return True
        for shard in list(self._there):
            if self._until.get(shard, 0) <= self._tick:
                self._delete(shard)
                if sum(self._there.values()) + size <= self.budget:
                    return True
        return False

    def _delete(self, shard: int) -> None:
        tar = self.folder / self.manifest.shards[shard].name
        self._there.pop(shard, None)
        for file in (tar, index_path(tar)):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()

    def _index_size(self, shard: int) -> int:
        return 256 + self.manifest.shards[shard].samples * 100  # at most, with keys as packing makes them

    def _copy(self, shard: int) -> None:
        """Copy index and tar under other names, hold them against the manifest, and rename them."""
        wanted = self.manifest.shards[shard]
        tar = self.folder / wanted.name
        parts = [(index_path(tar), tar.with_name(f"{tar.name}.index.tmp")), (tar, tar.with_name(f"{tar.name}.tmp"))]
        try:
            for file, temporary in parts:
                self.source.fetch(file.name, temporary)
        except OSError as error:
            for _, temporary in parts:
                temporary.unlink(missing_ok=True)
            if self._full(error):
                raise
            log.warning("%s cannot be staged (%s)", wanted.name, error)
            return
        if _sha256(parts[1][1]) != wanted.sha256:
            log.warning("%s is not what the manifest says; it is not staged", wanted.name)
            for _, temporary in parts:
                temporary.unlink(missing_ok=True)
            return
        for file, temporary in parts:
            temporary.replace(file)
        self._there[shard] = wanted.bytes + index_path(tar).stat().st_size
        self.copied += 1

    @staticmethod
    def _full(error: OSError) -> bool:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
