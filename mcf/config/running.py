"""How it is run: data, the loop, speed, what is kept of a run, what watches it, where its numbers go, Slurm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mcf.config.section import NonNegative, Positive, Section, Share


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
        "to 5, where it multiplies faster. In compiled blocks (speed.compile) torch's own always",
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
