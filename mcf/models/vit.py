"""The vision transformer: encoder, momentum encoder and teacher are one class, and the decoder uses its blocks.

    images ──► patches that are visible ──► linear + position ──► class token first ──► blocks ──► norm

Pre-norm blocks, biases in qkv, LayerNorm ε 1e-6 (METHOD 1; Dosovitskiy et al. 2021). Parameters have timm's names
and layouts, so that a state dict goes to and from `vit_base_patch16_224` unchanged. Only visible patches are read
from the image and embedded: a quarter of the work of embedding all and dropping most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcf.attention import attention
from mcf.kernels import patch_gather
from mcf.linear import linear
from mcf.models.patches import MEAN, STD

NORM_EPS = 1e-6
CLIP_EPS = 1e-5


class Linear(nn.Linear):
    """A linear layer [..., in] → [..., out] as MAE initialises it: Xavier-uniform weight, zero bias. Multiplied by `mcf.linear`."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, width] → [B, N, width]."""

    def __init__(self, width: int, heads: int, implementation: str = "auto"):
        super().__init__()
        self.heads = heads
        self.implementation = implementation
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        return self.proj(attention(q, k, v, self.implementation).reshape(batch, tokens, width))


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702·x), elementwise: OpenAI's stand-in for GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers around a GELU (`clip`: QuickGELU), [B, N, width] → [B, N, width]."""

    def __init__(self, width: int, hidden: int, clip: bool = False):
        super().__init__()
        self.activation = quick_gelu if clip else F.gelu
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block, [B, N, width] → [B, N, width].

    recompute: whether it keeps its input alone, and computes the rest again in the backward pass.
    """

    recompute = False

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, attention: str = "auto", *, clip: bool = False):
        super().__init__()
        eps = CLIP_EPS if clip else NORM_EPS
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, round(width * mlp_ratio), clip)

    def __call__(self, x: Tensor) -> Tensor:
        # Here, so that hooks and what is compiled are within what is repeated.
        if self.recompute and x.requires_grad and torch.is_grad_enabled():
            # Nothing in it is random: the generators' state need not be kept.
            return checkpoint(super().__call__, x, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches to tokens, with the weight in a convolution's layout, `proj.weight` [width, 3, P, P]."""

    def __init__(self, patch_size: int, width: int, kernels: str = "auto"):
        super().__init__()
        self.patch_size = patch_size
        self.kernels = kernels
        self.proj = PatchProjection(patch_size, width)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Images (uint8 [B, H, W, 3], or normalised float [B, 3, H, W]) → tokens of the patches `ids` [B, K, width]."""
        kind = images.device.type
        # What autocast would round the patches to: they are written in that type, and never exist in float32.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.proj.weight.dtype
        patches = patch_gather(images, ids, self.patch_size, MEAN, STD, dtype=dtype, implementation=self.kernels)
        return self.proj(patches)


class PatchProjection(nn.Module):
    """The linear map of patch vectors [B, K, 3·P·P] to tokens [B, K, width], initialised as a Linear (METHOD 1)."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.data.view(width, -1))

    def forward(self, patches: Tensor) -> Tensor:
        if patches.device.type != "cpu" or patches.dtype != torch.float32:
            return F.linear(patches, self.weight.flatten(1), self.bias)
        # The same sum, as a convolution over an image that is one row of patches: in float32 on a CPU it is added up in
        # the order of a convolution over the whole image, and golden numbers (METHOD 3) depend on the last bit of it.
        batch, count, _ = patches.shape
        side = self.weight.shape[-1]
        row = patches.view(batch, count, 3, side, side).permute(0, 2, 3, 1, 4).reshape(batch, 3, side, count * side)
        return F.conv2d(row, self.weight, self.bias, stride=side).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A plain ViT over square images.

    `pos_embed` [1, 1+L, width] is a buffer: the fixed sin-cos table of our own encoders, the table of its file for a
    teacher. It is persistent, under timm's name, so that every state dict is a whole ViT.

    Args:
        image_size: side of the images, pixels.
        patch_size: side P of a patch, pixels, which divides image_size.
        width, depth, heads: of the transformer.
        mlp_ratio: hidden width of the MLPs / width.
        attention: one of `mcf.attention.IMPLEMENTATIONS`.
        kernels: one of `mcf.kernels.dispatch.IMPLEMENTATIONS`.
        clip: whether it is CLIP's image encoder (Radford et al. 2021): a LayerNorm before the blocks (`norm_pre`, timm's
            name), QuickGELU, ε 1e-5. FaRL is one. Its input stays in ImageNet's units (`mcf.weights.sources`).
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        kernels: str = "auto",
        clip: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.width = width
        self.clip = clip
        self.patch_embed = PatchEmbed(patch_size, width, kernels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos_positions(width, image_size // patch_size)[None])
        eps = CLIP_EPS if clip else NORM_EPS
        self.norm_pre = nn.LayerNorm(width, eps=eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, attention, clip=clip) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """The blocks' input [B, 1+K, width]: class token, then the patches `ids` (all if None), positions added (CLIP: normalised)."""
        tokens = self.patch_embed(images, ids)
        # The sum with the table brings the stream to float32 under autocast, where it stays.
        table = self.pos_embed[0, 1:]
        tokens = tokens + (table if ids is None else table[ids])
        first = self.cls_token + self.pos_embed[:, :1]
        return self.norm_pre(torch.cat([first.expand(tokens.shape[0], -1, -1), tokens], dim=1))

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Normalised output tokens [B, 1+K, width] of the visible patches `ids`, class token first.

        Args:
            images: uint8 [B, H, W, 3], or normalised float [B, 3, H, W].
            ids: visible patches, int64 [B, K]; None for all of them, in order.
        """
        tokens = self.embed(images, ids)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def features(
        self, images: Tensor, taps: tuple[int, ...], at_tap: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs [B, 1+L, width] of the blocks `taps` (counted from 0), before the final norm; later blocks are skipped.

        at_tap is called with the number and the output of each tapped block, and what it returns goes on in its place.
        """
        tokens, outputs = self.embed(images), {}
        for index, block in enumerate(self.blocks[: max(taps) + 1]):
            tokens = block(tokens)
            if index in taps:
                tokens = outputs[index] = tokens if at_tap is None else at_tap(index, tokens)
        return [outputs[tap] for tap in taps]


def resized_table(table: Tensor, grid: int) -> Tensor:
    """A position table [1, 1+L, width] for grid × grid patches: bicubic, align_corners=False, the class token's kept."""
    old = round((table.shape[1] - 1) ** 0.5)
    if old == grid:
        return table.clone()
    maps = table[:, 1:].mT.unflatten(-1, (old, old))
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], maps.flatten(2).mT], dim=1)


def sincos_positions(width: int, grid: int) -> Tensor:
    """MAE's fixed 2-D position table: float32 [1 + grid², width], zeros for the class token first.

    The first half of the width encodes the column, the second the row (the other way round than MoCo v3); each half is
    sin then cos of position · 10000^(−2i/half).
    """
    if width % 4:
        raise ValueError(f"sincos_positions: width={width} is no multiple of 4")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None].expand(grid, grid, -1)
    rows = line[:, None].expand(grid, grid, -1)
    table = torch.cat([columns, rows], dim=-1).reshape(grid * grid, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()
