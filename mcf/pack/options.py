"""The keys of `mcf.pack`: what is packed, where to, and what is done to an image on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mcf.config import NonNegative, Positive, Section


class PackConfig(Section):
    """A folder of images becomes JPEG shards with an index, a manifest and a report of what was left out and why.

    Interrupted, it goes on where it was when the same command is given again. The number of workers changes nothing
    in what is written.
    """

    source: str | None = Field(None, description="folder of images, read with all its subfolders")
    out: str | None = Field(
        None, description="folder the shards, manifest.json, report.json and report.md are written to"
    )
    crop: Literal["none", "square"] = Field("none", description="keep the whole image, or its largest centred square")
    size: Positive | None = Field(
        256, description="side of a square crop, pixels; without a crop, images whose shorter side is longer are scaled "
        "down to it. 'null' keeps every size"
    )  # fmt: skip
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="JPEG quality of images that are re-encoded")
    shard_samples: Positive | None = Field(
        None, description="images a shard; default: 10000, fewer for small folders so that there are about 16 shards"
    )
    min_side: Positive = Field(32, description="images whose shorter side is under this are left out, pixels")
    max_pixels: Positive = Field(100_000_000, description="images with more pixels are left out undecoded")
    max_bytes: Positive = Field(256 * 2**20, description="files with more bytes are left out unread")
    seed: NonNegative = Field(0, description="seed of the order in which images are spread over the shards")
    workers: Positive | None = Field(
        None, description="processes; default: one for each core, at least 2. 1 is this process itself"
    )
    verify: bool = Field(False, description="instead of packing, read the shards in `out` and check every checksum")

    def decisive(self) -> dict[str, Any]:
        """The keys that the bytes of the output depend on."""
        return self.model_dump(exclude={"source", "out", "workers", "verify"})
