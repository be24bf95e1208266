"""The schema of a recipe: every key a run can be told, with its meaning, unit and default.

A recipe is a YAML file over these sections, dotted on the command line (`optimizer.blr=1e-4`). The defaults are the
faithful run: where a key has a value that the released code uses, that value is the default, and every departure
from it is visible in a recipe (METHOD, "what the released code does"). Nothing heavy is imported here: a login node
reads recipes with pydantic and PyYAML alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mcf.config.method import (
    ContrastConfig,
    DecoderConfig,
    HeadsConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    MomentumConfig,
    OptimizerConfig,
    StartConfig,
    TeacherConfig,
)
from mcf.config.running import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    ProbeConfig,
    ProbeKeys,
    SlurmConfig,
    SpeedConfig,
    TrackConfig,
    TrainConfig,
    WatchdogConfig,
)
from mcf.config.section import Decay, NonNegative, Positive, Run, Section, Share

__all__ = [
    "CheckpointConfig",
    "ContrastConfig",
    "DataConfig",
    "Decay",
    "DecoderConfig",
    "GuardConfig",
    "HeadsConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "MomentumConfig",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "ProbeConfig",
    "ProbeKeys",
    "Recipe",
    "Run",
    "Section",
    "Share",
    "SlurmConfig",
    "SpeedConfig",
    "StartConfig",
    "TeacherConfig",
    "TrackConfig",
    "TrainConfig",
    "WatchdogConfig",
]


class Recipe(Run):
    """A whole run of pre-training."""

    OF_THE_LAUNCH: ClassVar[tuple[str, ...]] = (
        "output", "nodes", "gpus_per_node", "machine", "micro_batch", "kernels", "attention", "data.samples", "data.stage",
        "data.stage_gb", "data.decoder", "data.threads", "data.prefetch", "data.max_bad", "train.stop_after",
        "train.zero_stage", "train.threads", "train.log_every", "speed", "checkpoint", "guard", "watchdog", "track",
        "probe", "slurm",
    )  # fmt: skip
    PLACES: ClassVar[tuple[str, ...]] = ("data.path", "teacher.path", "start.path")

    name: str = Field(
        "mcf", description="name of the run; its directory is output/name", pattern=r"^[A-Za-z0-9][\w.+-]*$"
    )
    output: str = Field("runs", description="folder of run directories")
    seed: NonNegative = Field(0, lt=2**64, description="seed of weights, data order, masks and flips")
    batch: Positive = Field(4096, description="effective batch: samples of an optimiser step over all ranks")
    micro_batch: Positive = Field(
        64,
        description="most samples a rank handles at once; the accumulation is derived, and ranks whose share of batch is "
        "smaller handle their share",
    )
    nodes: Positive = Field(1, description="machines")
    gpus_per_node: Positive = Field(1, description="ranks a machine: one a GPU, or processes where there is no GPU")
    machine: str | None = Field(
        None,
        description="machine that the plan estimates times on: a name (h200, …), or a YAML file like recipes/machines/*",
    )
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="what computes the operations that have kernels: triton (NVIDIA GPUs), reference (plain PyTorch), auto",
    )
    attention: Literal["auto", "xformers", "sdpa", "flash", "cudnn", "efficient", "math"] = Field(
        "auto", description="which implementation of attention"
    )
    model: ModelConfig = ModelConfig()
    start: StartConfig = StartConfig()
    mask: MaskConfig = MaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    contrast: ContrastConfig = ContrastConfig()
    momentum: MomentumConfig = MomentumConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    speed: SpeedConfig = SpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    track: TrackConfig = TrackConfig()
    probe: ProbeConfig = ProbeConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def visible_patches(self) -> int:
        """Number of patches that a mask keeps, int(L·(1−ratio)), of each image."""
        return int(self.model.patches * (1 - self.mask.ratio))

    @property
    def local_batch(self) -> int:
        """Samples a rank handles at once: micro_batch, or its share of batch where many ranks leave it less."""
        return min(self.micro_batch, self.batch // self.world_size)
