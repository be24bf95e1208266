"""Random masks from counters: nothing but a sample's position decides what of it stays visible.

Patch l of the sample at position n draws the key w = word 0 of Philox(counter (n mod 2³², n >> 32, l, view), seed). The
order of the patches by (w, l) is the shuffled order. Key and index packed into one 64-bit number w·2¹⁰ + l are distinct
and sort the same way, so that one sort gives both answers, and no second one has to invert it: at place r of the sorted
row stands the patch of rank r,

    sorted[r] = (w, l)   ──►   ids_keep[r] = l for r < keep,   ids_restore[l] = r.

One program is one sample. Floor: it reads 8 bytes and writes 8·(keep + L), 2 MB for 1024 samples of 196 patches (half a
microsecond); the launch costs more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcf.kernels import reference
from mcf.kernels.dispatch import choose, expect_dtype, expect_shape
from mcf.kernels.triton_or_none import tl, triton
from mcf.kernels.tuning import Variant, chip_of, config

_INDEX_BITS = 10
MOST_PATCHES = 1 << _INDEX_BITS
"""Patches that the kernel can rank: their index takes the low bits of a packed key."""


@triton.jit(do_not_specialize=["seed", "view", "patches", "keep"])
def _rank(p_positions, p_keep, p_restore, seed: tl.int64, view, patches, keep, L: tl.constexpr, BITS: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, L)
    position = tl.load(p_positions + i_b)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    # The first word of the four; scalars and a row make a row.
    word, _, _, _ = tl.philox(seed, low, high, o_l, view)
    packed = (word.to(tl.int64) << BITS) | o_l
    # What pads the row to a power of two is larger than every key, and so ends up behind them.
    packed = tl.sort(tl.where(o_l < patches, packed, 1 << (32 + BITS)))
    b_patch = packed & ((1 << BITS) - 1)
    tl.store(p_keep + i_b * keep + o_l, b_patch, mask=o_l < keep)
    tl.store(p_restore + i_b * patches + b_patch, o_l.to(tl.int64), mask=o_l < patches)


@torch.library.custom_op("mcf::mask", mutates_args=())
def _mask(positions: Tensor, seed: int, view: int, patches: int, keep: int) -> tuple[Tensor, Tensor]:
    positions = positions.contiguous()
    ids_keep, ids_restore = positions.new_empty(len(positions), keep), positions.new_empty(len(positions), patches)
    if len(positions):
        row = triton.next_power_of_2(patches)
        cut = config("mask", _shape(row), chip_of(positions.device))
        with torch.cuda.device_of(positions):
            _rank[(len(positions),)](
                positions, ids_keep, ids_restore, seed, view, patches, keep,
                L=row, BITS=_INDEX_BITS, num_warps=cut.num_warps, num_stages=cut.num_stages,
            )  # fmt: skip
    return ids_keep, ids_restore


@_mask.register_fake
def _(positions: Tensor, seed: int, view: int, patches: int, keep: int) -> tuple[Tensor, Tensor]:
    return positions.new_empty(len(positions), keep), positions.new_empty(len(positions), patches)


def mask(
    seed: int, positions: Tensor, view: int, patches: int, keep: int, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Random masks: which patches of each sample stay visible (METHOD 1, "Mask"). The ids are the same to the last bit
    whatever computes them.

    Args:
        seed: the run's seed, any non-negative integer (64 bits of it are used).
        positions: samples seen before each sample, int64 [B].
        view: ENCODER or MOMENTUM.
        patches: number of patches L. Triton ranks up to 1024 of them; the reference any number.
        keep: number of patches that stay visible, 1 to L.
        implementation: auto, triton or reference.

    Returns:
        ids_keep int64 [B, keep], the visible patches in the order of their keys; ids_restore int64 [B, L], the rank
        of each patch's key (a patch is dropped where it is ≥ keep).

    Raises:
        ValueError, TypeError: keep out of range; positions of another shape or type.
    """
    expect_shape("mask", "positions", positions, positions.dim() == 1, "[B]")
    expect_dtype("mask", "positions", positions, torch.int64)
    if not 0 < keep <= patches:
        raise ValueError(f"mask: keep={keep} is not in 1..{patches}")
    unless = f"the kernel ranks at most {MOST_PATCHES} patches" if patches > MOST_PATCHES else ""
    if choose("mask", implementation, positions, unless=unless) == "reference":
        return reference.mask(seed, positions, view, patches, keep)
    # An operator's integers are signed: the upper half of the 64 bits is written as negative numbers.
    return _mask(positions, (seed + (1 << 63)) % (1 << 64) - (1 << 63), view, patches, keep)


def variants(chip: str) -> list[Variant]:
    """What the launcher chooses: rows for 7², 14² and 32² patches."""
    made = []
    for row in (64, 256, 1024):
        cut = config("mask", _shape(row), chip)
        signature = dict.fromkeys(("p_positions", "p_keep", "p_restore"), "*i64") | {"seed": "i64"}
        signature |= dict.fromkeys(("view", "patches", "keep"), "i32") | dict.fromkeys(("L", "BITS"), "constexpr")
        constexprs = {"L": row, "BITS": _INDEX_BITS}
        made.append(Variant(f"mask L≤{row}", _rank, signature, constexprs, cut.num_warps, cut.num_stages))
    return made


def _shape(row: int) -> str:
    return "≤256" if row <= 256 else "any"
