"""One function for attention, and one place that knows what computes it.

`xformers` is memory-efficient attention on a GPU, `sdpa` is PyTorch's scaled_dot_product_attention (what the CPU
uses), `math` is the formula itself. `auto` takes the first of the list that works on the device at hand. Which one
is in use is logged once.
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
    chosen = resolve(implementation, q.device.type)
    if chosen == "xformers":
        return _xformers()(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@cache
def resolve(implementation: str, device: str) -> str:
    """Which implementation computes attention on a kind of device ("cpu", "cuda"): xformers, sdpa or math."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation}: unknown; one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xformers" and device != "cuda":
        raise UserError(
            f"attention=xformers: xformers computes on NVIDIA GPUs only, this is {device}; use attention=auto"
        )
    chosen, why = implementation, "as the recipe says"
    if implementation == "auto":
        chosen, why = _first_that_works(device)
    elif implementation == "xformers":
        _xformers()
    log.info("attention on %s: %s (%s)", device, chosen, why)
    return chosen


def _first_that_works(device: str) -> tuple[str, str]:
    if device != "cuda":
        return "sdpa", "xformers needs a GPU"
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
