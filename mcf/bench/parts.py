"""Where the time of a step goes: a stopwatch with one hand, which points at one part of the step at a time.

    loader │ masks │ momentum branch │ encoder │ decoder │ heads │ teacher │ losses │ … backward │ optimiser │ EMA

Hooks move the hand where a part begins, forward and backward, so that the parts add up to the step, whatever they are.
On a GPU the marks are events on its stream: they cost no synchronisation within the step, and the time of a part is the
device's. Autograd takes the newest operations first, so the backward parts come in a known order: losses, teacher,
heads, decoder, encoder. The losses' own backward is counted with the teacher's, which follows without a seam.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mcf.costs import Flops
from mcf.models.mcf import MCF
from mcf.step import Step

# What count_flops counts together, and the parts that do it.
COUNTED = {
    "encoder": ("encoder", "encoder backward"),
    "decoder": ("decoder", "decoder backward"),
    "heads": ("heads", "heads backward"),
    "momentum": ("momentum branch",),
    "teacher": ("teacher on the image", "teacher on the pseudo image", "teacher backward"),
}
MARK = "part: "  # what a mark is called in a profiler's trace
# Parts in the order of a step; those that a recipe does not have are left out.
PARTS = (
    "loader", "masks", "momentum branch", "encoder", "decoder", "heads", "teacher on the image",
    "teacher on the pseudo image", "losses", "losses backward", "teacher backward", "heads backward",
    "decoder backward", "encoder backward", "optimiser", "EMA", "other",
)  # fmt: skip
_PHASES = {
    "loading": "loader",
    "keys": "momentum branch",
    "forward": "other",
    "step": "optimiser",
}


class Stopwatch:
    """Seconds by part. `start()`, then `point(part)` wherever one begins, then `stop()`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.part = "other"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """A step begins."""
        self._marks = []
        self.point("other")

    def point(self, part: str) -> None:
        """From here on the time is this part's."""
        self.part = part
        self._marks.append((part, self._now()))
        with record_function(MARK + part):
            pass

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The time within is this part's, and the time behind it the former part's again."""
        before = self.part
        self.point(part)
        try:
            yield
        finally:
            self.point(before)

    def stop(self) -> dict[str, float]:
        """The step has ended: seconds of each part it had, in the order of PARTS. Waits for the device."""
        self.point("other")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            took = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
            seconds[part] = seconds.get(part, 0.0) + took
        return {part: seconds[part] for part in PARTS if part in seconds}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch(step: Step) -> Stopwatch:
    """Put hooks into a step; the stopwatch that they move. They stay."""
    clock = Stopwatch(step.world.device)
    phases = {**_PHASES, "backward": "losses backward" if step.objective.teacher is None else "teacher backward"}
    step.mark = lambda phase: clock.point(phases[phase])
    step.masks._draw = _within(clock, "masks", step.masks._draw)  # type: ignore[method-assign]
    step.update_momentum = _within(clock, "EMA", step.update_momentum)  # type: ignore[method-assign]
    for name in ("snapshot", "restore"):
        setattr(step.momentum, name, _within(clock, "EMA", getattr(step.momentum, name)))
    if (teacher := step.objective.teacher) is not None:
        teacher.features = _within(clock, "teacher on the image", teacher.features)  # type: ignore[method-assign]
        teacher.feature_loss = _within(clock, "teacher on the pseudo image", teacher.feature_loss)  # type: ignore[method-assign]
    network = step.engine.module
    assert isinstance(network, MCF)
    _watch_network(clock, network)
    return clock


def _watch_network(clock: Stopwatch, network: MCF) -> None:
    def begins(part: str) -> Callable[..., None]:
        return lambda *_: clock.point(part)

    def ends(part: str, then: str) -> Callable[..., None]:
        """A part's forward ends, and its backward begins when its output's gradient is there."""

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(begins(f"{part} backward"))
            clock.point(then)

        return hook

    network.encoder.register_forward_pre_hook(begins("encoder"))
    network.encoder.register_forward_hook(ends("encoder", "decoder"))
    network.decoder.register_forward_hook(ends("decoder", "heads"))
    network.predictor.register_forward_hook(ends("heads", "losses"))


def _within(clock: Stopwatch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with clock.within(part):
            return function(*arguments, **named)

    return timed


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part over steps."""
    return {part: statistics.median(seconds.get(part, 0.0) for seconds in steps) for part in steps[0]}


def rates(seconds: dict[str, float], flops: Flops, images: int) -> dict[str, float]:
    """FLOP/s of what is counted: {"encoder": …, …}, forward and backward together."""
    found = {}
    for name, parts in COUNTED.items():
        took = sum(seconds.get(part, 0.0) for part in parts)
        if took and getattr(flops, name):
            found[name] = images * getattr(flops, name) / took
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products on this machine, measured: the best of some; what a step's rate is held against."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, begin = 0.0, time.perf_counter()
    while not best or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def table(seconds: dict[str, float], rated: dict[str, float], peak: float) -> str:
    """The parts for a person: seconds, share of the step, and how fast the matrix work of each group of parts is."""
    total = sum(seconds.values())
    lines = [f"{'part':30}{'ms':>10}{'share':>8}"]
    lines += [f"{part:30}{1000 * s:10.1f}{s / total:8.1%}" for part, s in seconds.items()]
    lines.append(f"{'whole step':30}{1000 * total:10.1f}")
    lines.append(f"{'forward and backward':30}{'GFLOP/s':>10}{'of matmul':>11}")
    lines += [f"{name:30}{rate / 1e9:10.1f}{rate / peak:11.0%}" for name, rate in rated.items()]
    return "\n".join(lines)
