"""What benchmarks read: rates of loops, CPU time and memory of a process and its workers, the machine's name."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from mcf import processor


def rate(counts: Iterator[int], seconds: float, ahead: int) -> tuple[float, float]:
    """Images per second, and per second of CPU time (worker processes included), of a loop that yields how many it made.

    seconds: how long; at least one batch is taken. ahead: batches that may lie ready from before; they are taken before
    the clock runs.
    """
    for _ in range(ahead + 1):
        next(counts)
    began, cpu_began, images = time.perf_counter(), cpu_seconds(), 0
    while not images or time.perf_counter() < began + seconds:  # a busy machine may take all the time for itself
        images += next(counts)
    now = time.perf_counter()
    return images / (now - began), images / max(cpu_seconds() - cpu_began, 1e-9)


def settle(limit: float = 10.0) -> None:
    """Wait until nothing is made ahead any more: no CPU time is used (or `limit` seconds)."""
    end, before = time.perf_counter() + limit, cpu_seconds()
    while time.perf_counter() < end:
        time.sleep(0.1)
        now = cpu_seconds()
        if now - before < 0.02:  # of a worker's time hundredths are known
            return
        before = now


def cpu_seconds() -> float:
    """CPU time of this process and of its worker processes, those that have ended too."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = [worker.cpu_times() for worker in _workers()]
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(t.user + t.system for t in times)


def memory() -> int:
    """Bytes of this process and its workers; what several share is counted once (PSS)."""
    return sum(process.memory_full_info().pss for process in (psutil.Process(), *_workers()))


def spread(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return [round(float(v), 1) for v in np.percentile(values, [20, 50, 80])]


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Have `peak_memory` count from here on, where the system can be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (marks := Path("/proc/self/clear_refs")).exists():
        with contextlib.suppress(OSError):
            marks.write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held: the GPU's by this process, or the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's: a process that another one has started begins at that one's mark.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_name(device: torch.device) -> str:
    """The GPU, or the processor's model and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    here = processor.here()
    return f"{here.model} ({here.cores or '?'} cores)"


def _workers() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)
