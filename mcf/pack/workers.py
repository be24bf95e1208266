"""A process pool that gives results in order and outlives its workers.

An image can kill the process that decodes it (a bug in a codec, the kernel's out-of-memory killer). Then what was
under way is done again with care, in one process and at last one by one, until the culprit is alone; it is answered
for by `on_death`, and the pool goes on. Workers leave when their parent is killed, and let it handle Ctrl-C.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 8  # items sent at once: enough to hide the cost of sending, few enough to bound the memory under way


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def ordered(
    function: Callable[[T], R], items: Iterable[T], workers: int, on_death: Callable[[T], R]
) -> Generator[R, None, None]:
    """`map(function, items)` on `workers` processes; one worker is this process itself, without protection.

    `function` and items are pickled (spawned processes). An exception of `function` is raised here.
    """
    if workers == 1:
        yield from map(function, items)
        return
    source = iter(items)
    crew = _Crew(function, workers, on_death)
    try:
        while chunk := list(itertools.islice(source, CHUNK)):
            crew.submit(chunk)
            if crew.full:
                yield from crew.take()
        while crew.waiting:
            yield from crew.take()
    finally:
        crew.pool.shutdown(wait=True, cancel_futures=True)


class _Crew(Generic[T, R]):
    """The pool and the chunks under way, oldest first."""

    def __init__(self, function: Callable[[T], R], workers: int, on_death: Callable[[T], R]):
        self.function, self.workers, self.on_death = function, workers, on_death
        self.pool = _pool(workers)
        self.waiting: deque[tuple[list[T], Future[list[R]]]] = deque()

    @property
    def full(self) -> bool:
        return len(self.waiting) >= 3 * self.workers

    def submit(self, chunk: list[T]) -> None:
        self.waiting.append((chunk, self._send(chunk)))

    def take(self) -> list[R]:
        """Results of the oldest chunk."""
        future = self.waiting[0][1]
        try:
            results = future.result()
        except BrokenProcessPool:
            self._recover()
            return self.take()
        self.waiting.popleft()
        return results

    def _send(self, chunk: list[T]) -> Future[list[R]]:
        try:
            return self.pool.submit(_each, self.function, chunk)
        except BrokenProcessPool as error:
            future: Future[list[R]] = Future()
            future.set_exception(error)
            return future

    def _recover(self) -> None:
        """Do again, with care, all that was under way, and start a new pool."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for chunk, future in list(self.waiting):
            self.waiting.popleft()
            if future.cancelled() or isinstance(future.exception(), BrokenProcessPool):
                future = Future()
                future.set_result(self._with_care(chunk))
            self.waiting.append((chunk, future))
        self.pool = _pool(self.workers)

    def _with_care(self, chunk: list[T]) -> list[R]:
        with _pool(1) as pool:
            try:
                return pool.submit(_each, self.function, chunk).result()
            except BrokenProcessPool:
                pass
        if len(chunk) == 1:
            return [self.on_death(chunk[0])]
        half = len(chunk) // 2
        return self._with_care(chunk[:half]) + self._with_care(chunk[half:])


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=leave_with_parent)


def leave_with_parent() -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when it has ended, however that came about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True).start()


def _leave_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _each(function: Callable[[T], R], chunk: list[T]) -> list[R]:
    return [function(item) for item in chunk]
