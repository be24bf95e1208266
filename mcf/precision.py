"""What `train.precision: auto` becomes: bfloat16 where this machine multiplies matrices faster in it.

GPUs that have it do. Processors that have its instructions may not: an AMD EPYC multiplied twice as fast in bfloat16, an
Intel Xeon without AMX at six tenths of float32's rate (docs/performance.md). So it is measured, in a tenth of a second.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

import torch
from torch import Tensor

from mcf.linear import linear

log = logging.getLogger(__name__)

# Tokens × width by width × hidden width, small: the smallest product that threads share well.
SHAPE = (512, 512, 2048)
REPEATS = 5
# What bfloat16 has to gain in products alone: autocast pays for casts, and float32 is the more exact of equals.
LEAST_GAIN = 1.1


def choose(device: torch.device) -> Literal["bf16", "fp32"]:
    """The faster precision for matrix work on a device; said once, with what was measured."""
    if device.type == "cuda":
        chosen: Literal["bf16", "fp32"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        log.info("precision: %s (what %s has)", chosen, torch.cuda.get_device_name(device))
        return chosen
    seconds = product_seconds()
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = "bf16" if gain > LEAST_GAIN else "fp32"
    log.info("precision: %s (a matrix product in bfloat16 is %.2f times as fast as in float32 here)", chosen, gain)
    return chosen


def product_seconds() -> dict[torch.dtype, float]:
    """Seconds of a matrix product on this machine's processors, as linear layers multiply: the best of a few, taken in turn."""
    rows, inner, columns = SHAPE
    a, b = torch.ones(rows, inner), torch.ones(columns, inner)
    pairs: dict[torch.dtype, tuple[Tensor, Tensor]] = {
        dtype: (a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(REPEATS):
        for dtype, (x, weight) in pairs.items():
            start = time.perf_counter()
            linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best
