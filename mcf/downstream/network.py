"""The network of both tasks (DOWNSTREAM 1; Zheng et al., CVPR 2022).

    image ──► ViT, outputs of four blocks ──► as maps of strides P/4, P/2, P, 2P ──► UPerNet head ──► logits at P/4

P is the patch side. UPerNet (Xiao et al., ECCV 2018): pyramid pooling over the coarsest map, then a feature pyramid from
coarse to fine, all levels fused at the finest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcf.downstream.config import HeadConfig
from mcf.models import heads
from mcf.models.patches import MEAN, STD
from mcf.models.vit import VisionTransformer, resized_table


class Backbone(nn.Module):
    """A ViT as a source of four maps.

    Its final norm and the blocks after the last tap are given up; its position table, interpolated to the input size,
    is a parameter from here on.

    Args:
        vit: with the table of its own image size; it is taken over, not copied.
        taps: four blocks, counted from 0.
        image_size: side of the input, pixels, a multiple of the patch side.
        mean, std: of the pixels in [0, 1] that it was trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        taps: Sequence[int],
        image_size: int,
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        super().__init__()
        self.taps = tuple(taps)
        self.grid = image_size // vit.patch_size
        self.vit = vit
        table = resized_table(vit.pos_embed, self.grid)
        del vit.pos_embed
        vit.pos_embed = nn.Parameter(table)
        vit.image_size = image_size
        vit.blocks = vit.blocks[: max(taps) + 1]
        vit.norm = nn.Identity()  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images float [B, 3, S, S] in [0, 1] → four maps [B, width, S/P, S/P] of patch tokens, before any final norm."""
        tokens = self.vit.features((images - self.mean) / self.std, self.taps)
        return [t[:, 1:].mT.unflatten(-1, (self.grid, self.grid)) for t in tokens]


def default_taps(depth: int) -> tuple[int, ...]:
    """The protocol's blocks: [3, 5, 7, 11] of 12, [7, 11, 15, 23] of 24, [8, 14, 20, 31] of 32; else in proportion."""
    if depth == 32:
        return 8, 14, 20, 31
    return tuple(max(round(depth * share / 12) - 1, 0) for share in (4, 6, 8, 12))


class BatchNorm(heads.BatchNorm):
    """BatchNorm over [B, C, H, W] in float32, with the statistics of all ranks, on any device and backend."""

    def __init__(self, channels: int):
        super().__init__(channels, synchronised=True)

    def forward(self, input: Tensor) -> Tensor:
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            rows = input.permute(0, 2, 3, 1)
            return super().forward(rows.flatten(0, 2)).view(rows.shape).permute(0, 3, 1, 2)
        return super().forward(input.flatten(2)).view(input.shape)


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; He's initialisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, BatchNorm(outputs), nn.ReLU(inplace=True))


class Pyramid(nn.Module):
    """Four maps [B, width, g, g] → maps of sides 4g, 2g, g and g/2, all of the same width."""

    def __init__(self, width: int):
        super().__init__()

        def double() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        self.finest = nn.Sequential(double(), BatchNorm(width), nn.GELU(), double())
        self.finer = double()
        self.coarser = nn.MaxPool2d(2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        finest, finer, same, coarser = maps
        return [self.finest(finest), self.finer(finer), same, self.coarser(coarser)]


class UPerHead(nn.Module):
    """Four maps of falling size [B, width, ·, ·] → logits [B, outputs, ·, ·] of the finest map's size."""

    def __init__(self, width: int, outputs: int, config: HeadConfig):
        super().__init__()
        channels = config.channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormReLU(width, channels, 1)) for side in config.pools
        )
        self.pooled = ConvNormReLU(width + len(config.pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(ConvNormReLU(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.out = nn.Conv2d(channels, outputs, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *fine, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest) for pool in self.pools]
        levels = [lateral(level) for lateral, level in zip(self.lateral, fine)]
        levels.append(self.pooled(torch.cat([coarsest, *pooled], dim=1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i])
        smooth = [layer(level) for layer, level in zip(self.smooth, levels)] + levels[3:]
        fused = self.fuse(torch.cat([resize(level, levels[0]) for level in smooth], dim=1))
        return self.out(self.dropout(fused))


def resize(maps: Tensor, like: Tensor) -> Tensor:
    """Maps in another's height and width, bilinear, align_corners=False."""
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """Pyramid and head: what is trained in any case. Takes the backbone's four maps as four arguments."""

    def __init__(self, width: int, outputs: int, config: HeadConfig):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.head = UPerHead(width, outputs, config)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.head(self.pyramid(maps))


def build_decoder(seed: int, width: int, outputs: int, config: HeadConfig) -> Decoder:
    """A decoder whose first weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(width, outputs, config)


class Network(nn.Module):
    """Backbone and decoder: images float [B, 3, S, S] in [0, 1] → logits [B, outputs, 4·S/P, 4·S/P]."""

    def __init__(self, backbone: Backbone, decoder: Decoder):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(*self.backbone(images))


class Average:
    """The moving average of a module that is evaluated: a ← d·a + (1 − d)·m over parameters and float buffers."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards a module of the same names; whole numbers (counters) are copied."""
        current = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, ours in [*self.module.named_parameters(), *self.module.named_buffers()]:
            theirs = current[name].detach()
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - self.decay)
            else:
                ours.copy_(theirs)
