"""What is computed: the networks, the masks, the losses, the moving average, the optimiser (METHOD)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mcf.config.section import Decay, NonNegative, Positive, Section, Share


class DecoderConfig(Section):
    """The decoder M0, from visible tokens to the pseudo image."""

    width: Positive = Field(512, description="width of the decoder's tokens")
    depth: Positive = Field(8, description="number of blocks")
    heads: Positive = Field(16, description="attention heads")


class HeadsConfig(Section):
    """Projector and predictor of the contrastive branch."""

    hidden: Positive = Field(4096, description="width of the hidden layer")
    dim: Positive = Field(256, description="width of a query or key")
    batch_norm: Literal["per_rank", "synchronised"] = Field(
        "per_rank",
        description="statistics of the heads' BatchNorm: of each rank alone (the reference), or of all ranks",
    )


class ModelConfig(Section):
    """The encoder, and what hangs on it."""

    image_size: Positive = Field(224, description="side of the square input, pixels")
    patch_size: Positive = Field(16, description="side of a patch, pixels")
    width: Positive = Field(768, description="width of the encoder's tokens")
    depth: Positive = Field(12, description="number of encoder blocks")
    heads: Positive = Field(12, description="attention heads of the encoder")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLPs / token width, in encoder and decoder")
    variant: Literal["plain", "clip"] = Field(
        "plain",
        description="plain, or CLIP's encoder, which FaRL's weights need: a norm before the blocks, QuickGELU, ε 1e-5",
    )
    decoder: DecoderConfig = DecoderConfig()
    projection: HeadsConfig = HeadsConfig()

    @property
    def patches(self) -> int:
        """Number of patches L of an image."""
        return (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _fits(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is no multiple of model.patch_size={self.patch_size}; "
                f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size}"
            )
        for name, width, heads in (
            ("model", self.width, self.heads),
            ("model.decoder", self.decoder.width, self.decoder.heads),
        ):
            if width % heads:
                raise ValueError(f"{name}.width={width} is not divisible by {name}.heads={heads}")
            if width % 4:
                raise ValueError(f"{name}.width={width} is no multiple of 4, which the sin-cos position table needs")
        return self


class MaskConfig(Section):
    """The random masks of the two branches."""

    ratio: float = Field(
        0.75, ge=0, lt=1, description="share of the patches that is dropped; int(L·(1−ratio)) are kept"
    )
    momentum: Literal["independent", "same", "none"] = Field(
        "independent",
        description="mask of the momentum branch: drawn on its own, the encoder's, or all patches visible",
    )


class StartConfig(Section):
    """Weights that the encoder (and its momentum copy) starts from, instead of random ones; decoder and heads stay random."""

    path: str | None = Field(None, description="file, run directory or checkpoint; default: none, a random start")
    source: Literal["auto", "moco_v3", "timm", "mae", "mcf", "farl"] = Field(
        "auto", description="what a file is; auto finds out, and a folder is a run or checkpoint of our own"
    )
    branch: Literal["encoder", "momentum"] = Field(
        "encoder", description="which encoder of an own checkpoint or of the released MCF file"
    )


class TeacherConfig(Section):
    """The frozen teacher M1 of the feature loss."""

    source: Literal["moco_v3", "timm", "mae", "mcf", "farl", "checkpoint", "random", "none"] = Field(
        "moco_v3",
        description="where its weights come from: a MoCo v3 file, a ViT with timm's names (safetensors or .pth), MAE's, the "
        "released MCF's, FaRL's, a run directory or checkpoint of our own, random weights (demo only), or no teacher (then "
        "loss.feature=0)",
    )
    path: str | None = Field(None, description="file or run directory the weights are read from")
    branch: Literal["encoder", "momentum"] = Field(
        "encoder", description="which encoder of an own checkpoint or of the released MCF file teaches"
    )
    taps: tuple[NonNegative, ...] = Field(
        (2, 5, 8, 11), description="blocks whose outputs are compared, counted from 0"
    )
    stream: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of what flows between its blocks where train.precision is bf16: in bfloat16 every sum of a block "
        "is rounded too (docs/performance.md has the error)",
    )
    products: Literal["bfloat16", "float8"] = Field(
        "bfloat16",
        description="type of what its blocks' matrix products multiply where train.precision is bf16: float8 rounds weights, "
        "tokens and gradients to 3 bits of mantissa, each row by its own scale, for the double rate of GPUs from compute "
        "capability 8.9 on; widths are multiples of 16",
    )
    heads: Positive = Field(12, description="attention heads (no file states them)")
    width: Positive = Field(768, description="width of a random teacher; files bring their own")
    depth: Positive = Field(12, description="blocks of a random teacher; files bring their own")
    patch_size: Positive = Field(16, description="patch side of a random teacher, pixels; files bring their own")
    allow_random: bool = Field(
        False, description="let teacher.source=random pass: it shows that a run works, and teaches nothing"
    )


class LossConfig(Section):
    """The loss terms and their weights."""

    feature: float = Field(1000.0, ge=0, description="weight of the teacher's feature loss")
    contrast: float = Field(1.0, ge=0, description="weight of the contrastive loss")
    pixel: float = Field(0.0, ge=0, description="weight of MAE's pixel loss on the dropped patches (reference: off)")
    pixel_normalise: bool = Field(False, description="normalise each patch of the pixel target, as MAE does")
    feature_axis: Literal["tokens", "channels"] = Field(
        "tokens", description="axis along which features are L2-normalised: over tokens per channel (the reference), or "
        "over channels per token"
    )  # fmt: skip


class ContrastConfig(Section):
    """The contrastive loss."""

    temperature: float = Field(0.2, gt=0, description="temperature T")
    scope: Literal["micro_batch", "step", "group"] = Field(
        "micro_batch",
        description="which keys a query meets: those of the same global micro-batch (the reference), of the whole "
        "effective batch, or of its group of contrast.group_size neighbours in the effective batch",
    )
    group_size: Positive | None = Field(None, description="samples a group for contrast.scope=group; divides the batch")


class MomentumConfig(Section):
    """The momentum encoder's moving average."""

    value: Share = Field(0.99, description="m of p ← m·p + (1−m)·p_encoder")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="m constant, or rising to 1 by a half-cosine"
    )
    update: Literal["micro_batch", "step"] = Field(
        "micro_batch", description="when the average moves: before the keys of every micro-batch (the reference), or "
        "once after every applied optimiser step"
    )  # fmt: skip


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    blr: float = Field(1.5e-4, gt=0, description="base learning rate; lr = blr · batch / 256")
    lr: float | None = Field(None, gt=0, description="learning rate itself, instead of blr")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the half-cosine")
    warmup_epochs: float = Field(1.0, ge=0, description="length of the linear warm-up, epochs")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's β")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay; none on biases and 1-D parameters")
