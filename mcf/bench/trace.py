"""One step under torch's profiler: a trace to look at, and which operations the time of each part goes to."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mcf.bench.blocks import is_kernel
from mcf.bench.parts import MARK
from mcf.errors import UserError

SHOWN = 4  # operations of each part
LEAST = 0.01  # share of the step below which a part is not shown


def record(step: Callable[[], object], path: str) -> dict[str, Any]:
    """Run a watched step (`mcf.bench.parts.watch`) under the profiler, and write the trace.

    Returns:
        "seconds": {part: {operation: seconds}}, of the device where it is a GPU, each operation without those it calls;
        "launches": {part: kernels launched}, 0 without a GPU.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).write_text("")  # torch only prints that it cannot
    except OSError as error:
        raise UserError(f"profile={path}: cannot be written ({error}); give a file in a folder that exists") from error
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
    profiler.export_chrome_trace(path)
    events = profiler.events() or []
    marks = sorted((e.time_range.start, e.name.removeprefix(MARK)) for e in events if e.name.startswith(MARK))
    starts = [start for start, _ in marks]
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    launches: dict[str, int] = defaultdict(int)
    for event in events:
        index = bisect.bisect_right(starts, event.time_range.start) - 1
        # Kernels are told of by the operations that launched them.
        if index < 0 or event.name.startswith(MARK) or str(event.device_type).endswith("CUDA"):
            continue
        part = marks[index][1]
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[part][event.name] += took / 1e6
        launches[part] += sum(is_kernel(kernel.name) for kernel in event.kernels)
    return {"seconds": {part: dict(found) for part, found in seconds.items()}, "launches": dict(launches)}


def table(result: dict[str, Any]) -> str:
    """The summary for a person: each part's largest operations, by seconds."""
    total = sum(sum(found.values()) for found in result["seconds"].values())
    lines = [f"{'part / operation':52}{'ms':>10}{'share':>8}{'launches':>10}"]
    for part, found in sorted(result["seconds"].items(), key=lambda item: -sum(item[1].values())):
        took = sum(found.values())
        if took < LEAST * total:
            continue
        lines.append(f"{part:52}{1000 * took:10.1f}{took / total:8.1%}{result['launches'].get(part, 0):10}")
        largest = sorted(found.items(), key=lambda item: -item[1])[:SHOWN]
        lines += [f"    {name[:47]:48}{1000 * s:10.1f}{s / total:8.1%}" for name, s in largest]
    lines.append(f"{'all':52}{1000 * total:10.1f}{'':8}{sum(result['launches'].values()):10}")
    return "\n".join(lines)
