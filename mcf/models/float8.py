"""Matrix products of frozen weights in float8, forward and with respect to their input: the teacher's (`teacher.products`).

    x ──► amax of each row / 448 ──► x / scale in e4m3 ─┐
    W ──► the same, once, for each row of W ────────────┴─► product ──► · both scales, + bias ──► y in bfloat16
    ∂y ─► rows again ─► product with W in e4m3, here with a scale for each column ─► ∂x

e4m3 has 3 bits of mantissa, is finite up to 448, and knows NaN and no infinity (Micikevicius et al. 2022, table 1). What
is summed over shares one scale in either product, so that scales can be taken out of the sum: that is why W is kept
twice. Both copies together are as large as one in bfloat16. Nothing of x is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mcf.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite number of e4m3."""
MULTIPLE = 16
"""What both widths of a product must be multiples of."""
CAPABILITY = (8, 9)
"""The first compute capability with such products: Ada's, before Hopper's."""


class Float8Linear(nn.Module):
    """A frozen linear layer [..., in] → [..., out] whose products are of e4m3 numbers; sums are float32, outputs bfloat16.

    The weight is rounded once, the input at every call, each of its rows (tokens) by a scale of its own; so is the
    gradient on the way back. Rows of zeros give the bias. A row with NaN or an infinity in it gives NaN. There is no
    gradient of weight or bias. Autocast does not matter, nor what type a whole network is cast to: its tensors keep theirs.

    Args:
        linear: the layer, whose weight [out, in] is best given in float32: it is then rounded once.

    Raises:
        UserError: a width that is no multiple of 16.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_back: Tensor
    weight_back_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            raise UserError(
                f"teacher.products=float8: a layer from {self.in_features} to {self.out_features} channels; such products need "
                f"multiples of {MULTIPLE}: use teacher.products=bfloat16, or a teacher of such widths"
            )
        weight = linear.weight.detach()
        by_output, scale = quantise(weight)
        by_input, scale_back = quantise(weight.t())
        # [out, in] and [in, out]: both products want the summed axis to be the inner one in memory.
        for name, tensor in {
            "weight": by_output, "weight_scale": scale.t(), "weight_back": by_input, "weight_back_scale": scale_back.t(),
        }.items():  # fmt: skip
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(torch.bfloat16))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        # As bytes: moved with the network, and not cast with it.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] in bfloat16 of x [..., in] in any floating type, in which its gradient comes back."""
        return _Product.apply(x, self.weight, self.weight_scale, self.weight_back, self.weight_back_scale, self.bias)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """Plain operations, and no operator of its own: torch.compile sees through it, and fuses quantising with what is before."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, weight_back: Tensor, scale_back: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight_back, scale_back)
        ctx.dtype = x.dtype
        return _product(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        weight_back, scale_back = ctx.saved_tensors
        return _product(grad, weight_back, scale_back, None).to(ctx.dtype), None, None, None, None, None


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] quantised by rows, times weight [N, K] with its scales [1, N]: [..., N] in bfloat16."""
    rows, row_scale = quantise(x.reshape(-1, x.shape[-1]))
    # On a CPU it is a product of other types within, which autocast would get hold of.
    with torch.autocast(x.device.type, enabled=False):
        # Sums keep float32's bits on a GPU, too: `use_fast_accum` would leave fewer of them.
        y = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=row_scale,
            scale_b=scale,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
    return y.view(*x.shape[:-1], -1)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] as e4m3 [M, K] times a float32 scale [M, 1]: the largest number of a row becomes 448.

    A row of zeros stays one; NaN makes NaN of a row, an infinity of itself.
    """
    amax = x.abs().amax(dim=-1, keepdim=True).float()
    # Not 0, which rows of zeros would be divided by; `clamp` leaves NaN as it is.
    scale = (amax / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # The quotient may be above 448 by a rounding, and what a cast does there is not the same everywhere.
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def unavailable(device: torch.device) -> str | None:
    """Why a device cannot compute such products, or None where it can. They are tried: a GPU is waited for."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and float8 products need "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or newer"
        )
    try:
        ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
        weight, scale = quantise(ones)
        sums = _product(ones, weight, scale.t().contiguous(), None)
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"torch {torch.__version__} has no float8 products on {device}: {str(error).splitlines()[0]}"
    return None if sums.eq(MULTIPLE).all() else f"{device} adds up 16 ones to {sums[0, 0].item():g}"
