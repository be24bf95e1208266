"""Learning rate and momentum as pure functions of the optimiser step: numbers in, a number out."""

from __future__ import annotations

import math
from typing import Protocol

from mcf.config import MomentumConfig, OptimizerConfig


class Length(Protocol):
    """What a schedule must know of a run (a `mcf.plan.Plan` does)."""

    @property
    def lr(self) -> float:
        """Learning rate at the end of the warm-up."""

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in optimiser steps; need not be whole."""

    @property
    def steps(self) -> int:
        """Length of the run in optimiser steps."""


def learning_rate(step: float, length: Length, optimizer: OptimizerConfig) -> float:
    """Linear warm-up from 0 to `length.lr`, then a half-cosine to `optimizer.min_lr` (METHOD section 1, "Optimiser").

    Set before every optimiser step from the steps taken so far, 0 … steps − 1, as the reference does: the very first
    step has rate 0, the last one is a step short of `min_lr`. Beyond the end the rate stays `min_lr`.
    """
    if step < length.warmup_steps:
        return length.lr * step / length.warmup_steps
    fall = _half_cosine(step - length.warmup_steps, length.steps - length.warmup_steps)
    return optimizer.min_lr + (length.lr - optimizer.min_lr) * fall


def momentum(step: float, steps: int, config: MomentumConfig) -> float:
    """m of the momentum encoder's average p ← m·p + (1−m)·p_encoder at an optimiser step of a run of `steps`.

    `constant` is `config.value` throughout (the reference). `cosine` rises from it to 1 by a half-cosine, as in BYOL
    and MoCo v3: m = 1 − (1 − value)·(1 + cos(π·step/steps))/2.
    """
    if config.schedule == "constant":
        return config.value
    return 1.0 - (1.0 - config.value) * _half_cosine(step, steps)


def _half_cosine(step: float, steps: float) -> float:
    """From 1 at 0 to 0 at `steps`; 0 beyond."""
    if step >= steps:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))
