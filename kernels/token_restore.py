"""The decoder's input in one pass: visible tokens back in their places, mask tokens between them, positions added.

With r = ids_restore[b, l] the rank of patch l in the shuffled order, and K tokens visible,

    out[b, 0]     = tokens[b, 0] + position[0]                                       the class token
    out[b, 1 + l] = (tokens[b, 1 + r] if r < K else mask_token) + position[1 + l]

so the un-shuffled copy, its concatenation and the sum need not exist. Each row of ids_restore is a permutation, and the
gradient's rows go the same ways back, each to one place:

    d tokens[b, 0] = g[b, 0]      d tokens[b, 1 + r] = g[b, 1 + l]      d mask_token = Σ g[b, 1 + l] over r ≥ K

The last sum has two stages: a program of the backward pass adds up the rows that it reads, in their order, and writes
one partial sum; PyTorch's reduction then adds those. No atomics: the same inputs give the same bits.

A program of the forward pass is one place l in several images, which share its row of the position table. Floor, in
bfloat16 with L = 196, K = 49, D = 512: forward 51 KB read and 202 KB written an image, backward the reverse; 259 MB for
1024 images. In float32 the larger part doubles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcf.kernels import reference
from mcf.kernels.dispatch import FLOATS, choose, expect_device, expect_dtype, expect_shape
from mcf.kernels.triton_or_none import Kernel, tl, triton
from mcf.kernels.tuning import Config, Variant, chip_of, config, type_of

_SIZES = ["batch", "patches", "keep"]


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    p_tokens, p_mask_token, p_position, p_ids, p_out, batch, patches, keep, width, B: tl.constexpr, D: tl.constexpr
):
    i_place = tl.program_id(0)
    o_b = (tl.program_id(1) * B + tl.arange(0, B)).to(tl.int64)
    o_d = tl.program_id(2) * D + tl.arange(0, D)
    m_b, m_d = o_b < batch, o_d < width
    # The row that each image's token of this place comes from: 0 is the class token, from 1 on the visible patches.
    b_row = tl.load(p_ids + o_b * patches + i_place - 1, mask=m_b & (i_place > 0), other=-1) + 1
    m_visible = (m_b & (b_row >= 0) & (b_row <= keep))[:, None] & m_d[None, :]
    b_tokens = tl.load(p_tokens + (o_b * (keep + 1) + b_row)[:, None] * width + o_d[None, :], mask=m_visible, other=0)
    # The mask token is rounded to the tokens' type, as the reference does.
    b_mask = tl.load(p_mask_token + o_d, mask=m_d, other=0).to(b_tokens.dtype)
    b_position = tl.load(p_position + i_place * width + o_d, mask=m_d, other=0).to(tl.float32)
    b_out = tl.where(m_visible, b_tokens, b_mask[None, :]).to(tl.float32) + b_position[None, :]
    p_out += (o_b * (patches + 1) + i_place)[:, None] * width + o_d[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_b[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=_SIZES[1:])
def _backward(
    p_grad, p_ids, p_tokens, p_partial, patches, keep, width,
    ROWS: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A run of STEPS·ROWS places of one image: their gradients to the tokens, and the sum of the dropped ones."""
    runs = tl.cdiv(patches + 1, ROWS * STEPS)
    i_b, i_run = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs
    o_d = tl.program_id(1) * D + tl.arange(0, D)
    m_d = o_d < width
    b_dropped = tl.zeros([ROWS, D], tl.float32)
    for step in range(STEPS):
        o_place = (i_run * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_place = o_place <= patches
        b_row = tl.load(p_ids + i_b * patches + o_place - 1, mask=m_place & (o_place > 0), other=-1) + 1
        p_row = p_grad + (i_b * (patches + 1) + o_place)[:, None] * width + o_d[None, :]
        b_grad = tl.load(p_row, mask=m_place[:, None] & m_d[None, :], other=0)
        m_visible = (m_place & (b_row >= 0) & (b_row <= keep))[:, None]
        p_row = p_tokens + (i_b * (keep + 1) + b_row)[:, None] * width + o_d[None, :]
        tl.store(p_row, b_grad.to(p_tokens.dtype.element_ty), mask=m_visible & m_d[None, :])
        b_dropped += tl.where(m_visible, 0.0, b_grad.to(tl.float32))
    p_partial += tl.program_id(0).to(tl.int64) * width + o_d
    tl.store(p_partial, tl.sum(b_dropped, axis=0), mask=m_d)


@torch.library.custom_op("mcf::token_restore", mutates_args=())
def _token_restore(tokens: Tensor, mask_token: Tensor, position: Tensor, ids_restore: Tensor) -> Tensor:
    tokens, mask_token, position, ids = (x.contiguous() for x in (tokens, mask_token, position, ids_restore))
    (batch, rows, width), patches = tokens.shape, ids.shape[1]
    out = tokens.new_empty(batch, patches + 1, width, dtype=torch.promote_types(tokens.dtype, position.dtype))
    if out.numel():
        cut = config("token_restore/forward", "any", chip_of(tokens.device))
        blocks = _forward_blocks(cut, width)
        grid = (patches + 1, triton.cdiv(batch, blocks["B"]), triton.cdiv(width, blocks["D"]))
        with torch.cuda.device_of(tokens):
            _forward[grid](
                tokens, mask_token, position, ids, out, batch, patches, rows - 1, width,
                num_warps=cut.num_warps, num_stages=cut.num_stages, **blocks,
            )  # fmt: skip
    return out


@_token_restore.register_fake
def _(tokens, mask_token, position, ids_restore):
    dtype = torch.promote_types(tokens.dtype, position.dtype)
    return tokens.new_empty(len(tokens), ids_restore.shape[1] + 1, tokens.shape[2], dtype=dtype)


@torch.library.custom_op("mcf::token_restore_backward", mutates_args=())
def _token_scatter(grad: Tensor, ids_restore: Tensor, keep: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of the tokens, in their type, and of the mask token, float32 [D]."""
    grad, ids = grad.contiguous(), ids_restore.contiguous()
    batch, places, width = grad.shape
    tokens = grad.new_empty(batch, keep + 1, width, dtype=dtype)
    if not grad.numel():
        return tokens, grad.new_zeros(width, dtype=torch.float32)
    cut = config("token_restore/backward", "any", chip_of(grad.device))
    blocks = _backward_blocks(cut, width)
    runs = batch * triton.cdiv(places, blocks["ROWS"] * blocks["STEPS"])
    partial = grad.new_empty(runs, width, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _backward[runs, triton.cdiv(width, blocks["D"])](
            grad, ids, tokens, partial, places - 1, keep, width,
            num_warps=cut.num_warps, num_stages=cut.num_stages, **blocks,
        )  # fmt: skip
    return tokens, partial.sum(0)


@_token_scatter.register_fake
def _(grad, ids_restore, keep, dtype):
    tokens = grad.new_empty(len(grad), keep + 1, grad.shape[2], dtype=dtype)
    return tokens, grad.new_empty(grad.shape[2], dtype=torch.float32)


def _remember(ctx, inputs, output):
    tokens, mask_token, position, ids_restore = inputs
    ctx.save_for_backward(ids_restore)
    ctx.keep, ctx.dtype = tokens.shape[1] - 1, tokens.dtype
    ctx.like = [(x.shape, x.dtype) for x in (mask_token, position)]


def _gradients(ctx, grad):
    (ids_restore,) = ctx.saved_tensors
    tokens, mask_token = _token_scatter(grad, ids_restore, ctx.keep, ctx.dtype)
    (mask_shape, mask_dtype), (position_shape, position_dtype) = ctx.like
    position = None
    if ctx.needs_input_grad[2]:
        # A second pass over the gradient: our tables are fixed, and nobody else pays for it.
        position = grad.sum(0).to(position_dtype).view(position_shape)
    return tokens, mask_token.to(mask_dtype).view(mask_shape), position, None


_token_restore.register_autograd(_gradients, setup_context=_remember)


def token_restore(
    tokens: Tensor, mask_token: Tensor, position: Tensor, ids_restore: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """The decoder's input: visible tokens back in their places, the mask token elsewhere, positions added.

    Args:
        tokens: [B, 1+K, D], class token first, then the visible patches in shuffled order.
        mask_token: D values in any shape.
        position: position embedding of class token and patches, [1, 1+L, D] or [1+L, D].
        ids_restore: int64 [B, L], the place of each patch in the shuffled order: each row a permutation of 0..L−1.
        implementation: auto, triton or reference.

    Returns:
        [B, 1+L, D], in the type that tokens and position promote to: float32 where the table is.

    Raises:
        ValueError, TypeError: inputs of the wrong shape, type or device.
    """
    op = "token_restore"
    expect_device(op, tokens=tokens, mask_token=mask_token, position=position, ids_restore=ids_restore)
    for name, tensor in (("tokens", tokens), ("mask_token", mask_token), ("position", position)):
        expect_dtype(op, name, tensor)
    expect_dtype(op, "ids_restore", ids_restore, torch.int64)
    expect_shape(op, "tokens", tokens, tokens.dim() == 3 and tokens.shape[1] > 1, "[B, 1+K, D] with K ≥ 1")
    batch, rows, width = tokens.shape
    expect_shape(
        op, "ids_restore", ids_restore,
        ids_restore.dim() == 2 and len(ids_restore) == batch and ids_restore.shape[1] >= rows - 1,
        f"[{batch}, L] with L ≥ {rows - 1}",
    )  # fmt: skip
    places = ids_restore.shape[1] + 1
    expect_shape(op, "mask_token", mask_token, mask_token.numel() == width, f"{width} values")
    expect_shape(
        op, "position", position, tuple(position.shape) in ((1, places, width), (places, width)),
        f"[1, {places}, {width}]",
    )  # fmt: skip
    if choose(op, implementation, tokens, mask_token, position) == "reference":
        return reference.token_restore(tokens, mask_token, position, ids_restore)
    return _token_restore(tokens, mask_token, position, ids_restore)


def variants(chip: str) -> list[Variant]:
    """What the launchers choose: decoders of width 256 and 512, tokens and stream in both types; parameters are float32."""
    made = []
    sizes = dict.fromkeys(("patches", "keep", "width"), "i32")
    for width in (256, 512):
        for tokens, position in ((FLOATS[0], FLOATS[0]), (FLOATS[1], FLOATS[0]), (FLOATS[1], FLOATS[1])):
            kind, stream = type_of(tokens), type_of(position)
            name = f"{kind}→{stream} D={width}"
            signature = {
                "p_tokens": f"*{kind}", "p_mask_token": "*fp32", "p_position": f"*{stream}", "p_ids": "*i64",
                "p_out": f"*{stream}", "batch": "i32", **sizes,
            }  # fmt: skip
            cut = config("token_restore/forward", "any", chip)
            made.append(_variant(f"forward {name}", _forward, signature, _forward_blocks(cut, width), cut))
            signature = {
                "p_grad": f"*{stream}", "p_ids": "*i64", "p_tokens": f"*{kind}", "p_partial": "*fp32", **sizes,
            }  # fmt: skip
            cut = config("token_restore/backward", "any", chip)
            made.append(_variant(f"backward {name}", _backward, signature, _backward_blocks(cut, width), cut))
    return made


def _variant(what: str, kernel: Kernel, signature: dict[str, str], blocks: dict[str, int], cut: Config) -> Variant:
    signature = signature | dict.fromkeys(blocks, "constexpr")
    return Variant(
        f"token_restore/{what}", kernel, signature, blocks, cut.num_warps, cut.num_stages, divisible=("width",)
    )


def _forward_blocks(cut: Config, width: int) -> dict[str, int]:
    d = _part(width)
    return {"B": max(1, cut.blocks["TILE"] // d), "D": d}


def _backward_blocks(cut: Config, width: int) -> dict[str, int]:
    d = _part(width)
    return {"ROWS": max(1, cut.blocks["TILE"] // d), "STEPS": cut.blocks["STEPS"], "D": d}


def _part(width: int) -> int:
    """Of a row, how much a tile takes: the largest power of two that divides it, where that is not too small."""
    return min(512, width & -width if width & -width >= 128 else 1 << (width - 1).bit_length())
