"""Weights out: `python -m mcf.export source=RUN out=FILE` writes an encoder of a run as a ViT with timm's names.

`source` is a run directory (its newest whole checkpoint) or one checkpoint of it. The result loads strictly into
`timm.create_model("vit_base_patch16_224", num_classes=0)` or the model of the run's shape, with equal output.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from mcf import cli
from mcf.config import Section


class ExportConfig(Section):
    """Keys of mcf.export."""

    source: str = Field(description="run directory, or one checkpoint in it")
    out: str = Field(description="file to write: .safetensors, or .pth (a flat dict)")
    branch: Literal["encoder", "momentum"] = Field(
        "encoder", description="the encoder that was trained by gradients, or the momentum encoder"
    )


@cli.main
def main(argv: list[str]) -> int:
    """The verb. Writes one file and says what is in it."""
    config = cli.parse(ExportConfig, argv, verb="export")
    # torch comes with them: help and refusals need not wait for it.
    from mcf.weights import files
    from mcf.weights.sources import read_checkpoint

    encoder = read_checkpoint(config.source, config.branch, where=f"source={config.source}")
    metadata: dict[str, str] = {"branch": config.branch}
    if encoder.heads:
        metadata["heads"] = str(encoder.heads)
    files.write(config.out, encoder.tensors, metadata)
    shape = encoder.shape
    print(f"{config.out}: {encoder.origin}: width {shape.width}, depth {shape.depth}, {encoder.heads} heads, patches of "
          f"{shape.patch_size} pixels, images of {shape.image_size}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
