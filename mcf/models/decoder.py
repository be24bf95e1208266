"""The decoder M0: from visible tokens to the pixels of every patch.

visible tokens ──► linear ──► back in place, mask tokens between ──► + position ──► blocks ──► norm ──► linear
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcf.kernels import token_restore
from mcf.models.vit import NORM_EPS, Block, Linear, sincos_positions


class Decoder(nn.Module):
    """Predicts every patch of the image, in ImageNet-normalised units (METHOD 1, "Decoder M0").

    Args:
        tokens_width: width of the encoder's tokens.
        grid: patches a side.
        patch_size: side P of a patch, pixels.
        width, depth, heads, mlp_ratio: of the decoder's own blocks.
        attention: one of `mcf.attention.IMPLEMENTATIONS`.
        kernels: one of `mcf.kernels.dispatch.IMPLEMENTATIONS`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        tokens_width: int,
        grid: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        kernels: str = "auto",
    ):
        super().__init__()
        self.kernels = kernels
        self.embed = Linear(tokens_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos_positions(width, grid)[None])
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pred = Linear(width, patch_size**2 * 3)

    def forward(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Encoder tokens [B, 1+K, tokens_width] and the places of patches [B, L] → patches [B, L, P·P·3]."""
        x = token_restore(self.embed(tokens), self.mask_token, self.pos_embed, ids_restore, implementation=self.kernels)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x)[:, 1:])
