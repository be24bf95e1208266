"""Weights in: `python -m mcf.convert source=FILE out=FILE` turns any known file into a plain ViT with timm's names.

MoCo v3, MAE, the released MCF checkpoint, FaRL (CLIP's image encoder), or a ViT that has timm's names already. The result
holds tensors and nothing else, so it opens without running code and can be a teacher (`teacher.source=timm`, FaRL's `farl`), a
warm start (`start.path`) or a backbone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from mcf import cli
from mcf.config import Positive, Section
from mcf.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt")


class ConvertConfig(Section):
    """Keys of mcf.convert."""

    source: str = Field(description="file to read")
    out: str = Field(description="file to write: .safetensors, or .pth")
    kind: Literal["auto", "moco_v3", "timm", "mae", "mcf", "farl"] = Field(
        "auto", description="what the file is; auto finds out"
    )
    branch: Literal["encoder", "momentum", "teacher"] = Field(
        "encoder", description="which encoder of the released MCF checkpoint; other kinds have one"
    )
    heads: Positive | None = Field(
        None, description="attention heads, written into the result's metadata (no other file states them)"
    )
    trust: bool = Field(False, description="open a pickle that runs code; only for a file whose origin you trust")


@cli.main
def main(argv: list[str]) -> int:
    """The verb. Writes one file and says what is in it."""
    config = cli.parse(ConvertConfig, argv, verb="convert")
    source, out = Path(config.source), Path(config.out)
    if out.suffix not in SUFFIXES and not out.is_dir():
        raise UserError(f"out={out}: the ending says which kind of file it is; end its name in .safetensors or .pth")
    # torch comes with them: help and refusals need not wait for it.
    from mcf.weights import files
    from mcf.weights.sources import metadata_of, read_file
    from mcf.weights.vit import check_heads

    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"out={out}: is the source itself; give another name")
    encoder = read_file(source, config.kind, where=f"source={source}", branch=config.branch, trust=config.trust)
    heads = config.heads or encoder.heads
    if heads is not None:
        check_heads(encoder.shape, heads, key="heads", where=encoder.origin, stated=encoder.heads)
    if encoder.shape.clip and out.suffix != ".safetensors":
        raise UserError(f"out={out}: such a file cannot state that this is CLIP's variant of a ViT; use .safetensors")
    files.write(out, encoder.tensors, {"origin": source.name, **metadata_of(encoder, heads)})
    shape = encoder.shape
    print(f"{out}: width {shape.width}, depth {shape.depth}, {heads or 'unstated'} heads, patches of {shape.patch_size} pixels, "
          f"images of {shape.image_size}; from the {encoder.origin}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
