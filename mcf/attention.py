"""One function for attention, and one place that knows what computes it.

    xformers    memory-efficient attention on a GPU
    flash, cudnn, efficient
                PyTorch's scaled_dot_product_attention held to one of its backends; on a CPU there is flash alone
    sdpa        the same, torch chooses
    math        the formula itself

`auto` takes what was measured to be the fastest for the chip, type and shape at hand (`mcf.attention_table`). Where nothing
was measured it is xformers on a GPU (sdpa where xformers does not work), and on a CPU sdpa in float32 and math in bfloat16.
Which one is in use is logged once: for each shape with `auto`, else for each type.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import warnings
from functools import cache
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mcf import attention_table
from mcf.errors import UserError, missing_package

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", *attention_table.NAMES)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GPU_ONLY = ("xformers", "cudnn", "efficient")


def attention(q: Tensor, k: Tensor, v: Tensor, implementation: str = "auto") -> Tensor:
    """softmax(q·kᵀ/√d)·v for each head, without mask or dropout.

    Args:
        q: [B, N, heads, d].
        k, v: [B, M, heads, d].
        implementation: one of IMPLEMENTATIONS.

    Returns:
        [B, N, heads, d].

    Raises:
        UserError: the implementation does not exist here (no GPU, package missing, unknown name), or not for this type
            and width.
    """
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # A named one is the same for any number of tokens, which an exporter may leave open.
    tokens = q.shape[1] if implementation == "auto" else 0
    return compute(resolve(implementation, q.device.type, q.dtype, tokens, q.shape[3], gradient), q, k, v)


def compute(chosen: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by a name that `resolve` has returned."""
    if chosen == "xformers":
        return _xformers()(q, k, v)
    if chosen == "math":
        return _math(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(BACKENDS[chosen]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, as `attention`: [B, N, heads, d]; each product is over all heads of all images at once."""
    batch, tokens, heads, dim = q.shape
    # Copied row by row: left to itself, matmul copies kᵀ, which is slower.
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (q, k, v))
    # The product scales what it writes, where q @ k.mT * scale would be one more pass over the scores.
    scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=dim**-0.5)
    return (scores.softmax(dim=-1) @ v).view(batch, heads, tokens, dim).transpose(1, 2)


@torch.compiler.assume_constant_result
def resolve(
    implementation: str, device: str, dtype: torch.dtype, tokens: int = 0, head_dim: int = 64, gradient: bool = False
) -> str:
    """Which implementation computes attention on a kind of device ("cpu", "cuda"): a name other than auto.

    tokens, head_dim: of self-attention; 0 tokens for any number, of which nothing is recorded.
    gradient: whether a backward pass follows.
    """
    # torch.compile calls this while it traces, so that compiled attention is in the log too. The cache stands behind it,
    # since tracing looks through one.
    return _resolve(implementation, device, dtype, tokens, head_dim, gradient)


@cache
def _resolve(implementation: str, device: str, dtype: torch.dtype, tokens: int, head_dim: int, gradient: bool) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation}: unknown; one of {', '.join(IMPLEMENTATIONS)}")
    if implementation in GPU_ONLY and device != "cuda":
        raise UserError(
            f"attention={implementation}: {implementation} computes on NVIDIA GPUs only, this is {device}; "
            "use attention=auto"
        )
    where = f"{device} in {_name(dtype)}"
    chosen, why = implementation, "as the recipe says"
    if implementation == "auto":
        chosen, why = _recorded(device, dtype, tokens, head_dim, gradient) or usual(device, dtype, head_dim)
        where += f", {tokens} tokens, heads of {head_dim}, {'with' if gradient else 'without'} a gradient"
    elif refused := refusal(implementation, device, dtype, head_dim, gradient):
        raise UserError(refused)
    _say(where, chosen, why)
    return chosen


@cache
def _say(where: str, chosen: str, why: str) -> None:
    log.info("attention on %s: %s (%s)", where, chosen, why)


def _recorded(device: str, dtype: torch.dtype, tokens: int, head_dim: int, gradient: bool) -> tuple[str, str] | None:
    key = attention_table.Key(attention_table.chip_of(device), _name(dtype), tokens, head_dim, gradient)
    row = attention_table.look_up(key)
    # It was measured on such a chip, but with another torch, and maybe with packages that are missing here.
    if row is None or refusal(row.choice, device, dtype, head_dim, gradient):
        return None
    return row.choice, f"the fastest one as recorded for {key.chip}"


def usual(device: str, dtype: torch.dtype, head_dim: int = 64) -> tuple[str, str]:
    """What `auto` is where nothing is recorded, and why."""
    if device != "cuda":
        return ("sdpa" if dtype == torch.float32 else "math"), "the usual one on a CPU"
    if refused := refusal("xformers", device, dtype, head_dim, False):
        return "sdpa", refused
    return "xformers", "the usual one on a GPU"


def refusal(implementation: str, device: str, dtype: torch.dtype, head_dim: int, gradient: bool) -> str:
    """Why an implementation cannot compute this here, found by having it compute a little; "" if it can."""
    if implementation in ("sdpa", "math"):
        return ""
    if implementation in GPU_ONLY and device != "cuda":
        return f"{implementation} computes on NVIDIA GPUs only"
    try:
        if implementation == "xformers":
            _load_cuda_12()
            _xformers()
        # Why a backend does not want it torch says in warnings, one for each of its backends.
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            little = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=gradient)
            compute(implementation, little, little, little)
    except UserError as error:
        return str(error)
    except (NotImplementedError, RuntimeError) as error:
        return (
            f"attention={implementation}: does not work here in {_name(dtype)} with heads of {head_dim}: "
            f"{_first_reason(error)}; use attention=auto"
        )
    return ""


def _first_reason(error: Exception) -> str:
    """What an error says, in a line. xformers names its operators first, and why each will not do below them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((why for above, why in pairwise(lines) if above.endswith("not supported because:")), lines[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _load_cuda_12() -> None:
    """Load CUDA 12's runtime, which xformers' wheel is linked with: beside a torch with CUDA 13 it computes nothing else.

    It is torch's, the system's, or the one of the package that setup.py asks for.
    """
    library = "libcudart.so.12"
    with contextlib.suppress(OSError):
        ctypes.CDLL(library)
        return
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        package = metadata.distribution("nvidia-cuda-runtime-cu12")
        ctypes.CDLL(str(package.locate_file(f"nvidia/cuda_runtime/lib/{library}")))


def _xformers() -> Any:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise missing_package("xformers", "attention=xformers") from None
    return memory_efficient_attention
