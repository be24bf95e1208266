"""A configuration small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mcf.downstream.config import FinetuneConfig


@pytest.fixture
def config() -> Callable[..., FinetuneConfig]:
    """Makes a configuration of small squares and heads; sections are given as plain values."""

    def make(**changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {
            "task": "alignment", "dataset": "csv", "data": "nowhere", "weights": "nowhere", "batch": 4, "micro_batch": 4,
            "warp_size": 48, "input_size": 32, "head": {"channels": 8}, "heatmap": {"size": 16, "radius": 3.0},
            "track": {"mlflow": "off"}, "ema": 0.9,
        }  # fmt: skip
        return FinetuneConfig.model_validate({**values, **changes})

    return make
