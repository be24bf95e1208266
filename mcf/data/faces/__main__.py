"""`python -m mcf.data.faces out=DIR count=600 size=256 seed=0`: a folder of generated faces with labels."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcf import cli
from mcf.config import NonNegative, Positive, Section
from mcf.data.faces.writing import Settings, write_faces


class FacesConfig(Section):
    """Keys of mcf.data.faces."""

    out: str = Field(description="folder to write: images/, masks/ and landmarks.csv")
    count: Positive = Field(600, description="number of faces")
    size: int = Field(256, ge=64, le=1024, description="side of a picture, pixels")
    seed: NonNegative = Field(0, description="which world the people are from")
    images_per_person: Positive = Field(4, description="pictures of each person")
    quality: int = Field(92, ge=1, le=100, description="quality of the JPEGs")
    workers: NonNegative = Field(0, description="processes; 0: one a core")


@cli.main
def main(argv: list[str]) -> int:
    """The verb."""
    config = cli.parse(FacesConfig, argv, verb="data.faces")
    out = Path(config.out)
    settings = Settings(config.seed, config.size, config.quality, config.images_per_person)
    done = write_faces(out, config.count, settings, config.workers or _cores())
    start = time.monotonic()
    columns = (TextColumn("faces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("faces", total=config.count)
        for number in done:
            bar.update(task, completed=number)
    seconds = time.monotonic() - start
    print(f"{out}: {config.count:,} faces with masks and landmarks.csv, {config.count / seconds:.0f} a second")
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    raise SystemExit(main(None))
