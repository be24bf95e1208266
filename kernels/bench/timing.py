"""Times of a function, in microseconds: forward and backward apart, over inputs that are not in a cache.

On a GPU the calls of a round are queued behind a kernel that only waits, so that the device never waits for Python and
its own time is measured, from event to event (the events' own two microseconds or so included; `overhead_us` says how
many). Every call of a round has inputs of its own, together more than the L2 cache holds, and all forward passes come before
the first backward pass: nothing is found in the cache that training would not find there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mcf.kernels.bench.gate import leaves, tensors, upstream
from mcf.kernels.bench.registry import Case, Function

BUFFERS = (2, 48)
"""How many sets of inputs there are at least and at most."""
SAMPLES = 60
"""Calls that are timed at least, where `seconds` allows."""


@dataclass(frozen=True)
class Times:
    """Percentiles of one pass in microseconds, and how many calls they are of."""

    p20: float
    p50: float
    p80: float
    samples: int


class Clock(Protocol):
    """Marks moments on a device's own time."""

    def begin(self) -> None: ...
    def mark(self) -> Any: ...
    def end(self) -> None: ...
    def between(self, first: Any, second: Any) -> float: ...


class CpuClock:
    """The processor's clock."""

    def begin(self) -> None:
        """Nothing is queued on a CPU."""

    def mark(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def end(self) -> None:
        """All work is done when it returns."""

    def between(self, first: float, second: float) -> float:
        """Microseconds from one mark to another."""
        return 1e6 * (second - first)


LONGEST_HOLD_S = 0.1
"""How long a GPU is held back at most while work is queued."""


class CudaClock:
    """Events of the current stream; a round's work is queued behind a kernel that waits until all of it is there."""

    def __init__(self) -> None:
        self.cycles = 0
        torch.cuda._sleep(10_000_000)  # loads the kernel, and has the clock rise
        start = self.mark()
        torch.cuda._sleep(10_000_000)
        stop = self.mark()
        stop.synchronize()
        self.cycles_per_second = 10_000_000 / (start.elapsed_time(stop) / 1e3)

    def begin(self) -> None:
        """Hold the device back for as long as queueing the last round took, and half of that again."""
        torch.cuda.synchronize()
        torch.cuda._sleep(self.cycles + 100_000)
        self.started = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> None:
        """Wait for the device."""
        queued = time.perf_counter() - self.started
        # A call that waits for the device waited for this, too: it must not grow from round to round.
        self.cycles = int(min(1.5 * queued, LONGEST_HOLD_S) * self.cycles_per_second)
        torch.cuda.synchronize()

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Microseconds from one event to another."""
        return 1e3 * first.elapsed_time(second)


def clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def measure(case: Case, function: Function, device: torch.device, seconds: float) -> dict[str, Times]:
    """Times of all passes of a case; a warm-up round, in which things are compiled, does not count.

    Args:
        case: says the arguments and what gets a gradient.
        function: what is timed; it passed the gate.
        device: where.
        seconds: when to stop at the latest (after the round that is running, and not before the first).
    """
    sets = inputs(case, function, device)
    watch = clock(device)
    _round(case, function, sets, watch)
    taken: dict[str, list[float]] = {}
    until = time.monotonic() + seconds
    while True:
        for name, values in _round(case, function, sets, watch).items():
            taken.setdefault(name, []).extend(values)
        if len(taken["forward"]) >= SAMPLES or time.monotonic() > until:
            return {name: percentiles(values) for name, values in taken.items()}


def inputs(case: Case, function: Function, device: torch.device) -> list[tuple[Any, ...]]:
    """Sets of (arguments, gradients from above), together three times what the L2 cache holds."""
    generator = torch.Generator(device).manual_seed(0)
    sets: list[tuple[Any, ...]] = []
    held = 0
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    least, most = BUFFERS
    while len(sets) < least or (held < 3 * cache and len(sets) < most):
        sets.append(_inputs(case, function, generator))
        held += sum(x.nbytes for part in sets[-1] for x in part if isinstance(x, Tensor))
    return sets


def _inputs(case: Case, function: Function, generator: torch.Generator) -> tuple[Any, ...]:
    arguments = leaves(case, case.make(generator))
    return arguments, upstream(case, _learnt(function(*arguments))) if case.learn else ()


def _learnt(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs that a gradient comes through."""
    return tuple(x for x in tensors(outputs) if x.requires_grad)


def _round(case: Case, function: Function, sets: Sequence[tuple[Any, ...]], watch: Clock) -> dict[str, list[float]]:
    """One call for each set of inputs; microseconds of each pass."""
    forward, backward = [], []
    results: list[tuple[Tensor, ...]] = []
    watch.begin()
    for arguments, _ in sets:
        start = watch.mark()
        result = function(*arguments)
        forward.append((start, watch.mark()))
        # Without a backward pass nothing needs to be kept, and the allocator gives the same memory again.
        results.append(_learnt(result) if case.learn else ())
    if case.learn:
        for place, (arguments, above) in enumerate(sets):
            wanted = [arguments[i] for i in case.learn]
            start = watch.mark()
            torch.autograd.grad(results[place], wanted, above)
            backward.append((start, watch.mark()))
            results[place] = ()
    watch.end()
    times = {"forward": [watch.between(*pair) for pair in forward]}
    if case.learn:
        times["backward"] = [watch.between(*pair) for pair in backward]
        times["both"] = [a + b for a, b in zip(times["forward"], times["backward"])]
    return times


def percentiles(values: Sequence[float]) -> Times:
    """The 20th, 50th and 80th percentile."""
    cuts = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = cuts.tolist()
    return Times(p20, p50, p80, len(values))


def peak_mib(case: Case, function: Function, device: torch.device) -> float | None:
    """MiB that one call, forward and backward, takes at its peak beside its arguments; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    arguments, above = _inputs(case, function, torch.Generator(device).manual_seed(0))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function(*arguments)
    if case.learn:
        torch.autograd.grad(_learnt(result), [arguments[i] for i in case.learn], above)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@dataclass(frozen=True)
class Ceilings:
    """What a machine was measured to do at most: bytes/s of a copy, operations/s of a product, and an empty timing."""

    bandwidth: float
    throughput: float
    overhead_us: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the machine itself: a copy beyond all caches and a large matrix product in `dtype`."""
    gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if gpu else (64 << 20, 512)
    source, sink = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    watch = clock(device)

    def fastest(function: Any) -> float:
        taken = []
        for _ in range(3 if gpu else 2):
            watch.begin()
            marks = [watch.mark()]
            for _ in range(5):
                function()
                marks.append(watch.mark())
            watch.end()
            taken += [watch.between(a, b) for a, b in itertools.pairwise(marks)]
        return 1e-6 * min(taken)

    empty = fastest(lambda: None)
    return Ceilings(
        bandwidth=2 * size / fastest(lambda: sink.copy_(source)),
        throughput=2 * side**3 / fastest(lambda: left @ right),
        overhead_us=1e6 * empty,
    )
