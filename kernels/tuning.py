"""Block sizes, warps and stages of every kernel, by shape class and chip; and what a compiled kernel is named by.

The table is data: nothing is tuned while training runs, because ranks would come to different kernels and no run could
be repeated. `python -m mcf.kernels.bench.tune` measures on the machine at hand and prints rows for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from mcf.kernels.triton_or_none import INTERPRETED, Kernel

CHIPS = ("sm_80", "sm_90")
"""What kernels are compiled for ahead of time: A100 and H100/H200."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: sizes of its blocks by the names of its constexprs, warps, and stages of its loops."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: all that the compiler needs to know.

    Every operation's module has `variants(chip) -> list[Variant]` for a chip of CHIPS: all that its launchers choose
    there in bfloat16 and float32 for the shapes in use.

    Args:
        name: what a table calls it, `patch_gather/forward uint8→bf16 P=16`.
        kernel: what `triton.jit` made.
        signature: argument → Triton's type (`*bf16`, `i32`, `i64`, `fp32`), "constexpr" for those of `constexprs`;
            all arguments, in order.
        constexprs: argument → value.
        num_warps, num_stages: as launched.
        wants_tensor_cores: whether it is no good without them.
        divisible: integer arguments that are multiples of 16 in use, which the compiler makes use of. All pointers are.
    """

    name: str
    kernel: Kernel
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    wants_tensor_cores: bool = False
    divisible: tuple[str, ...] = field(default=())


TABLE: dict[tuple[str, str, str], Config] = {
    # (kernel, shape class, chip): chips are those of CHIPS and "interpreter". A class of shapes is a word that the
    # launcher derives from sizes; "any" is what holds where there is no row for it.
    # mask: a row of up to 256 keys is sorted inside one warp, by shuffles. Nobody has measured these.
    ("mask", "≤256", "sm_80"): Config({}, num_warps=1, num_stages=1),
    ("mask", "any", "sm_80"): Config({}, num_warps=4, num_stages=1),
    ("mask", "≤256", "sm_90"): Config({}, num_warps=1, num_stages=1),
    ("mask", "any", "sm_90"): Config({}, num_warps=4, num_stages=1),
    ("mask", "any", "interpreter"): Config({}),
    # patch_gather: TILE is the number of pixels in a tile. Nobody has measured these; of bytes, 4 pixels a thread make
    # the loads of a warp touch few lines.
    ("patch_gather", "any", "sm_80"): Config({"TILE": 1024}, num_warps=4, num_stages=1),
    ("patch_gather", "any", "sm_90"): Config({"TILE": 1024}, num_warps=4, num_stages=1),
    ("patch_gather", "any", "interpreter"): Config({"TILE": 4096}),
    # token_restore: TILE is the number of values in a tile of rows, STEPS the tiles that a program adds up. Nobody has
    # measured these.
    ("token_restore/forward", "any", "sm_80"): Config({"TILE": 4096}, num_warps=8, num_stages=1),
    ("token_restore/forward", "any", "sm_90"): Config({"TILE": 4096}, num_warps=8, num_stages=1),
    ("token_restore/forward", "any", "interpreter"): Config({"TILE": 4096}),
    ("token_restore/backward", "any", "sm_80"): Config({"TILE": 4096, "STEPS": 8}, num_warps=8, num_stages=1),
    ("token_restore/backward", "any", "sm_90"): Config({"TILE": 4096, "STEPS": 8}, num_warps=8, num_stages=1),
    ("token_restore/backward", "any", "interpreter"): Config({"TILE": 4096, "STEPS": 2}),
    # feature_loss: TILE is the number of values in a tile of whole columns. Nobody has measured these.
    ("feature_loss/forward", "any", "sm_80"): Config({"TILE": 8192}, num_warps=8, num_stages=1),
    ("feature_loss/forward", "any", "sm_90"): Config({"TILE": 8192}, num_warps=8, num_stages=1),
    ("feature_loss/forward", "any", "interpreter"): Config({"TILE": 8192}),
    ("feature_loss/backward", "tokens", "sm_80"): Config({"LENGTH": 16, "INNER": 128}, num_warps=4, num_stages=1),
    ("feature_loss/backward", "channels", "sm_80"): Config({"LENGTH": 128, "INNER": 16}, num_warps=4, num_stages=1),
    ("feature_loss/backward", "tokens", "sm_90"): Config({"LENGTH": 16, "INNER": 128}, num_warps=4, num_stages=1),
    ("feature_loss/backward", "channels", "sm_90"): Config({"LENGTH": 128, "INNER": 16}, num_warps=4, num_stages=1),
    ("feature_loss/backward", "any", "interpreter"): Config({"LENGTH": 32, "INNER": 32}),
    # info_nce/pass: by type and width. N queries and M keys a tile, STEP columns at a time of the first product (all, where
    # it is left out), PROGRAMS that a multiprocessor runs at once. Nobody has measured these; they compile without spills.
    ("info_nce/pass", "bf16 64", "sm_80"): Config({"N": 128, "M": 64, "PROGRAMS": 1}, num_warps=8, num_stages=2),
    ("info_nce/pass", "bf16 128", "sm_80"): Config({"N": 128, "M": 32, "PROGRAMS": 1}, num_warps=8, num_stages=3),
    ("info_nce/pass", "bf16 256", "sm_80"): Config({"N": 64, "M": 64, "PROGRAMS": 1}, num_warps=8, num_stages=2),
    ("info_nce/pass", "bf16 512", "sm_80"): Config({"N": 32, "M": 32, "PROGRAMS": 1}, num_warps=8, num_stages=2),
    ("info_nce/pass", "bf16 64", "sm_90"): Config({"N": 128, "M": 64, "PROGRAMS": 1}, num_warps=8, num_stages=3),
    ("info_nce/pass", "bf16 128", "sm_90"): Config({"N": 128, "M": 64, "PROGRAMS": 1}, num_warps=8, num_stages=3),
    ("info_nce/pass", "bf16 256", "sm_90"): Config({"N": 128, "M": 64, "PROGRAMS": 1}, num_warps=8, num_stages=3),
    ("info_nce/pass", "bf16 512", "sm_90"): Config({"N": 64, "M": 32, "PROGRAMS": 1}, num_warps=8, num_stages=2),
    ("info_nce/pass", "fp32 64", "sm_80"): Config(
        {"N": 16, "M": 16, "STEP": 32, "PROGRAMS": 1}, num_warps=4, num_stages=1
    ),
    ("info_nce/pass", "fp32 128", "sm_80"): Config(
        {"N": 16, "M": 32, "STEP": 32, "PROGRAMS": 1}, num_warps=4, num_stages=1
    ),
    ("info_nce/pass", "fp32 256", "sm_80"): Config(
        {"N": 16, "M": 32, "STEP": 32, "PROGRAMS": 1}, num_warps=8, num_stages=1
    ),
    ("info_nce/pass", "fp32 512", "sm_80"): Config(
        {"N": 16, "M": 16, "STEP": 32, "PROGRAMS": 1}, num_warps=8, num_stages=1
    ),
    ("info_nce/pass", "fp32 64", "sm_90"): Config(
        {"N": 16, "M": 32, "STEP": 32, "PROGRAMS": 1}, num_warps=4, num_stages=1
    ),
    ("info_nce/pass", "fp32 128", "sm_90"): Config(
        {"N": 16, "M": 32, "STEP": 32, "PROGRAMS": 1}, num_warps=4, num_stages=1
    ),
    ("info_nce/pass", "fp32 256", "sm_90"): Config(
        {"N": 16, "M": 32, "STEP": 32, "PROGRAMS": 1}, num_warps=8, num_stages=1
    ),
    ("info_nce/pass", "fp32 512", "sm_90"): Config(
        {"N": 16, "M": 16, "STEP": 32, "PROGRAMS": 1}, num_warps=8, num_stages=1
    ),
    ("info_nce/pass", "any", "interpreter"): Config({"N": 32, "M": 64, "PROGRAMS": 1}),
    ("info_nce/pass", "fp32 256", "interpreter"): Config({"N": 32, "M": 64, "STEP": 64, "PROGRAMS": 1}),
    ("info_nce/combine", "any", "sm_80"): Config({"RUNS": 16}, num_warps=4, num_stages=1),
    ("info_nce/combine", "any", "sm_90"): Config({"RUNS": 16}, num_warps=4, num_stages=1),
    ("info_nce/combine", "any", "interpreter"): Config({"RUNS": 2}),
}


def config(kernel: str, shape: str, chip: str) -> Config:
    """The row of a kernel for a shape class on a chip; KeyError: there is none, nor one for "any" shape."""
    return TABLE.get((kernel, shape, chip)) or TABLE[kernel, "any", chip]


def chip_of(device: torch.device) -> str:
    """The chip whose rows hold on a device: the newest of CHIPS that is no newer, and has no more shared memory.

    "interpreter" where kernels run in it.
    """
    return "interpreter" if INTERPRETED else _chip(device)


@cache
def _chip(device: torch.device) -> str:
    # Not the GPUs for desktops from sm_120 on, which have half of its shared memory.
    return "sm_90" if (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0) else "sm_80"


def type_of(dtype: torch.dtype) -> str:
    """Triton's name of a type, as in `Variant.signature` after the asterisk."""
    return {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
    }[dtype]  # fmt: skip
