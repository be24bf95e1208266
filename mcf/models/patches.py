"""Pixels and patches: ImageNet's units, and an image as a row of patch vectors.

A patch vector runs over (row, column, channel), as the decoder writes it; a convolution's weight runs over (channel,
row, column), as `mcf.kernels.patch_gather` reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of red, green and blue, of values in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of red, green and blue."""


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W] in ImageNet-normalised units."""
    pixels = images.to(torch.float32) / 255
    mean, std = (torch.stack([pixels.new_full((), value) for value in values]) for values in (MEAN, STD))
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] → [B, L, P·P·3], patches row by row."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """[B, L, P·P·3] of a square image → [B, 3, H, W]; the inverse of `patchify`."""
    batch, count, values = patches.shape
    side, channels = round(count**0.5), values // patch_size**2
    grid = patches.reshape(batch, side, side, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, side * patch_size)
