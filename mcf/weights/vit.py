"""What a plain ViT with timm's names must look like, and the check that a state dict is one, whole and finite.

Width, depth, patch side and grid are read from the tensors themselves. The number of heads is in no tensor: it comes
from the recipe, and from the metadata of files that this project wrote.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcf.errors import UserError

# Width of one attention head in published ViTs: 64 mostly, 80 in ViT-H, 16 in small tests. Outside, a key is wrong.
HEAD_WIDTHS = range(8, 257)


@dataclass(frozen=True)
class ViTShape:
    """Shape of a ViT: token width, blocks, patch side (pixels), patches a side, hidden width of the MLPs, and whether it
    is CLIP's variant (`VisionTransformer`)."""

    width: int
    depth: int
    patch_size: int
    grid: int
    hidden: int
    clip: bool = False

    @property
    def image_size(self) -> int:
        """Side of the images its position table was made for, pixels."""
        return self.grid * self.patch_size

    @property
    def mlp_ratio(self) -> float:
        """Hidden width of the MLPs / token width."""
        return self.hidden / self.width

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of such a ViT, timm's names, without a head."""
        width, hidden = self.width, self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 1 + self.grid**2, width),
            "patch_embed.proj.weight": (width, 3, self.patch_size, self.patch_size),
            "patch_embed.proj.bias": (width,),
        }
        for i in range(self.depth):
            for name, out, into in (("attn.qkv", 3 * width, width), ("attn.proj", width, width),
                                    ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):  # fmt: skip
                shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
            for name in ("norm1", "norm2"):
                shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        if self.clip:
            shapes |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,)}
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def check(state: Mapping[str, Any], where: str, *, clip: bool = False) -> tuple[dict[str, Tensor], ViTShape]:
    """Hold a state dict (timm's names, head dropped) against the ViT that its own tensors describe.

    `clip` is whether it must be CLIP's variant, which no tensor can tell: QuickGELU leaves no trace.

    Returns the tensors as float32 copies of their own memory, and the shape. Raises UserError, opening with `where`,
    if a tensor is missing, is not part of a plain ViT, has a wrong shape or type, or is not finite.
    """
    shape = dataclasses.replace(_shape_of(state, where), clip=clip)
    expected = shape.parameters()
    if missing := [name for name in expected if name not in state]:
        raise UserError(f"{where}: {_some(missing)} missing; give the whole encoder, only the head may be left out")
    if strange := [name for name in state if name not in expected]:
        raise UserError(f"{where}: {_some(strange)} not part of a plain ViT; another architecture cannot be used here")
    for name in expected:
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}: {name} is {kind}, expected floating-point numbers; give unquantised weights")
    if wrong := [name for name, size in expected.items() if tuple(state[name].shape) != size]:
        listed = [f"{name} has shape {list(state[name].shape)}, expected {list(expected[name])}" for name in wrong[:3]]
        more = f" and {len(wrong) - 3} more are wrong" if wrong[3:] else ""
        raise UserError(f"{where}: {', '.join(listed)}{more}; the file does not fit together")
    tensors: dict[str, Tensor] = {}
    for name in expected:
        value = state[name]
        tensors[name] = value.detach().to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise UserError(
                f"{where}: {name} holds NaN or infinite values; the training that wrote it had failed, give another file"
            )
    return tensors, shape


def check_heads(shape: ViTShape, heads: int, *, key: str, where: str, stated: int | None = None) -> None:
    """Refuse a number of heads (`key`, the recipe's) that the width does not allow or the file contradicts."""
    if stated is not None and stated != heads:
        raise UserError(f"{key}={heads}: the {where} was trained with {stated} heads; set {key}={stated}")
    check_width(shape.width, heads, key=key, where=f"the {where}")


def check_width(width: int, heads: int, *, key: str, where: str) -> None:
    """Refuse heads that do not divide the width, or would be of a width that no ViT has."""
    if width % heads or width // heads not in HEAD_WIDTHS:
        usual = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24) if width % n == 0 and width // n in HEAD_WIDTHS]
        possible = f" (possible: {', '.join(map(str, usual))})" if usual else ""
        raise UserError(
            f"{key}={heads} does not fit the width {width} of {where}; set the number it was trained with{possible}"
        )


def check_taps(depth: int, taps: tuple[int, ...], where: str) -> None:
    """Refuse taps (`teacher.taps`, counted from 0) beyond the depth."""
    if not taps or max(taps) >= depth:
        raise UserError(f"teacher.taps={list(taps)}: {where} has blocks 0 to {depth - 1}; choose among them")


def _shape_of(state: Mapping[str, Any], where: str) -> ViTShape:
    """Read the shape from the few tensors that state it."""
    projection = _tensor(state, "patch_embed.proj.weight", where, 4)
    width, channels, patch, across = projection.shape
    if channels != 3 or patch != across:
        raise UserError(
            f"{where}: patch_embed.proj.weight has shape {list(projection.shape)}, expected [width, 3, patch, patch]; "
            "only encoders of RGB images with square patches can be used"
        )
    positions = _tensor(state, "pos_embed", where, 3).shape[1] - 1
    grid = round(max(positions, 0) ** 0.5)
    if not grid or grid**2 != positions:
        raise UserError(
            f"{where}: pos_embed has {positions + 1} rows, expected one for cls and a square grid; not a plain ViT"
        )
    blocks = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        raise UserError(f"{where}: no blocks.* in it; not a ViT with timm's names")
    hidden = _tensor(state, "blocks.0.mlp.fc1.weight", where, 2).shape[0]
    return ViTShape(width, max(blocks) + 1, patch, grid, hidden)


def _tensor(state: Mapping[str, Any], name: str, where: str, dimensions: int) -> Tensor:
    value = state.get(name)
    if value is None:
        raise UserError(f"{where}: {name} missing; give the whole encoder of a ViT with timm's names")
    if not isinstance(value, Tensor) or value.dim() != dimensions:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{where}: {name} has shape {shape}, expected {dimensions} dimensions; not a plain ViT")
    return value


def _some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more + (" are" if len(names) > 1 else " is")
