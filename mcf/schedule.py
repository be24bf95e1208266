"""Learning rate and momentum as pure functions of the optimiser step: plain numbers in, a number out."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(step: float, *, lr: float, min_lr: float = 0.0, warmup_steps: float, steps: float) -> float:
    """Linear warm-up from 0 to `lr`, then a half-cosine from `lr` to `min_lr` (METHOD section 1, "Optimiser").

    Set before every optimiser step, from the steps taken so far, as the reference does: the very first step has
    rate 0, the last one is a step short of `min_lr`.

    Args:
        step: optimiser steps taken before this one, 0 … steps − 1; beyond `steps` the rate stays `min_lr`.
        lr: peak, at the end of the warm-up.
        min_lr: value at `steps`.
        warmup_steps: length of the warm-up, steps; need not be whole.
        steps: length of the schedule, steps.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    return min_lr + (lr - min_lr) * _half_cosine(step - warmup_steps, steps - warmup_steps)


def momentum(
    step: float, *, value: float, schedule: Literal["constant", "cosine"] = "constant", steps: float = 1
) -> float:
    """m of the momentum encoder's average p ← m·p + (1−m)·p_encoder at an optimiser step.

    `constant` is `value` throughout (the reference). `cosine` rises from `value` to 1 over `steps` by a half-cosine
    (BYOL and MoCo v3: m = 1 − (1 − value)·(1 + cos(π·step/steps))/2).
    """
    if schedule == "constant":
        return value
    return 1.0 - (1.0 - value) * _half_cosine(step, steps)


def _half_cosine(step: float, steps: float) -> float:
    """From 1 at 0 to 0 at `steps`; 0 beyond."""
    if step >= steps:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))
