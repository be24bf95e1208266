"""The frozen teacher M1, whose features say how much a pseudo image looks like the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcf.errors import UserError
from mcf.kernels import feature_tap
from mcf.models.float8 import Float8Linear
from mcf.models.vit import Block, VisionTransformer


class Teacher(nn.Module):
    """A frozen ViT that gives the outputs of some of its blocks.

    It never trains: parameters need no gradient and `train()` leaves it in evaluation mode. Its position table is
    interpolated once if the images are of another size than it was made for; any patch size will do that divides the
    image, since it sees pixels and not the student's patches.

    Args:
        state: its tensors by timm's names, without the head; width, depth, patch size and grid are read from them.
        heads: attention heads, which no tensor tells.
        taps: blocks whose outputs are compared, counted from 0.
        image_size: side of the images it will see, pixels; None for the size it was made for.
        attention: one of `mcf.attention.IMPLEMENTATIONS`.
        kernels: one of `mcf.kernels.dispatch.IMPLEMENTATIONS`.

    Raises:
        UserError: taps beyond the depth, or an image size that its patches do not divide.
        RuntimeError: a tensor is missing, too many, or of the wrong shape.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        heads: int,
        taps: tuple[int, ...] = (2, 5, 8, 11),
        image_size: int | None = None,
        attention: str = "auto",
        kernels: str = "auto",
    ):
        super().__init__()
        vit = vit_of(state, heads=heads, attention=attention, kernels=kernels)
        if not taps or max(taps) >= len(vit.blocks):
            raise UserError(
                f"teacher.taps={list(taps)}: the teacher has blocks 0 to {len(vit.blocks) - 1}; name blocks among them"
            )
        if image_size is not None:
            resize_positions(vit, image_size)
        self.vit = vit
        self.taps = tuple(taps)
        self.kernels = kernels
        self._stream: torch.dtype | None = None
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def to_autocast(self, dtype: torch.dtype) -> Teacher:
        """Keep the matrices in the type that autocast would cast them to at every use: frozen, they are cast once.

        The results are the same to the bit; without autocast the teacher no longer runs.
        """
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def to_float8(self) -> Teacher:
        """Compute the products of qkv, proj, fc1 and fc2 of every block in float8 (`mcf.models.float8`), both ways.

        The images' features and the pseudo images' come from the same rounded weights: an image has a loss of 0 against
        itself. Patches, norms, attention and the stream stay as they are. To be called before `to_autocast` and
        `to_stream`, so that weights are rounded once; these leave float8 layers alone.

        Raises:
            UserError: a width that is no multiple of 16.
        """
        for block in self.vit.blocks:
            assert isinstance(block, Block)
            for part, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))):
                for name in names:
                    if isinstance(layer := getattr(part, name), nn.Linear):
                        setattr(part, name, Float8Linear(layer))
        return self

    def to_stream(self, dtype: torch.dtype) -> Teacher:
        """Compute in one type throughout, the sums of the blocks and the position table too; autocast no longer matters.

        Each block then adds two roundings of the stream to those that autocast makes.
        """
        self.vit.to(dtype)
        self._stream = dtype
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Outputs of the tapped blocks, each [B, 1+L, width], before the final norm.

        Args:
            images: uint8 [B, H, W, 3], or ImageNet-normalised float [B, 3, H, W]; gradients flow into the latter.
        """
        return self._features(images)

    forward = features

    def feature_loss(self, images: Tensor, targets: Sequence[Tensor], axis: str = "tokens") -> Tensor:
        """How far the features of images are from others: the feature loss, summed over the taps, a float32 scalar.

        It is taken where the features pass, so that its gradient joins theirs there (`mcf.kernels.feature_tap`).

        Args:
            images: as of `features`; gradients flow into float images.
            targets: features of other images, as `features` gives them. They get no gradient.
            axis: the axis that features are normalised over, "tokens" or "channels".
        """
        others, losses = dict(zip(self.taps, targets, strict=True)), []

        def tap(index: int, tokens: Tensor) -> Tensor:
            tokens, loss = feature_tap(tokens, others[index], axis, implementation=self.kernels)
            losses.append(loss)
            return tokens

        self._features(images, tap)
        return torch.stack(losses).sum()

    def _features(self, images: Tensor, at_tap: Callable[[int, Tensor], Tensor] | None = None) -> list[Tensor]:
        if self._stream is None:
            return self.vit.features(images, self.taps, at_tap)
        with torch.autocast(images.device.type, enabled=False):
            return self.vit.features(images, self.taps, at_tap)


def vit_of(
    state: Mapping[str, Tensor], *, heads: int, attention: str = "auto", kernels: str = "auto"
) -> VisionTransformer:
    """A ViT with the tensors of a state dict in timm's names; its shape is read from them (RuntimeError: it is not whole).

    With `norm_pre` among them it is CLIP's variant: `mcf.weights` lets no other ViT with such a norm in.
    """
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    depth = len({m[1] for m in map(re.compile(r"blocks\.(\d+)\.").match, state) if m})
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    # Built without storage: the tensors themselves become the parameters.
    with torch.device("meta"):
        vit = VisionTransformer(
            image_size=grid * patch_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=hidden / width,
            attention=attention,
            kernels=kernels,
            clip="norm_pre.weight" in state,
        )
    vit.load_state_dict({name: tensor.detach().clone().float() for name, tensor in state.items()}, assign=True)
    return vit


def resize_positions(vit: VisionTransformer, image_size: int) -> None:
    """Make a ViT ready for images of another size: its position table is interpolated (bicubic), in place."""
    if image_size == vit.image_size:
        return
    if image_size % vit.patch_size:
        raise UserError(
            f"model.image_size={image_size}: the teacher's patches of {vit.patch_size} pixels do not divide it; "
            f"use {max(1, round(image_size / vit.patch_size)) * vit.patch_size}, or another teacher"
        )
    old, new = vit.image_size // vit.patch_size, image_size // vit.patch_size
    first, table = vit.pos_embed[:, :1], vit.pos_embed[:, 1:]
    grid = table.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    vit.pos_embed = torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(table.dtype)], dim=1)
    vit.image_size = image_size
