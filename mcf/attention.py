"""One function for attention, and one place that knows what computes it.

`xformers` is memory-efficient attention on a GPU, `sdpa` is PyTorch's scaled_dot_product_attention, `math` is the
formula itself. `auto` is xformers on a GPU (sdpa where xformers does not work), and on a CPU sdpa in float32 and math in
bfloat16, where the backward pass of sdpa takes twice as long. Which one is in use is logged once.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcf.errors import UserError, missing_package

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "xformers", "sdpa", "math")


def attention(q: Tensor, k: Tensor, v: Tensor, implementation: str = "auto") -> Tensor:
    """softmax(q·kᵀ/√d)·v for each head, without mask or dropout.

    Args:
        q: [B, N, heads, d].
        k, v: [B, M, heads, d].
        implementation: one of IMPLEMENTATIONS.

    Returns:
        [B, N, heads, d].

    Raises:
        UserError: the implementation does not exist here (no GPU, package missing, unknown name).
    """
    chosen = resolve(implementation, q.device.type, q.dtype)
    if chosen == "xformers":
        return _xformers()(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@torch.compiler.assume_constant_result
def resolve(implementation: str, device: str, dtype: torch.dtype) -> str:
    """Which implementation computes attention on a kind of device ("cpu", "cuda"): xformers, sdpa or math."""
    # torch.compile calls this while it traces, so that compiled attention is in the log too. The cache stands behind it,
    # since tracing looks through one.
    return _resolve(implementation, device, dtype)


@cache
def _resolve(implementation: str, device: str, dtype: torch.dtype) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation}: unknown; one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xformers" and device != "cuda":
        raise UserError(
            f"attention=xformers: xformers computes on NVIDIA GPUs only, this is {device}; use attention=auto"
        )
    chosen, why = implementation, "as the recipe says"
    if implementation == "auto":
        chosen, why = _best(device, dtype)
    elif implementation == "xformers":
        _xformers()
    _say(device, dtype, chosen, why)
    return chosen


@cache
def _say(device: str, dtype: torch.dtype, chosen: str, why: str) -> None:
    log.info("attention on %s in %s: %s (%s)", device, str(dtype).removeprefix("torch."), chosen, why)


def _best(device: str, dtype: torch.dtype) -> tuple[str, str]:
    if device != "cuda":
        return ("sdpa" if dtype == torch.float32 else "math"), "the faster one; xformers needs a GPU"
    try:
        probe = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.bfloat16)
        _xformers()(probe, probe, probe)
    except (UserError, NotImplementedError, RuntimeError) as error:
        return "sdpa", f"xformers does not work here: {str(error).splitlines()[0]}"
    return "xformers", "first choice on a GPU"


def _xformers() -> Any:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise missing_package("xformers", "attention=xformers") from None
    return memory_efficient_attention
