"""Mask Contrastive Face: the trained network, and the loss that it is trained with (METHOD 1).

    MCF:        images, mask ──► encoder ──► decoder ──► pseudo image        (the module that DeepSpeed wraps)
                                    └─ class token ──► projector ──► predictor ──► query
    Objective:  teacher(pseudo image) against teacher(image) ──► feature loss
                queries against the keys of all ranks        ──► contrastive loss
                dropped patches against their pixels         ──► pixel loss (off in the reference)

The momentum branch that makes the keys is in `mcf.models.momentum`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcf.config import ModelConfig, Recipe
from mcf.errors import UserError
from mcf.kernels import InfoNCE, info_nce_statistics
from mcf.models.decoder import Decoder
from mcf.models.heads import predictor, projector
from mcf.models.patches import normalise, patchify, unpatchify
from mcf.models.teacher import Teacher
from mcf.models.vit import VisionTransformer


class MCF(nn.Module):
    """Encoder, decoder, projector and predictor: all that gets a gradient, and nothing else.

    Args:
        config: widths, depths, heads and sizes.
        attention: one of `mcf.attention.IMPLEMENTATIONS`.
        kernels: one of `mcf.kernels.dispatch.IMPLEMENTATIONS`.
    """

    def __init__(self, config: ModelConfig, *, attention: str = "auto", kernels: str = "auto"):
        super().__init__()
        self.config = config
        self.encoder = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            attention=attention,
            kernels=kernels,
            clip=config.variant == "clip",
        )
        self.decoder = Decoder(
            tokens_width=config.width,
            grid=config.image_size // config.patch_size,
            patch_size=config.patch_size,
            width=config.decoder.width,
            depth=config.decoder.depth,
            heads=config.decoder.heads,
            mlp_ratio=config.mlp_ratio,
            attention=attention,
            kernels=kernels,
        )
        self.projector = projector(config.width, config.projection)
        self.predictor = predictor(config.projection)

    def forward(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's patches and the queries.

        Args:
            images: uint8 [B, H, W, 3].
            ids_keep: visible patches, int64 [B, K].
            ids_restore: places of the patches in the shuffled order, int64 [B, L].

        Returns:
            pred [B, L, P·P·3], every patch in ImageNet-normalised units; q [B, dim], not normalised.
        """
        tokens = self.encoder(images, ids_keep)
        pred = self.decoder(tokens, ids_restore)
        return pred, self.predictor(self.projector(tokens[:, 0]))


def build_student(recipe: Recipe) -> MCF:
    """The network of a recipe with initial weights that are a function of `recipe.seed` alone (equal on all ranks)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return MCF(recipe.model, attention=recipe.attention, kernels=recipe.kernels)


def dropped(ids_restore: Tensor, keep: int) -> Tensor:
    """Which patches a mask drops, bool [B, L]."""
    return ids_restore >= keep


class Objective(nn.Module):
    """The named loss terms of a micro-batch, and their weighted sum.

    Args:
        recipe: weights of the terms, temperature, axis, precision, kernels.
        teacher: the frozen teacher; None only where loss.feature is 0. In bf16 its matrices are cast, once, to
            what teacher.products says.

    Raises:
        UserError: loss.feature is not 0, and there is no teacher; teacher.products=float8, and its widths do not fit.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher | None):
        super().__init__()
        if recipe.loss.feature and teacher is None:
            raise UserError(
                f"loss.feature={recipe.loss.feature:g} needs a teacher, and teacher.source=none; "
                "name a teacher, or set loss.feature=0 and loss.pixel=1"
            )
        self.loss = recipe.loss
        self.temperature = recipe.contrast.temperature
        self.kernels = recipe.kernels
        self.patch_size = recipe.model.patch_size
        self.autocast = recipe.train.precision == "bf16"
        self.teacher = teacher if recipe.loss.feature else None
        if self.teacher is not None and self.autocast:
            if recipe.teacher.products == "float8":
                self.teacher.to_float8()
            cast = self.teacher.to_stream if recipe.teacher.stream == "bfloat16" else self.teacher.to_autocast
            cast(torch.bfloat16)

    def forward(
        self, images: Tensor, pred: Tensor, q: Tensor, keys: Tensor, labels: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """The terms, float32 scalars.

        Args:
            images: uint8 [B, H, W, 3].
            pred: the decoder's patches [B, L, P·P·3].
            q: queries [B, dim], not normalised.
            keys: keys [M, dim] of length 1, of all ranks; or [G, M, dim], then the queries are cut into G equal runs,
                and each run meets keys of its own.
            labels: index of each query's own key among those it meets, int64 [B].
            mask: dropped patches, bool or float [B, L].

        Returns:
            "feature" and "pixel" (where their weight is not 0) and "contrast", unweighted; "total", their weighted sum.
            Detached: "positive", "negative", "entropy" and "accuracy" of the contrast (`mcf.kernels.InfoNCE`); "query_std"
            and "key_std", about 1 for vectors spread evenly over the sphere and 0 for collapse.
        """
        terms: dict[str, Tensor] = {}
        if self.teacher is not None:
            terms["feature"] = self.feature(images, pred)
        if self.loss.pixel:
            terms["pixel"] = pixel_loss(images, pred, mask, self.patch_size, self.loss.pixel_normalise)
        # Also where its weight is 0: the heads then get gradients of zero, and not none.
        terms["contrast"], *statistics = info_nce_statistics(
            q, keys, labels, self.temperature, implementation=self.kernels
        )
        terms["total"] = torch.stack([getattr(self.loss, name) * term for name, term in terms.items()]).sum()
        queries = F.normalize(q.detach().float(), dim=1)
        spreads = {"query_std": spread(queries), "key_std": spread(keys.detach().float().flatten(0, -2))}
        return {**terms, **dict(zip(InfoNCE._fields[1:], statistics)), **spreads}

    def picture(self, images: Tensor, mask: Tensor, pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, mask and prediction [B, L, P·P·3] as they can be looked at: in ImageNet-normalised units.

        A normalised pixel target alone leaves each patch's mean and spread open; they are the image's own then, as where
        MAE shows its reconstructions. With a teacher beside it, the prediction is shown as the teacher sees it.
        """
        if not self.loss.pixel_normalise or self.teacher is not None:
            return images, mask, pred
        mean, deviation = patch_units(patchify(normalise(images), self.patch_size))
        return images, mask, pred.float() * deviation + mean

    def feature(self, images: Tensor, pred: Tensor) -> Tensor:
        """Feature loss, summed over the taps: the teacher on the pseudo image against the teacher on the image."""
        assert self.teacher is not None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                targets = self.teacher.features(images)
            return self.teacher.feature_loss(unpatchify(pred, self.patch_size), targets, self.loss.feature_axis)


def pixel_loss(images: Tensor, pred: Tensor, mask: Tensor, patch_size: int, normalised: bool = False) -> Tensor:
    """MAE's loss: mean-square error of the dropped patches (He et al. 2022, section 3).

    Args:
        images: uint8 [B, H, W, 3]; the target is in ImageNet-normalised units.
        pred: [B, L, P·P·3].
        mask: dropped patches, bool or float [B, L].
        patch_size: P, pixels.
        normalised: whether each target patch is brought to mean 0 and variance 1 (ε 1e-6) first.
    """
    with torch.autocast(images.device.type, enabled=False):
        target = patchify(normalise(images), patch_size)
        if normalised:
            mean, deviation = patch_units(target)
            target = (target - mean) / deviation
        weight = mask.to(torch.float32)
        return ((pred.float() - target).square().mean(dim=-1) * weight).sum() / weight.sum().clamp(min=1)


def patch_units(target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (ε 1e-6) of each patch of [B, L, P·P·3], as [B, L, 1]: MAE's units of a patch."""
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def spread(vectors: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation over vectors [B, dim] of length 1, times √dim.

    About 1 where they are spread evenly over the sphere, 0 where all are one: the sign of collapse.
    """
    return vectors.std(dim=0, correction=0).mean() * vectors.shape[-1] ** 0.5
