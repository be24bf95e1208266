"""The keys of `mcf.finetune`. The defaults are FaRL's protocol with a ViT-B; nothing heavy is imported here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mcf.config import (
    CheckpointConfig,
    Decay,
    GuardConfig,
    NonNegative,
    OptimizerConfig,
    Positive,
    Recipe,
    Run,
    Section,
    Share,
    SlurmConfig,
    TrackConfig,
    TrainConfig,
    WatchdogConfig,
)
from mcf.errors import UserError

# Learning rate of pyramid and head (DOWNSTREAM 1).
HEAD_LR = {"alignment": 1e-2, "parsing": 1e-3}


class HeadConfig(Section):
    """Pyramid pooling and feature pyramid (UPerNet)."""

    channels: Positive = Field(768, description="width of the head")
    pools: tuple[Positive, ...] = Field((1, 2, 3, 6), description="sides of the grids of the pyramid pooling")
    dropout: Decay = Field(0.1, description="share of the channels dropped before the last layer")


class HeatmapConfig(Section):
    """Target heat-maps of alignment."""

    size: Positive = Field(128, description="side of the heat-maps of the loss")
    radius: float = Field(5.0, gt=0, description="radius R of exp(−r²·16/(2R²)), cells of the heat-map; 0 beyond")


class FinetuneOptimizerConfig(Section):
    """AdamW, and one drop of its rate."""

    lr: float | None = Field(
        None, gt=0, description="learning rate of pyramid and head; default 1e-2 (alignment) or 1e-3 (parsing)"
    )
    backbone_lr: float = Field(1e-4, gt=0, description="learning rate of the backbone")
    drop_epoch: NonNegative = Field(200, description="epoch from which all rates are optimizer.drop times as large")
    drop: float = Field(0.1, gt=0, le=1, description="factor of that drop")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's β")
    eps: float = Field(1e-8, gt=0, description="AdamW's ε")
    weight_decay: float = Field(1e-5, ge=0, description="decoupled weight decay, of all parameters")


class FinetuneTrainConfig(Section):
    """The loop."""

    epochs: Positive | None = Field(
        None, description="length, passes over the data; default: the protocol's of the data set"
    )
    stop_after: Positive | None = Field(
        None, description="end after so many further steps, as if told to stop; the schedule stays"
    )
    precision: Literal["bf16", "fp32"] = Field("fp32", description="precision of the matrix work")
    zero_stage: Literal[0, 1, 2] = Field(0, description="DeepSpeed's ZeRO stage, where there are several ranks")
    threads: Positive | None = Field(None, description="CPU threads of torch a rank; default: its share of the cores")
    readers: Positive | None = Field(
        None, description="threads a rank that decode images; default: its share of the cores"
    )
    log_every: Positive = Field(20, description="steps between two lines of metrics")


class FinetuneTrackConfig(TrackConfig):
    """Where metrics and pictures go; metrics.jsonl in the run directory is always written."""

    experiment: str = Field("mcf-downstream", description="MLflow experiment")


class FinetuneConfig(Run):
    """Train a head for alignment or parsing on an encoder, and evaluate it by FaRL's protocol.

    For example: python -m mcf.finetune task=parsing dataset=lapa data=LaPa weights=runs/mine
    A run that was cut off goes on when it is started again with the same keys.
    """

    OF_THE_LAUNCH: ClassVar[tuple[str, ...]] = (
        "mode", "nodes", "gpus_per_node", "slurm", "output", "micro_batch", "pictures", "attention", "train.stop_after",
        "train.zero_stage", "train.threads", "train.readers", "train.log_every", "checkpoint", "guard", "watchdog", "track",
    )  # fmt: skip
    PLACES: ClassVar[tuple[str, ...]] = ("data", "weights")

    task: Literal["alignment", "parsing"] = Field(description="points of a face, or a class for each pixel")
    dataset: str = Field(
        description="aflw19, 300w, wflw, csv, faces (alignment); lapa, celebamask_hq, masks, faces (parsing)"
    )
    data: str = Field(description="folder of the data set")
    weights: str = Field(description="run directory, checkpoint, or file of weights that is the backbone")
    branch: Literal["encoder", "momentum"] = Field("encoder", description="which encoder of a run or released MCF file")
    heads: Positive | None = Field(None, description="attention heads, for files that do not state them")
    random: bool = Field(False, description="take only the shape from weights: the baseline of an untrained backbone")
    freeze: bool = Field(False, description="train pyramid and head alone")
    taps: tuple[NonNegative, ...] | None = Field(
        None,
        description="four blocks whose outputs are used, counted from 0; default [3,5,7,11] of 12 blocks, and so on",
    )
    name: str = Field("", description="name of the run; default TASK-DATASET", pattern=r"^([A-Za-z0-9][\w.+-]*)?$")
    output: str = Field("runs", description="folder of run directories")
    mode: Literal["here", "local", "slurm", "print"] = Field(
        "here",
        description="here: this process is the run (or a rank of it, under torchrun or srun); local, slurm: through the "
        "launcher, on this machine or as a Slurm job; print: show that job's script",
    )
    nodes: Positive = Field(1, description="machines (mode=slurm)")
    gpus_per_node: Positive = Field(1, description="ranks a machine (mode=local, slurm)")
    seed: NonNegative = Field(0, lt=2**64, description="seed of head, order and augmentation")
    batch: Positive = Field(40, description="faces of a step over all ranks")
    micro_batch: Positive = Field(40, description="most faces a rank handles at once; the accumulation is derived")
    labels: Positive | None = Field(None, description="train on so many faces of the training split only")
    validation: Share = Field(
        0.0, description="share of the training people held out to choose the epoch; 0: the last epoch is the one"
    )
    evaluate_every: Positive = Field(1, description="epochs between two evaluations on the test set")
    warp_size: Positive | None = Field(
        None, description="side of the square that a face is warped to, pixels; default: 8/7 of input_size, 512 for 448"
    )
    input_size: Positive | None = Field(
        None,
        description="side of the network's input, pixels, a multiple of the patch side; default: twice the side of the "
        "encoder's own images, 448 for 224",
    )
    ema: Decay = Field(0.999, description="decay of the average of weights that is evaluated")
    pictures: NonNegative = Field(8, description="faces in each picture (0: no pictures)")
    attention: Literal["auto", "xformers", "sdpa", "flash", "cudnn", "efficient", "math"] = Field(
        "auto", description="implementation of attention"
    )
    head: HeadConfig = HeadConfig()
    heatmap: HeatmapConfig = HeatmapConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    track: FinetuneTrackConfig = FinetuneTrackConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _fits(self):
        if self.taps is not None and len(self.taps) != 4:
            raise ValueError(f"taps={list(self.taps)}: expected four blocks, like [3,5,7,11]")
        return self

    @property
    def run_name(self) -> str:
        """Name of the run."""
        return self.name or f"{self.task}-{self.dataset}"

    def sized(self, input_size: int) -> FinetuneConfig:
        """The keys with the sides that depend on the backbone: what its input has, and the square that this is made of."""
        # The protocol's proportion.
        warp_size = self.warp_size or round(input_size * 512 / 448)
        return self.model_copy(update={"input_size": input_size, "warp_size": warp_size})

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of the warped square and of the network's input, pixels, once they are known."""
        assert self.warp_size is not None and self.input_size is not None, "to be asked after `sized`"
        return self.warp_size, self.input_size

    @property
    def lr(self) -> float:
        """Learning rate of pyramid and head before the drop."""
        return self.optimizer.lr or HEAD_LR[self.task]

    def shares(self, ranks: int) -> tuple[int, int]:
        """Faces that a rank handles at once, and micro-batches a step; UserError if they do not make up the batch."""
        share, rest = divmod(self.batch, ranks)
        local = min(self.micro_batch, max(share, 1))
        if rest or share % local:
            raise UserError(
                f"batch={self.batch} cannot be cut into {ranks} ranks × micro-batches of {local}; "
                f"use batch={max(1, share // local) * local * ranks}, or another micro_batch"
            )
        if local * ranks < 2:
            raise UserError("one face at a time leaves BatchNorm nothing to normalise with; use micro_batch=2 or more")
        return local, share // local

    def recipe(self, ranks: int | None = None) -> Recipe:
        """What launcher, engine and tracker read of a run, as the recipe that they know; for so many ranks, if given."""
        optimizer = self.optimizer
        return Recipe(
            name=self.run_name, output=self.output, seed=self.seed, batch=self.batch, micro_batch=self.micro_batch,
            nodes=self.nodes if ranks is None else 1, gpus_per_node=ranks or self.gpus_per_node,
            optimizer=OptimizerConfig(
                lr=self.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
            ),
            train=TrainConfig(precision=self.train.precision, zero_stage=self.train.zero_stage),
            checkpoint=self.checkpoint, guard=self.guard, watchdog=self.watchdog, track=self.track, slurm=self.slurm,
        )  # fmt: skip
