"""The token-normalised feature loss as a tap: it reads the residual stream, and adds its gradient where it sits.

With a, b the features and the target, every column c of an image (its C channels over T = 1+L tokens; for the axis
"channels", its T tokens over C channels) is divided by max(‖a_c‖, ε), and the loss is the mean of (â − b̂)². With
n = B·T·C and k = 2/n,

    d loss / d a_c = k/‖a_c‖ · ((â_c·b̂_c) â_c − b̂_c)      and  k/ε · (â_c − b̂_c)  where ‖a_c‖ < ε,

since there the divisor is a constant. So three numbers a column are all that the backward pass has to know beside a
and b: 1/‖a_c‖, 1/‖b_c‖ and the factor of â_c. The difference itself is squared, not 2 − 2·cos: that loses all digits of
features which are nearly alike.

    forward    one program = a few whole columns of an image:  a, b ──► its part of the loss, three numbers a column
    backward   one program = a tile of an image:               g, a, b, three numbers ──► g + d loss/d a

Both axes are one kernel: there are `outer` times `inner` columns of `length` values, and the axis says which stride
belongs to which. Floor: forward reads a and b, backward reads g, a, b and writes once: 2 and 4 times B·T·C values, with
nothing kept in between but a and b, which are there anyway.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from mcf.kernels import reference
from mcf.kernels.dispatch import choose, expect_device, expect_dtype, expect_shape
from mcf.kernels.triton_or_none import tl, triton
from mcf.kernels.tuning import Variant, chip_of, config, type_of

AXES = ("tokens", "channels")
LONGEST = {"tokens": 512, "channels": 2048}
"""The longest column that a tile holds whole. A longer one is read twice, in pieces: a tile of whole columns would be so
narrow that it leaves most of every memory transaction unused."""
PIECE = 256


@triton.jit
def _tile(i_program, first, length, inner, TOKENS: tl.constexpr, LENGTH: tl.constexpr, INNER: tl.constexpr):
    """Of the tile from value `first` of INNER columns on: offsets (64 bits), which are there, and the columns' numbers."""
    blocks = tl.cdiv(inner, INNER)
    i_outer = (i_program // blocks).to(tl.int64)
    i_inner = (i_program % blocks) * INNER
    o_length, o_inner = first + tl.arange(0, LENGTH), i_inner + tl.arange(0, INNER)
    mask = (o_length < length)[:, None] & (o_inner < inner)[None, :]
    if TOKENS:
        # The start of a tile in 64 bits, what is inside it in 32: one image is smaller than 2³¹.
        offsets = i_outer * length * inner + (o_length[:, None] * inner + o_inner[None, :])
    else:
        offsets = (i_outer * inner + o_inner)[None, :] * length + o_length[:, None]
    return offsets, mask, i_outer * inner + o_inner, o_inner < inner


@triton.jit
def _forward(
    p_features,
    p_target,
    p_columns,
    p_parts,
    columns,
    length,
    inner,
    eps,
    share,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
):
    i_program = tl.program_id(0)
    offsets, mask, o_columns, m_columns = _tile(i_program, 0, length, inner, TOKENS, LENGTH, INNER)
    a = tl.load(p_features + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_target + offsets, mask=mask, other=0.0).to(tl.float32)
    squares_a, squares_b, products = tl.sum(a * a, 0), tl.sum(b * b, 0), tl.sum(a * b, 0)
    if not WHOLE:
        for first in range(LENGTH, length, LENGTH):
            offsets, mask, _, _ = _tile(i_program, first, length, inner, TOKENS, LENGTH, INNER)
            a = tl.load(p_features + offsets, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(p_target + offsets, mask=mask, other=0.0).to(tl.float32)
            squares_a += tl.sum(a * a, 0)
            squares_b += tl.sum(b * b, 0)
            products += tl.sum(a * b, 0)

    norm_a, norm_b = tl.sqrt(squares_a), tl.sqrt(squares_b)
    scale_a, scale_b = 1 / tl.maximum(norm_a, eps), 1 / tl.maximum(norm_b, eps)
    factor = tl.where(norm_a < eps, 1.0, products * scale_a * scale_b)
    p_column = p_columns + o_columns
    tl.store(p_column, scale_a, mask=m_columns)
    tl.store(p_column + columns, scale_b, mask=m_columns)
    tl.store(p_column + 2 * columns, factor, mask=m_columns)

    # The last tile is still at hand; those before it, of columns that are longer than a tile, are read again.
    difference = a * scale_a[None, :] - b * scale_b[None, :]
    sums = tl.sum(difference * difference, 0)
    if not WHOLE:
        for first in range(0, (tl.cdiv(length, LENGTH) - 1) * LENGTH, LENGTH):
            offsets, mask, _, _ = _tile(i_program, first, length, inner, TOKENS, LENGTH, INNER)
            a = tl.load(p_features + offsets, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(p_target + offsets, mask=mask, other=0.0).to(tl.float32)
            difference = a * scale_a[None, :] - b * scale_b[None, :]
            sums += tl.sum(difference * difference, 0)
    # What pads a tile has a norm of zero, which an eps of zero does not bound: no number, where there is no column.
    tl.store(p_parts + i_program, tl.sum(tl.where(m_columns, sums, 0.0), 0) * share)


@triton.jit
def _backward(
    p_grad_loss,
    p_grad,
    p_features,
    p_target,
    p_columns,
    p_out,
    columns,
    length,
    inner,
    share,
    TAP: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
):
    i_program = tl.program_id(0)
    pieces = tl.cdiv(length, LENGTH)
    first = (i_program % pieces) * LENGTH
    offsets, mask, o_columns, m_columns = _tile(i_program // pieces, first, length, inner, TOKENS, LENGTH, INNER)
    a = tl.load(p_features + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(p_target + offsets, mask=mask, other=0.0).to(tl.float32)
    p_column = p_columns + o_columns
    scale_a = tl.load(p_column, mask=m_columns, other=0.0)
    scale_b = tl.load(p_column + columns, mask=m_columns, other=0.0)
    factor = tl.load(p_column + 2 * columns, mask=m_columns, other=0.0)

    weight = tl.load(p_grad_loss).to(tl.float32) * (2 * share) * scale_a
    grad = weight[None, :] * ((factor * scale_a)[None, :] * a - scale_b[None, :] * b)
    if TAP:
        grad += tl.load(p_grad + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + offsets, grad.to(p_out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------- launching


def _sizes(features: Tensor, axis: str) -> tuple[int, int, int]:
    """outer, length, inner: how many columns, and how long."""
    batch, tokens, channels = features.shape
    return (batch, tokens, channels) if axis == "tokens" else (1, channels, batch * tokens)


def _cut(length: int, axis: str, chip: str) -> tuple[dict[str, Any], int, int]:
    """Constexprs of the forward kernel for columns of a length, warps and stages."""
    row = config("feature_loss/forward", axis, chip)
    whole = length <= LONGEST[axis]
    size = max(PIECE, triton.next_power_of_2(length)) if whole else PIECE
    constexprs = {"TOKENS": axis == "tokens", "WHOLE": whole, "LENGTH": size, "INNER": row.blocks["TILE"] // size}
    return constexprs, row.num_warps, row.num_stages


@torch.library.custom_op("mcf::feature_loss", mutates_args=())
def _feature_loss(features: Tensor, target: Tensor, axis: str, eps: float) -> tuple[Tensor, Tensor]:
    """The loss, and of every column 1/‖a‖, 1/‖b‖ and the factor of â in its gradient: float32 [3, columns]."""
    features, target = features.contiguous(), target.contiguous()
    outer, length, inner = _sizes(features, axis)
    constexprs, warps, stages = _cut(length, axis, chip_of(features.device))
    programs = outer * triton.cdiv(inner, constexprs["INNER"])
    columns = features.new_empty(3, outer * inner, dtype=torch.float32)
    parts = features.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(features):
        _forward[(programs,)](
            features, target, columns, parts, outer * inner, length, inner, eps, 1 / features.numel(),
            **constexprs, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return parts.sum(), columns


@_feature_loss.register_fake
def _(features: Tensor, target: Tensor, axis: str, eps: float) -> tuple[Tensor, Tensor]:
    outer, _, inner = _sizes(features, axis)
    return features.new_empty((), dtype=torch.float32), features.new_empty(3, outer * inner, dtype=torch.float32)


@torch.library.custom_op("mcf::feature_loss_backward", mutates_args=())
def _feature_loss_backward(
    grad_loss: Tensor, grad: Tensor | None, features: Tensor, target: Tensor, columns: Tensor, axis: str
) -> Tensor:
    """grad (None: zero) + grad_loss · the loss's gradient, in the features' type."""
    features, target = features.contiguous(), target.contiguous()
    outer, length, inner = _sizes(features, axis)
    row = config("feature_loss/backward", axis, chip_of(features.device))
    pieces, blocks = triton.cdiv(length, row.blocks["LENGTH"]), triton.cdiv(inner, row.blocks["INNER"])
    out = torch.empty_like(features)
    with torch.cuda.device_of(features):
        _backward[(outer * blocks * pieces,)](
            grad_loss, out if grad is None else grad.contiguous(), features, target, columns, out,
            outer * inner, length, inner, 1 / features.numel(), TAP=grad is not None, TOKENS=axis == "tokens",
            **row.blocks, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return out


@_feature_loss_backward.register_fake
def _(grad_loss: Tensor, grad: Tensor | None, features: Tensor, target: Tensor, columns: Tensor, axis: str) -> Tensor:
    return features.new_empty(features.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, target, ctx.axis, _ = inputs
    ctx.save_for_backward(features, target, output[1])


def _differentiate(ctx: Any, grad_loss: Tensor, grad_columns: Tensor) -> tuple[Tensor, None, None, None]:
    return _feature_loss_backward(grad_loss, None, *ctx.saved_tensors, ctx.axis), None, None, None


_feature_loss.register_autograd(_differentiate, setup_context=_keep)


class _Tap(torch.autograd.Function):
    """Features through, loss beside them. Not an operator of its own: those may not return what they were given."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, target: Tensor, axis: str, eps: float) -> tuple[Tensor, Tensor]:
        loss, columns = _feature_loss(features, target, axis, eps)
        ctx.save_for_backward(features, target, columns)
        ctx.axis = axis
        # Nothing follows the last tap of a stream, and a gradient of zeros would be read for nothing.
        ctx.set_materialize_grads(False)
        return features.view_as(features), loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_loss: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_loss is None:
            return grad, None, None, None
        features, target, columns = ctx.saved_tensors
        return _feature_loss_backward(grad_loss, grad, features, target, columns, ctx.axis), None, None, None


# ---------------------------------------------------------------------------------------------------------- functions


def feature_tap(
    features: Tensor, target: Tensor, axis: str = "tokens", eps: float = 1e-12, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The feature loss where the features pass: they go on unchanged, and their gradient takes the loss's on.

        x, loss = feature_tap(x, target)     # and go on with this x

    Args:
        features, target, axis, eps: as of `reference.feature_loss`.
        implementation: "auto", "triton" or "reference".

    Returns:
        features, for whatever comes after; the loss, a scalar, float32 at least.

    Raises:
        ValueError, TypeError: shapes, types or devices that do not fit, an unknown axis, nothing in a tensor.
    """
    if _choose("feature_tap", features, target, axis, implementation) == "reference":
        return reference.feature_tap(features, target, axis, eps)
    return _Tap.apply(features, target.detach(), axis, eps)


def feature_loss(
    features: Tensor, target: Tensor, axis: str = "tokens", eps: float = 1e-12, *, implementation: str = "auto"
) -> Tensor:
    """Mean-square difference of L2-normalised features: `reference.feature_loss`, by whichever implementation."""
    if _choose("feature_loss", features, target, axis, implementation) == "reference":
        return reference.feature_loss(features, target, axis, eps)
    return _feature_loss(features, target.detach(), axis, eps)[0]


def _choose(op: str, features: Tensor, target: Tensor, axis: str, implementation: str) -> str:
    if axis not in AXES:
        raise ValueError(f"{op}: axis={axis!r} is none of {', '.join(AXES)}")
    expect_dtype(op, "features", features)
    expect_dtype(op, "target", target)
    expect_shape(op, "features", features, features.dim() == 3 and features.numel() > 0, "[B, 1+L, C], none of them 0")
    expect_shape(op, "target", target, target.shape == features.shape, f"the features': {list(features.shape)}")
    expect_device(op, features=features, target=target)
    return choose(op, implementation, features, target)


def variants(chip: str) -> list[Variant]:
    """What the launchers choose on a chip: teachers of ViT-S to ViT-H on images of 224 pixels, and longer columns."""
    found: dict[str, Variant] = {}
    shapes = [("tokens", 197), ("tokens", 257), ("tokens", 1025), ("channels", 768), ("channels", 1280)]
    for dtype, (axis, length) in product((torch.bfloat16, torch.float32), shapes):
        kind = type_of(dtype)
        constexprs, warps, stages = _cut(length, axis, chip)
        numbers = dict.fromkeys(("columns", "length", "inner"), "i32")
        # Widths are multiples of 16, numbers of tokens are not.
        divisible = ("columns", "inner") if axis == "tokens" else ("length",)
        name = f"feature_loss/forward {kind} {axis} {constexprs['LENGTH']}" + (" whole" if constexprs["WHOLE"] else "")
        signature = {
            **dict.fromkeys(("p_features", "p_target"), f"*{kind}"), "p_columns": "*fp32", "p_parts": "*fp32", **numbers,
            "eps": "fp32", "share": "fp32", **dict.fromkeys(constexprs, "constexpr"),
        }  # fmt: skip
        found[name] = Variant(name, _forward, signature, constexprs, warps, stages, divisible=divisible)

        row = config("feature_loss/backward", axis, chip)
        for tap in (True, False):
            name = f"feature_loss/backward {kind} {axis}" + (" tap" if tap else "")
            constexprs = {"TAP": tap, "TOKENS": axis == "tokens", **row.blocks}
            signature = {
                "p_grad_loss": "*fp32", **dict.fromkeys(("p_grad", "p_features", "p_target"), f"*{kind}"),
                "p_columns": "*fp32", "p_out": f"*{kind}", **numbers, "share": "fp32",
                **dict.fromkeys(constexprs, "constexpr"),
            }  # fmt: skip
            found[name] = Variant(
                name, _backward, signature, constexprs, row.num_warps, row.num_stages, divisible=divisible
            )
    return list(found.values())
