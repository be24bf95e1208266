"""The loader: order → reader → decoder, in a thread of its own, a few micro-batches ahead of training.

    positions of this rank ── Reader.take ── JPEGs ── flips from (seed, position) ── Decoder ── Batch ── queue

While DALI's threads decode a micro-batch, this thread takes the next from the reader and finishes the last; so they wait
for Python only while they are handed JPEGs.

The sequence of samples over all ranks is that of `mcf.data.order`, whatever the ranks, the micro-batch, the threads and
the restarts. A sample that cannot be read or decoded does not change the sequence: it keeps its position, its key and
its flip, and is shown the picture of the nearest good sample after it in its shard (`Reader.neighbours`), which depends
on its place alone. It is named and counted, and too many of them end the run.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcf.config import DataConfig
from mcf.data.bad import BadSample, Tally
from mcf.data.dali import Decoded, Decoder, Undecodable
from mcf.data.order import Order
from mcf.data.reader import PAUSES, Reader, Sample, Stored
from mcf.data.shards import Manifest, load_manifest
from mcf.data.staging import Stage
from mcf.errors import UserError
from mcf.kernels import FLIP, uniform

log = logging.getLogger(__name__)

_AHEAD = 4  # micro-batches beyond those decoded whose windows are being read


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    images: uint8 [b, H, W, 3] on the device, flipped already, not normalised. positions: int64 [b] on the device,
    samples seen before each. keys: of the samples that stand at these positions, whether they could be read or not.
    """

    images: Tensor
    positions: Tensor
    keys: list[str]


class Loader:
    """Micro-batches of one rank without end, from `start` samples seen (a multiple of `batch`).

    `iter(loader)` begins at `start` (and ends an iteration before it). `close()` ends its threads; a closed loader can
    be iterated again. `wait` is how many seconds the last `next()` waited for its batch.

    threads: decoder threads where data.threads is not set; default: the cores this process may run on, shared with
    the other ranks of the machine as LOCAL_WORLD_SIZE counts them. manifest: that of data.path, where rank 0 has read it
    for all; it is read here if None. local_ranks: ranks of this machine, which share data.stage_gb.

    Raises UserError for a folder that is not what it should be, for numbers that do not fit each other, and, out of
    `next()`, when the bad samples that this rank has found are too many for the data (mcf.data.bad.Tally: those of all
    ranks are whoever's who hears of all), or when the storage stays away (mcf.data.reader.PATIENCE).
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        batch: int,
        micro_batch: int,
        seed: int,
        image_size: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        start: int = 0,
        threads: int | None = None,
        pauses: tuple[float, ...] = PAUSES,
        manifest: Manifest | None = None,
        local_ranks: int = 1,
    ):
        if data.path is None:
            raise UserError("data.path is not set; give the folder that mcf.pack wrote: data.path=FOLDER")
        self.manifest = manifest or load_manifest(data.path)
        self.order = Order(self.manifest.counts, batch=batch, streams=data.streams, window=data.window, seed=seed)
        _check_ranks(batch, micro_batch, data.streams, world_size)
        if start % batch:
            raise UserError(
                f"start={start} samples seen is no multiple of batch={batch}; resume with the run's own batch"
            )
        self.data, self.batch, self.micro_batch, self.seed = data, batch, micro_batch, seed
        self.image_size, self.rank, self.world_size, self.start = image_size, rank, world_size, start
        self.device = _with_index(torch.device(device))
        self.threads = data.threads or threads or _share_of_cores()
        self.pauses, self.local_ranks = pauses, local_ranks
        # Made here, so that a package or a GPU that is missing is told at once, and so that DALI, which cleans up when
        # the interpreter exits, does so after the thread has ended (what was registered last goes first).
        self.decoder = Decoder(image_size, micro_batch, device=self.device, decoder=data.decoder, threads=self.threads)
        self.wait = 0.0
        self._bad: queue.SimpleQueue[BadSample] = queue.SimpleQueue()
        self._met: list[BadSample] = []  # out of the queue, and not taken
        self._producer: _Producer | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._producer = producer = _Producer(self, self._bad)
        return self._follow(producer)

    def take_bad(self, before: int | None = None) -> list[BadSample]:
        """The bad samples that were not taken yet, by position; only those before a global position, if one is given.

        The thread runs ahead: what it has met from there on is kept back. All that stand before a batch are found.
        """
        while not self._bad.empty():
            self._met.append(self._bad.get())
        self._met.sort(key=lambda bad: bad.position)
        count = sum(before is None or bad.position < before for bad in self._met)
        taken, self._met = self._met[:count], self._met[count:]
        return taken

    def stage(self) -> Stage | None:
        """Begin to copy the shards of an iteration ahead, if the recipe wants that."""
        if self.data.stage is None:
            return None
        return Stage(
            self.manifest,
            self.manifest.storage,
            self.order,
            folder=Path(self.data.stage),
            budget=int(self.data.stage_gb * 1e9) // self.local_ranks,
            rank=self.rank,
            world_size=self.world_size,
            start=self.start,
        )

    def close(self) -> None:
        """End the threads of the running iteration."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def _follow(self, producer: _Producer) -> Iterator[Batch]:
        try:
            while True:
                began = time.perf_counter()
                batch = producer.get()
                self.wait = time.perf_counter() - began
                yield batch
        finally:
            producer.close()


@dataclass
class _Work:
    """A micro-batch on its way: `jpegs` are those to be shown, which are not the samples' own where these are bad."""

    samples: list[Sample]
    positions: Tensor  # int64 [b]
    mirror: np.ndarray  # bool [b]
    jpegs: list[np.ndarray | None]


class _Producer:
    """The thread that makes batches, and its queue. The first error ends it, and is raised where batches are taken."""

    def __init__(self, loader: Loader, bad: queue.SimpleQueue[BadSample]):
        self.loader, self.bad = loader, bad
        self.decoder = loader.decoder
        self.tally = Tally(loader.data.max_bad, loader.manifest.samples)
        self.undecodable: dict[tuple[int, int], str] = {}  # (shard, row) → reason: not tried again in later epochs
        self.ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=loader.data.prefetch)
        self.closing = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="mcf-loader", daemon=True)
        self.thread.start()
        atexit.register(self.close)  # a thread inside DALI when the interpreter goes would crash it

    def get(self) -> Batch:
        """The next batch, or the error that ended the thread."""
        if self.error is None:
            item = self.ready.get()
            if not isinstance(item, BaseException):
                return item
            self.error = item
        raise self.error

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self.closing.set()
        if self.error is None:
            self.error = RuntimeError("this loader is closed")
        atexit.unregister(self.close)
        if threading.current_thread() is self.thread:  # the collector may run anywhere
            return
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):  # make room: the thread may be waiting to put
                self.ready.get_nowait()
            self.thread.join(0.01)

    def _run(self) -> None:
        loader = self.loader
        reader = stage = None
        try:
            stage = loader.stage()
            reader = Reader(
                loader.manifest,
                loader.order,
                rank=loader.rank,
                world_size=loader.world_size,
                start=loader.start,
                ahead=_AHEAD * loader.micro_batch,
                pauses=loader.pauses,
                stage=stage,
                closing=self.closing,
            )
            if loader.device.type == "cuda":
                torch.cuda.set_device(loader.device)
            begun = self._begin(self._take(reader), reader)
            while not self.closing.is_set():
                following = self._take(reader)
                decoded = self._decoded(begun, reader)
                done, begun = begun, self._begin(following, reader)
                self._put(self._batch(done, decoded))
        except BaseException as error:  # the one who waits for a batch must hear of everything
            self._put(error)
        finally:
            if reader is not None:
                reader.close()
            if stage is not None:
                stage.close()
            self.decoder.close()

    def _put(self, item: Batch | BaseException) -> None:
        while not self.closing.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return

    def _take(self, reader: Reader) -> _Work:
        samples = reader.take(self.loader.micro_batch)
        positions = torch.tensor([sample.position for sample in samples], dtype=torch.int64)
        mirror = (uniform(self.loader.seed, positions, FLIP) < self.loader.data.flip).numpy()
        return _Work(samples, positions, mirror, [sample.stored.jpeg for sample in samples])

    def _begin(self, work: _Work, reader: Reader) -> _Work:
        """Have a micro-batch decoded. Nothing else may be in the decoder: it is needed for those that stand in."""
        reasons = {i: reason for i, sample in enumerate(work.samples) if (reason := self._known(sample.stored))}
        self._replace(work, reasons, reader)
        self.decoder.begin(work.jpegs, work.mirror)  # type: ignore[arg-type]  # None is replaced by now
        return work

    def _decoded(self, work: _Work, reader: Reader) -> Decoded:
        """Wait for the micro-batch that was begun; what cannot be decoded is replaced until all can."""
        while True:
            try:
                return self.decoder.wait()
            except Undecodable as error:
                reasons = self._at_the_source(work, error.reasons, reader)
            for i, reason in reasons.items():
                self.undecodable[work.samples[i].stored.shard, work.samples[i].stored.row] = reason
            self._replace(work, reasons, reader)
            self.decoder.begin(work.jpegs, work.mirror)  # type: ignore[arg-type]

    def _at_the_source(self, work: _Work, reasons: dict[int, str], reader: Reader) -> dict[int, str]:
        """What is undecodable for another reason than a damaged copy; what its source has takes the place of the copy's."""
        found = {}
        for i, reason in reasons.items():
            again = reader.from_source(work.samples[i].stored)
            if again is not None:
                work.samples[i] = Sample(work.samples[i].position, again)
                work.jpegs[i], reason = again.jpeg, again.error or ""
            if reason:
                found[i] = reason
        return found

    def _batch(self, work: _Work, decoded: Decoded) -> Batch:
        keys = [sample.stored.key for sample in work.samples]
        return Batch(self.decoder.finish(decoded), self.decoder.handed_over(work.positions), keys)

    def _replace(self, work: _Work, reasons: dict[int, str], reader: Reader) -> None:
        for i, reason in reasons.items():
            work.jpegs[i] = self._stand_in(work.samples[i], reason, reader)

    def _known(self, stored: Stored) -> str | None:
        """Why a sample is bad, if that is known before decoding it."""
        return stored.error if stored.jpeg is None else self.undecodable.get((stored.shard, stored.row))

    def _stand_in(self, sample: Sample, reason: str, reader: Reader) -> np.ndarray:
        """The JPEG of the first good neighbour; the sample is reported each time it comes up."""
        stored = sample.stored
        name = self.loader.manifest.shards[stored.shard].name
        for candidate in reader.neighbours(stored.shard, stored.row):
            if self.closing.is_set():
                break
            try:
                self.decoder.decode([candidate.jpeg], np.zeros(1, dtype=bool))  # type: ignore[list-item]
            except Undecodable:
                continue
            bad = BadSample(sample.position, name, stored.row, stored.key, reason, candidate.key)
            self.bad.put(bad)
            log.warning("bad sample %s in %s: %s; shown instead: %s", bad.key, bad.shard, bad.reason, bad.substitute)
            self.tally.add([bad])
            return candidate.jpeg  # type: ignore[return-value]
        raise UserError(f"{name}: {stored.key} is unreadable ({reason}) and so is all around it; restore the shard")


def _check_ranks(batch: int, micro_batch: int, streams: int, world_size: int) -> None:
    """The global batch must be a whole number of micro-batches of all ranks, and each rank own whole streams."""
    if streams % world_size:
        raise UserError(
            f"{world_size} ranks do not divide data.streams={streams}; set data.streams to a multiple of {world_size} "
            f"that divides batch={batch}, or use another number of ranks"
        )
    if batch % (world_size * micro_batch):
        raise UserError(
            f"batch={batch} is no multiple of {world_size} ranks · micro_batch={micro_batch}; "
            f"set micro_batch to a divisor of {batch // world_size}"
        )


def _with_index(device: torch.device) -> torch.device:
    """The device by its number, which a thread of its own does not have from the thread that made it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _share_of_cores() -> int:
    """Cores this process may run on, shared with the other ranks of the machine."""
    try:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        local = 1
    return max(1, len(os.sched_getaffinity(0)) // max(1, local))
