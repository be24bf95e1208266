"""The float32 products of linear layers on a CPU: torch's own, or by oneDNN's 1×1 convolution where that multiplies faster.

    auto on AMD's Zen 3 to 5  y[m, n] = Σₖ x[m, k] w[n, k] + b[n] is a 1×1 convolution over an image of m pixels and k
                              channels. torch hands it to oneDNN, which multiplies faster there than MKL, which has torch's
                              float32 products: twice as fast on Zen 5, by a tenth or two on the others (docs/performance.md).
    auto elsewhere            torch.nn.functional.linear, as for all other types and devices

The gradients of weights stay MKL's but on Zen 5. The sum is the same, in another order.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mcf import processor

# AMD's families.
ZEN_3_AND_4, ZEN_5 = 25, 26

# Multiplications from which a layer gains by it, forward and backward; in smaller ones the calls cost more.
LEAST = 1 << 25

_onednn = False  # whether this process multiplies by it


def use(implementation: Literal["auto", "torch", "onednn"]) -> None:
    """Have this process multiply so from here on (recipe: speed.linear); until then it is torch's own.

    On a GPU float32 is float32 then, and not TF32, which torch takes for convolutions by default, and for products where
    the environment says so.
    """
    global _onednn
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    _onednn = (best() if implementation == "auto" else implementation) == "onednn"


def best() -> Literal["torch", "onednn"]:
    """What `auto` is on this machine's processors."""
    here = processor.here()
    zen_3_or_4 = here.maker == "amd" and here.family == ZEN_3_AND_4
    return "onednn" if (zen_3_or_4 or _is_zen_5()) and torch.backends.mkldnn.is_available() else "torch"


def _is_zen_5() -> bool:
    here = processor.here()
    return here.maker == "amd" and here.family >= ZEN_5 and here.products.startswith("avx512")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·wᵀ + b, as `torch.nn.functional.linear`.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    if not _onednn or not _large_float32_on_cpu(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], -1)


def _large_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # inductor has products of its own, and what is exported stays a plain layer
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and x.numel() * weight.shape[0] >= LEAST


class _Product(torch.autograd.Function):
    """x [M, K], weight [N, K], bias [N] → [M, N]. As torch's own layer, a frozen one keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _rows(F.conv2d(_image(x), weight[:, :, None, None], bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        dx = dw = None
        if to_x:  # the shape and layout of x are asked for here, its numbers are not; and so for the weight
            empty = grad.new_empty(len(grad), weight.shape[1])
            dx = _rows(_backward(grad, empty, weight, [True, False, False])[0])
        if to_weight and _weights_too():
            dw = _backward(grad, x, torch.empty_like(weight), [False, True, False])[1][:, :, 0, 0]
        elif to_weight:
            dw = grad.t() @ x
        return dx, dw, grad.sum(0) if to_bias else None


def _weights_too() -> bool:
    """Whether oneDNN is faster than MKL for gradients of weights as well."""
    return _is_zen_5()


def _backward(grad: Tensor, x: Tensor, weight: Tensor, of: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    # Not torch.nn.grad's: the layout of what it makes up for x costs two thirds of the speed.
    one, none = [1, 1], [0, 0]
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight[:, :, None, None], None, one, none, one, False, none, 1, of
    )
    return gradients


def _image(rows: Tensor) -> Tensor:
    """[M, K] as an image [1, K, M, 1], channels last in memory: a view of contiguous rows."""
    return rows.contiguous()[None, :, None].permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """[1, N, M, 1] as [M, N], contiguous."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
