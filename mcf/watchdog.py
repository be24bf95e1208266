"""A dead or stuck rank ends the run in time and by name; without this the others would wait for it for ever.

    training thread    mark("forward")               in memory: no file, no lock, under a microsecond
    beating thread     RUN/heartbeats/rank-R.json    a small write every few seconds
    watching thread    no mark for too long          who is it? (mcf/heartbeat.py) → events.jsonl, one line, status 76

In every step all ranks wait for each other, so one that stands still soon makes all stand still. Each watches only
itself, and reads heartbeats of others only when its own time is up: a healthy run costs nothing that grows with the
ranks. The watching thread touches no file itself, so that storage that hangs cannot hold it back, and the process is
ended without asking threads that may never answer. Whoever launched the ranks ends the rest (mcf.task, srun
--kill-on-bad-exit, torchrun), a stopped process included, and starts or queues the run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from mcf import heartbeat
from mcf.config import WatchdogConfig
from mcf.exits import RANK_LOST
from mcf.heartbeat import Beat, Verdict
from mcf.track.jsonl import EVENTS, Writer

# Kind of the event in events.jsonl: {"kind": "rank_lost", "ranks": [1], "reason": "stuck", "phase": …, "step": …}.
EVENT = "rank_lost"

TICK = 0.25  # seconds between two looks at the clock
LOOKS = 3  # beats between the two looks at all ranks
JUDGES = 8  # ranks that look first
NEAR = 8  # neighbours among which a rank finds those of its own machine
_AT_LEAST = 20.0  # seconds that storage which hangs may hold back the end
# Phases that may take long: rank 0 writes a checkpoint, trackers are given time for their last words.
_SLOW = ("probing", "evaluating", "saving", "waiting", "ending")


class Mark(Protocol):
    """`Watchdog.mark`, for those who only make marks."""

    def __call__(self, phase: str, step: int | None = None) -> None: ...


def unwatched(phase: str, step: int | None = None) -> None:
    """The mark of a rank that nobody watches."""


class Watchdog:
    """Watches this rank, as a context manager around everything it does.

    Args:
        rank: this rank. size: number of ranks. launch: name of this start of the run, equal on all ranks, different
            from the one before (`mcf.rendezvous.launch_name`).
        config: the limits, until `configure` says others.
    """

    def __init__(self, rank: int, size: int, launch: str, config: WatchdogConfig | None = None):
        self.size = size
        self.run_dir: Path | None = None
        self._own = Beat(rank, launch, socket.gethostname(), heartbeat.machine(), os.getpid())
        self._config = config or WatchdogConfig()
        self._first_step: int | None = None
        self._mark = ("starting", 0, 0)  # phase, step, marks: replaced as one, so that no reader sees half of it
        self._age = 0.0
        self._beats = 0
        self._state = "running"
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self, run_dir: Path) -> None:
        """Begin to leave heartbeats in a run directory; rank 0 makes it."""
        self.run_dir = Path(run_dir)
        if self._own.rank == 0:
            with contextlib.suppress(OSError):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / heartbeat.FOLDER / heartbeat.VERDICT).unlink(missing_ok=True)
        self._beat()

    def configure(self, config: WatchdogConfig) -> None:
        """Take the limits of the recipe."""
        self._config = config

    def mark(self, phase: str, step: int | None = None) -> None:
        """This rank enters a phase (of a step). All ranks make the same marks in the same order."""
        _, current, marks = self._mark
        if step is not None and self._first_step is None:
            self._first_step = step
        self._mark = (phase, current if step is None else step, marks + 1)

    def __enter__(self) -> Watchdog:
        for run, name in ((self._watch, "mcf-watchdog"), (self._keep_beating, "mcf-heartbeat")):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Say how it ended. What a dead peer did to a collective ends as the loss of that rank (status RANK_LOST), by name."""
        if self.size > 1 and error is not None and _speaks_of_a_connection(error) and (lost := self._lost_peer(error)):
            self._end(lost)
        self._ended.set()
        self._state = "done" if kind is None else "failed"
        self._beat()
        for thread in self._threads:
            thread.join(2.0)  # not for ever: storage may hang

    # --- threads ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        seen, last = self._mark, time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            # Time in which the whole process stood still (scontrol suspend, SIGSTOP) is not its fault.
            self._age += min(now - last, 4 * TICK)
            last = now
            if self._mark is not seen:
                seen, self._age = self._mark, 0.0
            if self._age > self._limit():
                # In a thread of its own: files may hang.
                judging = threading.Thread(target=self._judge, args=(seen,), daemon=True)
                judging.start()
                judging.join((2 * LOOKS + 1) * self._interval() + _AT_LEAST)
                if judging.is_alive():
                    os._exit(RANK_LOST)

    def _keep_beating(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(TICK):
            # At every tick until the first one is written: rank 0 may still be making the folder.
            if time.monotonic() >= due and self._beat():
                due = time.monotonic() + self._interval()

    def _limit(self) -> float:
        """Seconds that may pass until the next mark."""
        phase, step, _ = self._mark
        if not self._config.timeout:
            return math.inf
        # The first step compiles kernels, fills the loader and makes buffers.
        slow = phase in _SLOW or self._first_step is None or step == self._first_step
        return max(self._config.timeout, self._config.slow_timeout) if slow else self._config.timeout

    def _interval(self) -> float:
        """Seconds between two beats."""
        return min(10.0, max(0.5, self._config.timeout / 60)) if self._config.timeout else 10.0

    def _beat(self) -> bool:
        """Write a heartbeat; whether that could be done."""
        if self.run_dir is None:
            return False
        with self._writing, contextlib.suppress(OSError):  # storage that is away for a while ends no run
            self._beats += 1
            heartbeat.write(self.run_dir, self._now())
            return True
        return False

    def _now(self) -> Beat:
        phase, step, marks = self._mark
        return dataclasses.replace(
            self._own, beats=self._beats, state=self._state, phase=phase, step=step, marks=marks, seconds=self._age
        )

    # --- who it is --------------------------------------------------------------------------------------------------

    def _judge(self, seen: tuple[str, int, int]) -> None:
        """Find out who it is and end this process, unless it has got on meanwhile."""
        verdict = self._find()
        if self._mark is seen:
            self._end(verdict, stack=True)

    def _lost_peer(self, error: BaseException) -> Verdict | None:
        """Which rank an error of a connection is due to; None if all live, and it is this rank's own trouble."""
        line = f"rank {self._own.rank}: {' '.join(str(error).split())[:300]}; looking which rank is lost"
        print(line, file=sys.stderr, flush=True)
        verdict = self._find()
        # That a living rank is behind is no reason for a connection to break, unless its time is up.
        settled = heartbeat.settled(self.run_dir, self._own.launch) if self.run_dir else None
        return None if verdict.reason == "stuck" and settled is None else verdict

    def _find(self) -> Verdict:
        """Who holds the run up: as another rank has found, as its machine knows, or by two looks at all ranks.

        The first few ranks look; the others wait for what those find, and look only if nothing comes of it.
        """
        near = range(max(0, self._own.rank - NEAR), min(self.size, self._own.rank + NEAR + 1))
        mates = [rank for rank, beat in self._read(near).items() if beat.machine == self._own.machine]
        if self._own.rank >= JUDGES and (verdict := self._wait(LOOKS + 1, mates)):
            return verdict
        before = self._read(range(self.size))
        if verdict := self._wait(LOOKS, mates):
            return verdict
        after = self._read(range(self.size))
        # Where not even this rank's own file can be read, nothing is known of the others.
        known = self._own.rank in after
        return heartbeat.judge(
            before if known else {},
            after if known else {},
            self._now(),
            range(self.size) if known else [self._own.rank],
        )

    def _wait(self, beats: int, mates: list[int]) -> Verdict | None:
        """What another rank finds within so many beats, or what this machine knows of its own ranks."""
        deadline = time.monotonic() + beats * self._interval()
        while time.monotonic() < deadline:
            settled = heartbeat.settled(self.run_dir, self._own.launch) if self.run_dir else None
            if verdict := settled or heartbeat.gone(self._read(mates), self._now()):
                return verdict
            time.sleep(TICK)
        return None

    def _read(self, ranks: Iterable[int]) -> dict[int, Beat]:
        return heartbeat.read(self.run_dir, ranks, self._own.launch) if self.run_dir else {}

    def _end(self, verdict: Verdict, stack: bool = False) -> None:
        """Write the event, unless another rank has, say it, and end the process."""
        first = True
        if self.run_dir is not None:
            with contextlib.suppress(OSError):
                verdict, first = heartbeat.settle(self.run_dir, verdict, self._own)
                if first:
                    record = {"kind": EVENT, "time": time.time(), **dataclasses.asdict(verdict)}
                    Writer(self.run_dir / EVENTS).append(record)
        with contextlib.suppress(OSError, ValueError):
            if stack and self._own.rank in verdict.ranks:
                print("where each thread of this rank stands:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
            sys.stdout.flush()
            remedy = "the run ends, and goes on from its last checkpoint when it is launched again"
            print(f"error: {verdict.message}; {remedy}", file=sys.stderr, flush=True)
        os._exit(RANK_LOST)


def _speaks_of_a_connection(error: BaseException) -> bool:
    """Whether an error may be what a collective makes of a lost peer; gloo's has no type of its own."""
    said = f"{type(error).__name__} {error}"
    return isinstance(error, RuntimeError) and any(word in said for word in ("Dist", "gloo", "NCCL", "onnection"))
