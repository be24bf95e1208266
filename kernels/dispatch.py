"""Which implementation computes an operation, said once in the log; and the checks that all operations share.

`auto` is Triton for tensors on a CUDA device, in types that the kernels compute in, and the reference otherwise: on a
CPU always, also where Triton's interpreter is on. `triton` and `reference` insist. Everything here can be traced by
torch.compile: the choice is a constant of the graph.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mcf.kernels.triton_or_none import HAS_TRITON, INTERPRETED

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "triton", "reference")
FLOATS = (torch.float32, torch.bfloat16)
"""What kernels compute in. float64 and float16 are the reference's."""


def choose(op: str, implementation: str, *tensors: Tensor, unless: str = "") -> str:
    """Which implementation computes an operation on these tensors.

    Args:
        op: its name, for the log and for errors.
        implementation: one of IMPLEMENTATIONS.
        tensors: its inputs, all on one device (`expect_device`).
        unless: why the kernel does not compute this call ("" where it does): a constant text, without sizes in it.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: an unknown name; or "triton", which cannot compute this here.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            dtype = tensor.dtype
    return _chosen(op, implementation, device, dtype, unless)


def unavailable(device: torch.device) -> str:
    """Why Triton cannot compute on a device; "" where it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"Triton computes on CUDA devices only, this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, this device has {major}.{minor}"
    return _no_launcher()


@cache
def _no_launcher() -> str:
    """What Triton lacks to build what launches a kernel, with which it begins; "" if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels, and there is neither gcc nor clang nor CC=…"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"Triton needs Python's headers to launch kernels, and {header} is not there"


@torch.compiler.assume_constant_result
def _chosen(op: str, implementation: str, device: torch.device, dtype: torch.dtype, unless: str) -> str:
    # torch.compile calls this while it traces, so that a compiled operation is in the log too. The cache stands behind
    # it, since tracing looks through one.
    return _resolve(op, implementation, device, dtype, unless)


@cache
def _resolve(op: str, implementation: str, device: torch.device, dtype: torch.dtype, unless: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    name = str(dtype).removeprefix("torch.")
    wrong_type = dtype.is_floating_point and dtype not in FLOATS
    why_not = unavailable(device) or (f"the kernel does not compute in {name}" if wrong_type else unless)
    if implementation == "triton" and why_not:
        raise ValueError(f"{op}: implementation='triton': {why_not}; use 'auto' or 'reference'")
    if implementation == "auto" and not why_not and device.type != "cuda":
        why_not = "Triton's interpreter is only for those who ask for it"
    chosen = "reference" if implementation == "reference" or why_not else "triton"
    _say(op, chosen, device.type, "as asked" if implementation != "auto" else why_not or "the fast one")
    return chosen


@cache
def _say(op: str, chosen: str, device: str, why: str) -> None:
    log.info("%s on %s: %s (%s)", op, device, chosen, why)


def expect_shape(op: str, name: str, tensor: Tensor, holds: bool, wanted: str) -> None:
    """ValueError, with the shape that a tensor has and the one that is wanted, unless `holds`."""
    if not holds:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {wanted}")


def expect_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """TypeError unless a tensor is of one of the types; none named: unless it is floating point."""
    if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "floating point"
        raise TypeError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}")


def expect_device(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors (None: an input left out) are on the first one's device."""
    there = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    first, device = there[0]
    for name, other in there[1:]:
        if other != device:
            raise ValueError(f"{op}: {name} is on {other} and {first} on {device}; move one to the other's device")
