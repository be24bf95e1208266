"""Probe an encoder: `python -m mcf.probe weights=RUN data=FOLDER` prints what its features tell of labelled faces.

    k nearest neighbours and a linear probe of a label (identity), ridge regression of landmarks from patch tokens, effective
    rank and uniformity; the splits are those of mcf/probing/faces.py, the numbers those of mcf/probing/probe.py

The same as `probe.every` and `probe.data` of a recipe, for any weights that the project reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from mcf import atomic, caches, checks, cli
from mcf.config import NonNegative, Positive, ProbeKeys
from mcf.errors import UserError


class ProbeRunConfig(ProbeKeys):
    """Probe an encoder on labelled faces.

    Nothing is trained but a linear map; an untrained encoder of the same shape (random=true) is what to compare with.
    Under torchrun or srun the ranks share the work.
    """

    weights: str = Field(description="run directory, checkpoint, or file of weights that holds the encoder")
    branch: Literal["encoder", "momentum"] = Field("encoder", description="which encoder of a run or released MCF file")
    heads: Positive | None = Field(None, description="attention heads, for files that do not state them")
    random: bool = Field(False, description="take only the shape from weights: what an untrained encoder tells")
    seed: NonNegative = Field(0, lt=2**64, description="seed of the untrained encoder")
    out: str | None = Field(None, description="JSON file for the numbers")
    threads: Positive | None = Field(None, description="CPU threads of torch; default: the share of the cores")


@cli.main
def main(argv: list[str] | None = None) -> int:
    """The verb."""
    config = cli.parse(ProbeRunConfig, sys.argv[1:] if argv is None else argv, verb="probe")
    if config.data is None:
        raise UserError("data is not set; give data=FOLDER with images/ and a table of their labels (see --help)")
    checks.check_group(config.group, "group")
    if config.out and not Path(config.out).absolute().parent.is_dir():
        raise UserError(f"out={config.out}: its folder does not exist; make it, or give another file")
    # torch comes with them: help and refusals need not wait for it.
    from mcf import distributed, linear, memory
    from mcf.downstream.backbone import encoder_of
    from mcf.probing.probe import Probe

    caches.keep_local()
    world = distributed.join()
    try:
        distributed.set_threads(world, config.threads)
        linear.use("auto")
        if world.device.type == "cpu":
            memory.keep_freed_memory()
        encoder, heads = encoder_of(
            config.weights, config.branch, config.heads, seed=config.seed if config.random else None
        )
        probe = Probe(config, world, encoder.shape.image_size, f"data={config.data}")
        told = probe(encoder.tensors, heads)
        if world.is_main:
            origin = (
                f"an untrained encoder shaped as the {encoder.origin}" if config.random else f"the {encoder.origin}"
            )
            print(report(told, probe.set.describe(config.label), origin))
            if config.out:
                write(Path(config.out), {"weights": config.weights, "origin": origin, "data": config.data, **told})
    finally:
        distributed.leave()  # a group that is still there when Python ends may abort it, after a refusal too
    return 0


def report(told: dict[str, float], about: str, origin: str) -> str:
    """The numbers as a table."""
    lines = [f"{name.partition('/')[2]:<14}{value:10.4f}" for name, value in told.items() if name.startswith("probe/")]
    return "\n".join([f"{origin}, {about}", *lines])


def write(path: Path, content: dict) -> None:
    """The numbers as JSON, whole or not at all; NaN as text."""
    plain = {name: str(value) if value != value else value for name, value in content.items()}
    atomic.write(path, json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
