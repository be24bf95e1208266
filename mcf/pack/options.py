"""The keys of `mcf.pack`: what is packed, where to, and what is done to an image on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mcf.config import NonNegative, Positive, Section, Share


class JobConfig(Section):
    """What Slurm is asked for, for each task."""

    partition: str | None = Field(None, description="partition")
    account: str | None = Field(None, description="account")
    time: Positive = Field(720, description="time limit, minutes")
    mem: str | None = Field(None, description="memory a task, in Slurm's notation (for example 64G)")
    cpus_per_task: Positive = Field(16, description="cores a task, and processes")
    extra: dict[str, str | int | float] = Field({}, description="further sbatch parameters, by their long names")


class PackConfig(Section):
    """Images become JPEG shards with an index, a manifest and a report of what was left out and why.

    The source is a folder of images, or of tars as img2dataset writes them (LAION-Face). With detections or a detector,
    faces are cut out of them. Interrupted, it goes on where it was when the same command is given again; inside a Slurm
    array each task packs its share of the source, and the last one to end writes the manifest. The number of workers
    and tasks changes nothing in what is written. The paper says neither how faces were chosen nor how they were cut:
    the defaults of min_score, min_face, margin, faces and crop are ours.
    """

    source: str | None = Field(
        None, description="folder of images, or of webdataset tars (KEY.jpg, KEY.json, KEY.txt); with its subfolders"
    )
    out: str | None = Field(
        None, description="folder the shards, manifest.json, report.json and report.md are written to"
    )
    detections: str | None = Field(
        None, description="boxes of the faces: LAION-Face's folder of sample2detect_*.pth for tars; for a folder of images "
        "a .csv (file,left,top,right,bottom, and optionally score, x0,y0 … x4,y4) or .json ({file: [{box, score, landmarks}]})"
    )  # fmt: skip
    converted: str | None = Field(
        None, description="folder for the sample2detect files in a form that is mapped, not loaded; written once. "
        "Default: 'mcf-boxes' in the folder of the detections"
    )  # fmt: skip
    detector: str | None = Field(
        None, description="finds the faces instead of detections: the path of OpenCV's YuNet (.onnx), or MODULE:FUNCTION "
        "(uint8 RGB [H,W,3] → boxes [n,4] as left,top,right,bottom, scores [n], landmarks [n,5,2] or None)"
    )  # fmt: skip
    crop: Literal["none", "square", "face", "aligned"] | None = Field(
        None, description="keep the whole image, its largest centred square, a square around each face, or one turned so "
        "that its five landmarks stand upright; default: face with detections or a detector, none without"
    )  # fmt: skip
    size: Positive | None = Field(
        256, description="side of a square crop, pixels; without a crop, images whose shorter side is longer are scaled "
        "down to it. 'null' keeps every size"
    )  # fmt: skip
    margin: float = Field(
        0.3, ge=0, le=4, description="the square around a face is its box's longer side · (1 + margin) wide"
    )
    min_score: Share = Field(0.9, description="faces with a lower score of the detector are left out")
    min_face: Positive = Field(64, description="faces whose box has a shorter side under this are left out, pixels")
    faces: Literal["largest", "all"] = Field("largest", description="which of an image's faces are kept")
    near_duplicates: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="also drop crops whose 64-bit difference hash is within so many bits of an earlier one's; "
        "default: only crops of the same bytes are dropped"
    )  # fmt: skip
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="JPEG quality of images that are re-encoded")
    shard_samples: Positive | None = Field(
        None, description="images a shard; default: 10000, fewer for small folders so that there are about 16 shards. "
        "A tar becomes one shard, whatever it holds"
    )  # fmt: skip
    min_side: Positive = Field(32, description="images whose shorter side is under this are left out, pixels")
    max_pixels: Positive = Field(100_000_000, description="images with more pixels are left out undecoded")
    max_bytes: Positive = Field(256 * 2**20, description="files with more bytes are left out unread")
    seed: NonNegative = Field(
        0, description="seed of the order in which images are spread over the shards; tars keep theirs"
    )
    workers: Positive | None = Field(
        None, description="processes; default: one for each core, at least 2. 1 is this process itself"
    )
    task: NonNegative | None = Field(
        None, description="which of `tasks` this is, from 0; default: this task of a Slurm array, if it is one"
    )
    tasks: Positive | None = Field(None, description="how many tasks share the work; default: those of the Slurm array")
    merge: bool = Field(
        True,
        description="whether the task that ends last writes shards and manifest; else a later command without tasks does",
    )
    nodes: Positive | None = Field(
        None, description="submit to Slurm instead: an array of so many tasks, and a job after it that merges"
    )
    mode: Literal["slurm", "print"] = Field("slurm", description="with nodes, print: only show the batch scripts")
    slurm: JobConfig = Field(JobConfig(), description="with nodes: what Slurm is asked for")
    verify: bool = Field(False, description="instead of packing, read the shards in `out` and check every checksum")
    report: str | None = Field(
        None, description="instead of packing, write report.html into this packed folder: figures, reasons, pictures"
    )

    @property
    def cropping(self) -> Literal["none", "square", "face", "aligned"]:
        """`crop` with its default."""
        return self.crop or ("face" if self.detections or self.detector else "none")

    @property
    def by_faces(self) -> bool:
        """Whether faces are cut out, rather than whole images kept."""
        return self.cropping in ("face", "aligned")

    def decisive(self) -> dict[str, Any]:
        """The keys that the bytes of the output depend on."""
        indifferent = {
            "source",
            "out",
            "converted",
            "workers",
            "task",
            "tasks",
            "merge",
            "nodes",
            "mode",
            "slurm",
            "verify",
            "report",
        }
        return self.model_dump(exclude=indifferent) | {"crop": self.cropping}
