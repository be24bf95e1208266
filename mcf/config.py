"""The schema of a recipe: every key a run can be told, with its meaning, unit and default.

A recipe is a YAML file over these sections, dotted on the command line (`optimizer.blr=1e-4`). The defaults are the
faithful run: where a key has a value that the released code uses, that value is the default, and every departure
from it is visible in a recipe (METHOD, "what the released code does"). Nothing heavy is imported here: a login node
reads recipes with pydantic and PyYAML alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One block of a recipe: unknown keys are refused, numbers are finite, values do not change after the checks."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


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


class DataConfig(Section):
    """The shards and the order in which they are read."""

    path: str | None = Field(
        None, description="folder that mcf.pack wrote (shards, index, manifest.json), or its URL (s3://, gs://, http:// …)"
    )  # fmt: skip
    stage: str | None = Field(
        None, description="folder on each node's local disk that shards are copied to ahead of use; default: none are"
    )
    stage_gb: float = Field(
        100.0, gt=0, description="most that the copies of a node may take, GB, shared by its ranks; what was read goes"
    )  # fmt: skip
    samples: Positive | None = Field(
        None,
        description="samples of an epoch, for plans made where the folder is not; where it is, its manifest counts",
    )
    streams: Positive = Field(
        512, description="logical streams C the data set is read as; C divides batch, ranks divide C"
    )
    window: Positive = Field(256, description="samples a stream reads at once and permutes among themselves")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    decoder: Literal["auto", "mixed", "cpu"] = Field("auto", description="DALI's decoder: mixed on a GPU, cpu without")
    threads: Positive | None = Field(None, description="decoder threads a rank; default: the cores of the rank's share")
    prefetch: Positive = Field(3, description="micro-batches decoded ahead")
    max_bad: Share = Field(
        0.01,
        description="share of the folder's samples (of at least 100) that may be unreadable: the run stops as soon as its "
        "ranks have found more different ones since the start",
    )


class TrainConfig(Section):
    """The loop."""

    epochs: float = Field(16.0, gt=0, description="length of the run, passes over the data")
    steps: Positive | None = Field(None, description="length of the run in optimiser steps, instead of epochs")
    stop_after: Positive | None = Field(
        None,
        description="end this launch after so many further steps, as if it had been told to stop; the schedule stays",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "bf16",
        description="precision of the matrix work; state is always float32. auto is the faster one of the machine that the "
        "run starts on, measured, and stays when the run goes on elsewhere",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed's ZeRO stage")
    threads: Positive | None = Field(
        None, description="CPU threads of torch a rank; default: the cores of the rank's share"
    )
    log_every: Positive = Field(20, description="steps between two lines of metrics")


class SpeedConfig(Section):
    """What makes a step faster and leaves what it computes as it is, but for the order of sums."""

    compile: Literal["none", "blocks"] = Field(
        "none",
        description="blocks: torch.compile makes one pass over memory of what lies between the matrix products of each "
        "transformer block; a minute or two at the first step, and another order of sums. Under ZeRO-3 on several ranks the "
        "teacher's alone",
    )
    recompute: tuple[Literal["encoder", "decoder", "teacher"], ...] = Field(
        (),
        description="parts whose blocks keep their inputs alone and are computed again in the backward pass: a third more "
        "work of these parts, and a fraction of their memory; the numbers stay, to the bit",
    )
    keep_memory: bool = Field(
        True,
        description="on a CPU, keep the memory that tensors give back within the process (glibc), which then stays at its "
        "highest mark",
    )
    linear: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="float32 products of linear layers on a CPU: torch's own (MKL), or oneDNN's; auto: oneDNN on AMD's Zen 3 "
        "to 5, where it multiplies faster",
    )


class CheckpointConfig(Section):
    """What is kept of a run, and how often."""

    every: Positive = Field(1000, description="steps between two checkpoints")
    keep: Positive = Field(3, description="newest checkpoints that are kept")
    keep_every: NonNegative = Field(
        0, description="additionally keep each checkpoint whose step is a multiple of this (0: none)"
    )


class GuardConfig(Section):
    """What happens when numbers go wrong."""

    max_bad_steps: Positive = Field(10, description="non-finite steps in a row after which the run stops")
    collapse_std: float = Field(
        0.1, ge=0, description="warn when the spread of normalised queries falls under this share of a uniform one's"
    )


class WatchdogConfig(Section):
    """When a run ends because a rank is dead or stuck."""

    timeout: float = Field(
        600.0,
        ge=0,
        le=7200,
        description="seconds without progress inside a step after which the run ends, naming the rank (0: never); the "
        "heartbeats come sixty times as often, 0.5 to 10 s apart",
    )
    slow_timeout: float = Field(
        1800.0, gt=0, le=7200, description="the same for the start, the first step, probing, evaluating, saving and the end, which may take long"
    )  # fmt: skip


class TrackConfig(Section):
    """Where metrics and pictures go; metrics.jsonl in the run directory is always written."""

    mlflow: str = Field(
        "local", description="MLflow's tracking URI; 'local' is an sqlite store beside the runs, 'off' is none"
    )
    experiment: str = Field("mcf", description="MLflow experiment")
    images_every: NonNegative = Field(1000, description="steps between two pictures of reconstructions (0: none)")
    images: Positive = Field(6, description="faces in such a picture")
    queue: Positive = Field(1000, description="metric records kept for a tracking server that does not answer")


class ProbeKeys(Section):
    """What is asked of an encoder's features on labelled faces."""

    data: str | None = Field(
        None, description="folder with images/ and train.csv, test.csv (or dev.csv), or one faces.csv or landmarks.csv: "
        "columns file, labels, x0, y0, … in pixels"
    )  # fmt: skip
    label: str = Field("person", description="column that the k nearest neighbours and the linear probe tell")
    group: str | None = Field(
        None,
        description="regular expression whose first group, out of a file's name without its ending, names what must not "
        "find itself; by default the person for other labels than person, and for it the person's video: the number that the "
        "name ends in, without its last digit",
    )
    branch: Literal["encoder", "momentum"] = Field("encoder", description="which encoder is probed")
    features: Literal["cls", "mean"] = Field("cls", description="the class token, or the mean of the patch tokens")
    neighbours: Positive = Field(1, description="nearest neighbours that vote, each with weight exp(cosine / 0.07)")
    faces: int = Field(2000, ge=10, le=20_000, description="about how many faces are used, whole people at a time")


class ProbeConfig(ProbeKeys):
    """Probes of the encoder while it trains; their numbers stand beside the losses."""

    every: NonNegative = Field(0, description="steps between two probes, and one at the end (0: none)")


class SlurmConfig(Section):
    """What Slurm is asked for."""

    partition: str | None = Field(None, description="partition")
    account: str | None = Field(None, description="account")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="node features")
    time: Positive = Field(1440, description="time limit, minutes")
    mem: str | None = Field(None, description="memory a node, in Slurm's notation (for example 512G)")
    cpus_per_task: Positive = Field(16, description="cores a rank")
    warn_seconds: Positive = Field(120, description="how long before the limit the run is told to save itself, seconds")
    max_requeues: NonNegative = Field(100, description="how often the job may go back to the queue")
    extra: dict[str, str | int | float | bool] = Field({}, description="further sbatch parameters, by their long names")


class Recipe(Section):
    """A whole run."""

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
