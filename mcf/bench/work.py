"""What the steps of two programs have done, held against each other: equal losses say nothing of what comes after them.

    ‖gradient‖ of every trained parameter at the first step
    how far the first numbers of every parameter, and of its moving average, have moved in all steps

A few numbers a parameter, by the names of the released checkpoint, so that a process can tell another of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Numbers of a parameter that are looked at again.
FIRST = 64
AVERAGES = "target_encoder."

# Largest relative differences, by norm, of what two programs have done; one that is left out differs by 1. Of ViT-B in
# float32, gradients differ by 1e-7, in bfloat16 by some 1e-3. AdamW makes steps of equal length of gradients of any, so that
# numbers whose gradient is all rounding move apart, in small networks by 1e-2. Averages move by so little in a few steps
# that its rounding, which comes in another order, is 5e-2 of it.
TOLERANCE = {
    "fp32": {"gradients": 1e-4, "steps": 0.1, "averages": 0.3},
    "bf16": {"gradients": 3e-2, "steps": 0.2, "averages": 0.3},
}


@dataclass
class Done:
    """Norms by name. gradients: of the first step. moved: of the first numbers of each parameter and average since."""

    gradients: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)


class Work:
    """Looks on while a program takes steps. parameters: trained ones and averages, by the released names."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = dict(parameters)
        self._begun = {name: _some(parameter) for name, parameter in parameters.items()}
        self._gradients: dict[str, float] = {}

    def note_gradients(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """The gradients of the first step are there."""
        norms = {name: p.grad.float().norm() for name, p in parameters if p.grad is not None}
        self._gradients = {name: float(norm) for name, norm in norms.items()}

    def done(self) -> Done:
        """What has been done since."""
        moved = {name: float((_some(p) - self._begun[name]).norm()) for name, p in self._parameters.items()}
        return Done(self._gradients, moved)


def _some(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:FIRST].to("cpu", torch.float64, copy=True)


def unlike(ours: Done, theirs: Done, precision: str, steps: int = 2) -> str:
    """How the work of two programs in so many steps differs beyond TOLERANCE; empty if it does not."""
    averages = {name for name in theirs.moved if name.startswith(AVERAGES)}
    for what, one, other in (
        ("gradients", ours.gradients, theirs.gradients),
        ("steps", _without(ours.moved, averages), _without(theirs.moved, averages)),
        ("averages", {n: ours.moved.get(n, 0.0) for n in averages}, {n: theirs.moved[n] for n in averages}),
    ):
        if what == "averages" and steps < 2:
            continue  # the first step averages what is still equal
        if odd := sorted(one.keys() ^ other.keys()):
            return f"{what} are of other parameters ({odd[0]} and {len(odd) - 1} more)"
        a, b = (np.array([norms[name] for name in sorted(other)]) for norms in (one, other))
        length = float(np.linalg.norm(b))
        difference = float(np.linalg.norm(a - b)) / length if length else float(np.any(a))
        if not difference <= TOLERANCE[precision][what]:
            return f"{what} differ by {difference:.1e} of their norm"
    return ""


def _without(norms: Mapping[str, float], names: set[str]) -> dict[str, float]:
    return {name: norm for name, norm in norms.items() if name not in names}
