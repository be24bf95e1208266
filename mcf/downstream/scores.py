"""What an evaluation gives, and which epoch is told: the selected one and the best on the test set, each by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """metrics: by name, in percent. errors: one number a face, larger is worse."""

    metrics: dict[str, float]
    errors: NDArray[np.float64]


def is_better(value: float, than: float | None, better: str) -> bool:
    """Whether a value beats another (None: nothing yet); `better` is lower or higher."""
    if than is None:
        return True
    return value < than if better == "lower" else value > than


def choose(history: Sequence[Mapping[str, Any]], headline: str, better: str, validated: bool) -> dict[str, Any]:
    """Both ways of choosing an epoch out of a run's history of {"epoch", "test": metrics, "validation": number or None}.

    Where faces are held out, an epoch without their number is not selected: its weights could not be kept.

    `selected` is what an honest comparison may use: the epoch with the best headline on held-out training faces, or the
    last where none are held out. `best_on_test` is how published numbers were chosen, and is better than the method.
    """
    evaluated = [entry for entry in history if entry.get("test")]
    selected = evaluated[-1]
    if validated:
        kept = [entry for entry in evaluated if entry["validation"] is not None]
        for entry in kept:
            if entry is kept[0] or is_better(entry["validation"], selected["validation"], better):
                selected = entry
    best = evaluated[0]
    for entry in evaluated[1:]:
        if is_better(entry["test"][headline], best["test"][headline], better):
            best = entry
    by = "held-out training faces" if validated else "last epoch"
    return {
        "headline": headline,
        "better": better,
        "selected": {"epoch": selected["epoch"], "by": by, **selected["test"]},
        "best_on_test": {"epoch": best["epoch"], "by": "the test set itself", **best["test"]},
    }
