"""Relative errors of a step from its golden numbers, and the table of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mcf.parity.golden import Golden

GRADIENT_FLOOR = 1e-3
# A number that rounding moves by more than this cannot be judged: it does not pass.
MOST_ROUNDING = 1e-3


@dataclass(frozen=True)
class Row:
    """One compared tensor: rank, name in the file, relative error, and what float32 leaves open (0: not asked)."""

    rank: int
    name: str
    error: float
    rounding: float = 0.0

    def over(self, tolerance: float) -> bool:
        """Whether neither the tolerance nor rounding explains the error; rounding explains up to MOST_ROUNDING."""
        return self.error > max(tolerance, min(self.rounding, MOST_ROUNDING))


def compare(ours: dict[str, Tensor], golden: Golden, rank: int) -> list[Row]:
    """Relative errors of everything that the golden file holds and we compute: max |ours − golden| / max |golden|.

    A gradient that is zero but for rounding (weights before a BatchNorm over two samples, say) has no relative error
    to speak of: the divisor is at least GRADIENT_FLOOR of the largest gradient of all, so that what passes is below a
    sixth of float32's resolution of that.
    """
    gradients = golden.under("grad.").values()
    largest = max((float(g.abs().max()) for g in gradients), default=0.0)
    rows = []
    for name, tensor in ours.items():
        if name in golden.tensors:
            floor = GRADIENT_FLOOR * largest if name.startswith("grad.") else 0.0
            rows.append(Row(rank, name, relative_error(tensor, golden.tensors[name], floor)))
    return rows


def relative_error(ours: Tensor, golden: Tensor, floor: float = 0.0) -> float:
    """max |ours − golden| / max(max |golden|, floor); infinite for another shape or where one of them is not finite."""
    if ours.shape != golden.shape:
        return math.inf
    ours, golden = ours.double(), golden.double()
    difference = float((ours - golden).abs().max())
    if not math.isfinite(difference):
        return math.inf
    scale = max(float(golden.abs().max()), floor)
    return difference / scale if scale else math.inf if difference else 0.0


def table(rows: list[Row], tolerance: float) -> str:
    """The rows as text, what is over the tolerance marked, and the worst of all in the last line."""
    width = max(len(row.name) for row in rows)
    asked = any(row.rounding for row in rows)
    lines = [f"rank  {'tensor':{width}}  relative error" + ("  left open by float32" if asked else "")]
    for row in rows:
        mark = "OVER" if row.over(tolerance) else "rounding" if row.error > tolerance else ""
        open_by = f"         {row.rounding:.1e}" if asked else ""
        lines.append(f"{row.rank:4}  {row.name:{width}}  {row.error:.1e}{open_by}  {mark}".rstrip())
    worst = max(rows, key=lambda row: row.error)
    over = sum(row.over(tolerance) for row in rows)
    rounded = sum(row.error > tolerance for row in rows) - over
    verdict = f"{len(rows) - over - rounded} within the tolerance of {tolerance:g}"
    if rounded:
        verdict += f", {rounded} within what float32 leaves open on this processor"
    lines.append(f"{len(rows)} tensors, worst {worst.error:.1e} ({worst.name}): {verdict}, {over} over")
    return "\n".join(lines)
