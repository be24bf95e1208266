"""The gate before every timing: outputs and gradients of an implementation against the reference in float64.

Both get the same arguments, rounded to the type that is measured, and the same gradients from above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcf.kernels.bench.registry import Case, Function

# Relative to the norm of the truth. bfloat16 keeps 8 bits, and one rounding of random values costs 2⁻⁹/√3 ≈ 1.1e-3 of
# their norm: a result may be rounded on its way in, in a product and on its way out. float32 keeps 24 bits, and sums of
# up to 1,000 terms lose a few more.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 2e-6, torch.int64: 0.0}
WORST = 2
"""How much further than that a single value may be off, relative to the largest value of the truth."""
SLACK = 4
"""How much further a baseline may be off: its expression rounds in places where the kernel does not."""


@dataclass(frozen=True)
class Verdict:
    """How far an implementation is off: its largest relative error, and why it does not pass ("" where it does)."""

    error: float
    why: str


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of an operation as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def leaves(case: Case, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, those that get a gradient as leaves of their own."""
    return tuple(x.detach().requires_grad_() if place in case.learn else x for place, x in enumerate(arguments))


def upstream(case: Case, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients from above for outputs of an operation, the same ones (but for rounding) for each implementation."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(
        torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
        if out.dim()
        else torch.full_like(out, case.weight)
        for out in outputs
    )


def check(case: Case, function: Function, device: torch.device, slack: float = 1.0) -> Verdict:
    """Whether a function computes what the reference of a case does.

    Args:
        case: says the arguments, the truth, and what gets a gradient.
        function: what is to be checked.
        device: where.
        slack: factor on TOLERANCE.
    """
    arguments = leaves(case, case.make(torch.Generator(device).manual_seed(0)))
    got: Sequence[Tensor] = tensors(function(*arguments))
    wide = leaves(case, tuple(x.double() if _floating(x) else x for x in arguments))
    wanted: Sequence[Tensor] = tensors(case.truth(*wide))
    if len(got) != len(wanted):
        return Verdict(float("inf"), f"{len(got)} outputs instead of {len(wanted)}")
    for i, (a, b) in enumerate(zip(got, wanted)):
        if a.shape != b.shape:
            return Verdict(float("inf"), f"output {i} has shape {list(a.shape)} instead of {list(b.shape)}")
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, wanted))]
    if case.learn:
        learnt = [i for i, x in enumerate(wanted) if x.requires_grad]
        for i in learnt:
            if not got[i].requires_grad:
                return Verdict(float("inf"), f"output {i} passes no gradient on")
        got, wanted = [got[i] for i in learnt], [wanted[i] for i in learnt]
        above = upstream(case, got)
        ours = torch.autograd.grad(got, [arguments[i] for i in case.learn], above)
        theirs = torch.autograd.grad(
            wanted, [wide[i] for i in case.learn], [x.to(b.dtype) for x, b in zip(above, wanted)]
        )
        pairs += [(f"gradient of argument {i}", a, b) for i, a, b in zip(case.learn, ours, theirs)]
    tolerance = TOLERANCE[case.dtype] * slack
    worst = 0.0
    for name, a, b in pairs:
        error, single = errors(a.detach(), b.detach())
        # Written so that a NaN does not pass.
        if not (error <= tolerance and single <= WORST * tolerance):
            return Verdict(
                error, f"{name}: relative error {error:.1e}, single value {single:.1e}, at most {tolerance:.1e}"
            )
        worst = max(worst, error)
    return Verdict(worst, "")


def errors(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative error by norm, and the largest single one relative to the largest value; of ids, the share that differ."""
    if not wanted.is_floating_point():
        share = float((got != wanted).double().mean())
        return share, share
    off, wanted = (got.double() - wanted.double()).flatten(), wanted.double().flatten()
    tiny = torch.finfo(torch.float64).tiny
    return (
        float(off.norm() / wanted.norm().clamp_min(tiny)),
        float(off.abs().max() / wanted.abs().max().clamp_min(tiny)),
    )


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
