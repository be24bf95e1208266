"""From images to the vectors of the patches that are wanted, in one pass: gathered, normalised and cast.

A patch is P rows of P pixels. Its vector runs over (channel, row, column), as a convolution's weight does, so that the
projection behind it is one matrix product. Its value at channel c, row y, column x is, for patch (i, j) of image b,

    uint8 [B, H, W, 3]    v·1/(255·std) − mean/std   of the byte   ((b·H + i·P + y)·W + j·P + x)·3 + c
    float [B, 3, H, W]    the value at                             ((b·3 + c)·H + i·P + y)·W + j·P + x

Only patches that are wanted are touched. Bytes are not loaded one by one: G pixels that lie side by side (4, or 2 or 1
where sizes are not multiples of 4) are 3·G bytes, which is three words of G bytes, and give G neighbours in each channel.

Gradients go to the same places. With all patches the map is one to one, and the kernel runs backwards. With ids, a
program is one place of the image, looks for its patch among the ids and writes the sum of what it finds, mostly
nothing: every pixel is written once, by one program, and no two runs differ in a bit.

Floor, for 224² images with P = 16 and a quarter of the patches, to bfloat16: 38 KB read and 75 KB written an image and
view, 231 MB for two views of 1024 images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcf.kernels import reference
from mcf.kernels.dispatch import FLOATS, choose, expect_device, expect_dtype, expect_shape
from mcf.kernels.triton_or_none import tl, triton
from mcf.kernels.tuning import Config, Variant, chip_of, config, type_of

MOST_IDS = 4096
"""Ids an image that the gradient's kernel looks through."""
_SIZES = ["patches", "count"]


@triton.jit
def _which(p_ids, patches, count, height, width, P: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """This program's patches among all that are wanted, image after image: number, image, and place; where to read."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < patches
    i_patch = tl.load(p_ids + o_n, mask=m_n, other=0).to(tl.int32) if IDS else o_n % count
    # An id that is no patch reads nothing.
    m_there = m_n & (i_patch >= 0) & (i_patch < (height // P) * (width // P))
    return o_n.to(tl.int64), m_n, (o_n // count).to(tl.int64), i_patch, m_there


@triton.jit(do_not_specialize=_SIZES)
def _gather_bytes(
    p_words, p_ids, p_out, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, patches, count, height, width,
    P: tl.constexpr, PIXELS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    o_n, m_n, i_image, i_patch, m_there = _which(p_ids, patches, count, height, width, P, BLOCK, IDS)
    # Groups of G pixels: where the first word of each lies, the start of an image in 64 bits, the rest in 32.
    o_group = tl.arange(0, PIXELS // G)
    columns = width // P
    row = (i_patch // columns * P)[:, None] + (o_group // (P // G))[None, :]
    column = (i_patch % columns * (P // G))[:, None] + (o_group % (P // G))[None, :]
    o_word = i_image[:, None] * (height * width // G * 3) + (row * (width // G) + column) * 3
    m_word = m_there[:, None] & (o_group < P * P // G)[None, :]
    word_0 = tl.load(p_words + o_word, mask=m_word, other=0).to(tl.int32)
    word_1 = tl.load(p_words + o_word + 1, mask=m_word, other=0).to(tl.int32)
    word_2 = tl.load(p_words + o_word + 2, mask=m_word, other=0).to(tl.int32)

    o_pixel = tl.arange(0, PIXELS)
    p_out += o_n[:, None] * (3 * P * P) + o_pixel[None, :]
    m_out = m_n[:, None] & (o_pixel < P * P)[None, :]
    for c in tl.static_range(3):
        scale = scale_r if c == 0 else scale_g if c == 1 else scale_b
        shift = shift_r if c == 0 else shift_g if c == 1 else shift_b
        # Pixel k of a group has channel c in byte 3k + c of its words.
        b_0 = _byte(word_0, word_1, word_2, c, G)
        if G == 1:
            b_pixels = b_0
        elif G == 2:
            b_pixels = tl.interleave(b_0, _byte(word_0, word_1, word_2, 3 + c, G))
        else:
            b_even = tl.interleave(b_0, _byte(word_0, word_1, word_2, 6 + c, G))
            b_odd = tl.interleave(_byte(word_0, word_1, word_2, 3 + c, G), _byte(word_0, word_1, word_2, 9 + c, G))
            b_pixels = tl.interleave(b_even, b_odd)
        b_out = b_pixels.to(tl.float32) * scale + shift
        tl.store(p_out + c * P * P, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _byte(word_0, word_1, word_2, index: tl.constexpr, G: tl.constexpr):
    word = word_0 if index // G == 0 else word_1 if index // G == 1 else word_2
    return (word >> (8 * (index % G))) & 0xFF


@triton.jit(do_not_specialize=_SIZES)
def _move(
    p_images, p_ids, p_patches, patches, count, height, width,
    P: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Floating point: images to patches, or BACK, all patches to images."""
    o_n, m_n, i_image, i_patch, m_there = _which(p_ids, patches, count, height, width, P, BLOCK, IDS)
    o_pixel = tl.arange(0, PIXELS)
    columns = width // P
    row = (i_patch // columns * P)[:, None] + (o_pixel // P)[None, :]
    column = (i_patch % columns * P)[:, None] + (o_pixel % P)[None, :]
    p_images += i_image[:, None] * (3 * height * width) + (row * width + column)
    p_patches += o_n[:, None] * (3 * P * P) + o_pixel[None, :]
    m_pixel = (o_pixel < P * P)[None, :]
    for c in tl.static_range(3):
        if BACK:
            b_values = tl.load(p_patches + c * P * P, mask=m_there[:, None] & m_pixel, other=0)
            b_values = b_values.to(p_images.dtype.element_ty)
            tl.store(p_images + c * height * width, b_values, mask=m_there[:, None] & m_pixel)
        else:
            b_values = tl.load(p_images + c * height * width, mask=m_there[:, None] & m_pixel, other=0)
            b_values = b_values.to(p_patches.dtype.element_ty)
            tl.store(p_patches + c * P * P, b_values, mask=m_n[:, None] & m_pixel)


@triton.jit(do_not_specialize=_SIZES)
def _scatter(
    p_grad, p_ids, p_images, patches, count, height, width, P: tl.constexpr, PIXELS: tl.constexpr, COUNT: tl.constexpr
):
    """The gradient of one place of an image, where `patches` places are: what the ids that name it have brought."""
    i_n = tl.program_id(0)
    columns = width // P
    places = (height // P) * columns
    i_image, i_patch = (i_n // places).to(tl.int64), i_n % places
    o_k = tl.arange(0, COUNT)
    m_hit = tl.load(p_ids + i_image * count + o_k, mask=o_k < count, other=-1) == i_patch

    o_pixel = tl.arange(0, PIXELS)
    m_pixel = o_pixel < P * P
    b_r = tl.zeros([PIXELS], tl.float32)
    b_g = tl.zeros([PIXELS], tl.float32)
    b_b = tl.zeros([PIXELS], tl.float32)
    hits = tl.sum(m_hit.to(tl.int32))
    k = hits * 0 - 1
    for _ in range(hits):
        k = tl.min(tl.where(m_hit & (o_k > k), o_k, COUNT))
        p_patch = p_grad + (i_image * count + k) * (3 * P * P) + o_pixel
        b_r += tl.load(p_patch, mask=m_pixel, other=0).to(tl.float32)
        b_g += tl.load(p_patch + P * P, mask=m_pixel, other=0).to(tl.float32)
        b_b += tl.load(p_patch + 2 * P * P, mask=m_pixel, other=0).to(tl.float32)

    row, column = i_patch // columns * P + o_pixel // P, i_patch % columns * P + o_pixel % P
    p_images += i_image * (3 * height * width) + (row * width + column)
    tl.store(p_images, b_r.to(p_images.dtype.element_ty), mask=m_pixel)
    tl.store(p_images + height * width, b_g.to(p_images.dtype.element_ty), mask=m_pixel)
    tl.store(p_images + 2 * height * width, b_b.to(p_images.dtype.element_ty), mask=m_pixel)


@torch.library.custom_op("mcf::patch_gather", mutates_args=())
def _patch_gather(
    images: Tensor, ids: Tensor | None, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    images, ids = images.contiguous(), None if ids is None else ids.contiguous()
    batch, height, width, count = _sizes_of(images, ids, patch_size)
    out = images.new_empty(batch, count, 3 * patch_size**2, dtype=dtype)
    if not out.numel():
        return out
    cut = config("patch_gather", "bytes" if images.dtype == torch.uint8 else "values", chip_of(images.device))
    blocks = _blocks(cut, patch_size)
    grid = (triton.cdiv(batch * count, blocks["BLOCK"]),)
    sizes = batch * count, count, height, width
    launch = {"IDS": ids is not None, "num_warps": cut.num_warps, "num_stages": cut.num_stages, **blocks}
    # Without ids their pointer is read by nobody.
    p_ids = out if ids is None else ids
    with torch.cuda.device_of(images):
        if images.dtype == torch.uint8:
            group = next(g for g in (4, 2, 1) if not (patch_size % g or width % g or images.data_ptr() % g))
            words = images.view(-1).view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[group])
            _gather_bytes[grid](words, p_ids, out, *_affine(mean, std), *sizes, G=group, **launch)
        else:
            _move[grid](images, p_ids, out, *sizes, BACK=False, **launch)
    return out


@_patch_gather.register_fake
def _(images, ids, patch_size, mean, std, dtype):
    batch, _, _, count = _sizes_of(images, ids, patch_size)
    return images.new_empty(batch, count, 3 * patch_size**2, dtype=dtype)


@torch.library.custom_op("mcf::patch_gather_backward", mutates_args=())
def _patch_scatter(
    grad: Tensor, ids: Tensor | None, patch_size: int, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    grad, ids = grad.contiguous(), None if ids is None else ids.contiguous()
    out = grad.new_empty(len(grad), 3, height, width, dtype=dtype)
    places = height // patch_size * (width // patch_size)
    if not out.numel():
        return out
    cut = config("patch_gather", "values", chip_of(grad.device))
    blocks = _blocks(cut, patch_size)
    launch = {"P": patch_size, "num_warps": cut.num_warps, "num_stages": cut.num_stages}
    patches = len(grad) * places
    with torch.cuda.device_of(grad):
        if ids is None:
            launch |= {"IDS": False, "BACK": True, **blocks}
            grid = (triton.cdiv(patches, blocks["BLOCK"]),)
            _move[grid](out, out, grad, patches, places, height, width, **launch)
        else:
            launch |= {"PIXELS": blocks["PIXELS"], "COUNT": triton.next_power_of_2(max(1, ids.shape[1]))}
            _scatter[(patches,)](grad, ids, out, patches, ids.shape[1], height, width, **launch)
    return out


@_patch_scatter.register_fake
def _(grad, ids, patch_size, height, width, dtype):
    return grad.new_empty(len(grad), 3, height, width, dtype=dtype)


def _remember(ctx, inputs, output):
    images, ids, ctx.patch_size, _, _, _ = inputs
    ctx.save_for_backward(ids)
    ctx.size, ctx.dtype = images.shape[2:], images.dtype


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _patch_scatter(grad, ids, ctx.patch_size, *ctx.size, ctx.dtype), None, None, None, None, None


_patch_gather.register_autograd(_backward, setup_context=_remember)


def patch_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor:
    """The patches of images as vectors, in the order of a convolution's weight (channel, row, column).

    Args:
        images: uint8 [B, H, W, 3], which are normalised here: (x/255 − mean)/std; or floating point [B, 3, H, W],
            taken as they are (gradients flow back into them).
        ids: the patches that are wanted, int64 [B, K] in 0..L−1, row by row; None for all, in order.
        patch_size: P, which divides H and W.
        mean, std: of the three channels, for uint8 images.
        dtype: of the result; None: float32 for uint8 images, else the images' type.
        implementation: auto, triton or reference.

    Returns:
        [B, K, 3·P·P].

    Raises:
        ValueError, TypeError: inputs of the wrong shape, type or device.
    """
    expect_device("patch_gather", images=images, ids=ids)
    packed = images.dtype == torch.uint8
    if not packed and not images.is_floating_point():
        expect_dtype("patch_gather", "images", images, torch.uint8, *FLOATS)
    channels_at = 3 if packed else 1
    expect_shape(
        "patch_gather", "images", images, images.dim() == 4 and images.shape[channels_at] == 3,
        "[B, H, W, 3] in uint8 and [B, 3, H, W] in floating point",
    )  # fmt: skip
    height, width = images.shape[1:3] if packed else images.shape[2:]
    expect_shape(
        "patch_gather", "images", images,
        patch_size > 0 and not (height % patch_size or width % patch_size), f"of a height and width that patch_size={patch_size} divides",
    )  # fmt: skip
    if ids is not None:
        expect_dtype("patch_gather", "ids", ids, torch.int64)
        expect_shape("patch_gather", "ids", ids, ids.dim() == 2 and len(ids) == len(images), f"[{len(images)}, K]")
    if packed and not len(mean) == len(std) == 3:
        raise ValueError(f"patch_gather: mean={mean} and std={std} must have a value for each of the three channels")
    dtype = dtype or (torch.float32 if packed else images.dtype)

    unless = ""
    if dtype not in FLOATS:
        unless = "the kernel writes float32 and bfloat16 only"
    elif ids is not None and images.requires_grad and ids.shape[1] > MOST_IDS:
        unless = f"the gradient's kernel looks through at most {MOST_IDS} ids"
    if choose("patch_gather", implementation, images, unless=unless) == "reference":
        return reference.patch_gather(images, ids, patch_size, mean, std, dtype=dtype)
    return _patch_gather(images, ids, patch_size, mean, std, dtype)


def variants(chip: str) -> list[Variant]:
    """What the launchers choose: patches of 14 and 16 pixels, some or all of them, to and from both types."""
    made = []
    for patch_size in (14, 16):
        for ids in (True, False):
            for dtype in FLOATS:
                made += _variants_of(chip, patch_size, ids, type_of(dtype))
    return made


def _variants_of(chip: str, patch_size: int, ids: bool, kind: str) -> list[Variant]:
    group = 2 if patch_size == 14 else 4
    pointers = {"p_ids": "*i64" if ids else f"*{kind}"}
    sizes = dict.fromkeys(("patches", "count", "height", "width"), "i32")
    divisible = () if patch_size == 14 else ("height", "width")
    cut = {shape: config("patch_gather", shape, chip) for shape in ("bytes", "values")}
    blocks = {shape: _blocks(cut[shape], patch_size) for shape in cut}
    affine = dict.fromkeys(("scale_r", "scale_g", "scale_b", "shift_r", "shift_g", "shift_b"), "fp32")

    def variant(what, kernel, arguments, constexprs, shape):
        name = f"patch_gather/{what} {'some' if ids else 'all'} P={patch_size} {kind}"
        signature = arguments | dict.fromkeys(constexprs, "constexpr")
        return Variant(
            name, kernel, signature, constexprs, cut[shape].num_warps, cut[shape].num_stages, divisible=divisible
        )

    words = {"p_words": {2: "*i16", 4: "*i32"}[group], **pointers, "p_out": f"*{kind}", **affine, **sizes}
    values = {"p_images": f"*{kind}", **pointers, "p_patches": f"*{kind}", **sizes}
    made = [
        variant("bytes", _gather_bytes, words, {**blocks["bytes"], "G": group, "IDS": ids}, "bytes"),
        variant("values", _move, values, {**blocks["values"], "IDS": ids, "BACK": False}, "values"),
    ]
    if ids:
        grads = {"p_grad": f"*{kind}", **pointers, "p_images": f"*{kind}", **sizes}
        constexprs = {"P": patch_size, "PIXELS": blocks["values"]["PIXELS"], "COUNT": 64}
        made.append(variant("backward", _scatter, grads, constexprs, "values"))
    else:
        made.append(variant("backward", _move, values, {**blocks["values"], "IDS": ids, "BACK": True}, "values"))
    return made


def _sizes_of(images: Tensor, ids: Tensor | None, patch_size: int):
    """Batch, height, width, and how many patches of each image are wanted."""
    batch = images.shape[0]
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    return batch, height, width, ids.shape[1] if ids is not None else height // patch_size * (width // patch_size)


def _blocks(cut: Config, patch_size: int) -> dict[str, int]:
    """The constexprs that say how a kernel is cut: as many patches at a time as fill a tile."""
    pixels = 1 << (patch_size**2 - 1).bit_length()
    return {"P": patch_size, "PIXELS": pixels, "BLOCK": max(1, cut.blocks["TILE"] // pixels)}


def _affine(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """(v/255 − mean)/std as v·scale + shift: three scales, three shifts, made in float64."""
    return [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std)]
