"""How fast packing cuts faces out of tars, beside a straightforward loop with Pillow.

    mcf          what `mcf.pack` does with a tar: read, join, cut, encode, write, decode all that was written once
    Pillow loop  tarfile, json, a dictionary of boxes, Image.open → crop → resize (Lanczos) → save, tarfile; no limits, no
                 checks, nothing of it decoded again

Both by one process; then mcf on 1 and on 2 processes, for how it scales. The rows take turns. Images per second of CPU
time hardly depend on what else the machine does: compare those.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import resource
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from mcf import cli
from mcf.config import Positive, Section
from mcf.errors import UserError
from mcf.pack import detections, inputs
from mcf.pack.crops import around
from mcf.pack.faces import Face, select
from mcf.pack.inputs import Unit
from mcf.pack.options import PackConfig
from mcf.pack.parts import Packer
from mcf.pack.source import Folder


class PackBench(Section):
    """Keys of `python -m mcf.bench part=pack`."""

    source: str = Field(description="folder of LAION-Face's tars")
    detections: str = Field(description="folder of its sample2detect_*.pth")
    size: Positive = Field(256, description="side of the crops, pixels")
    tars: Positive = Field(4, description="tars that are packed in a round")
    rounds: Positive = Field(3, description="rounds of each row")


@cli.main
def main(argv: list[str]) -> int:
    """Measure and print a table."""
    config = cli.parse(PackBench, argv, verb="bench part=pack")
    options = PackConfig(source=config.source, detections=config.detections, size=config.size)
    units = inputs.survey(list(Folder(config.source).walk()), options).units[: config.tars]
    if not units or units[0].path is None:
        raise UserError(f"source={config.source}: no tars in it; give a folder that mcf.pack takes with detections=")
    folders = detections.converted(Path(config.detections), None)
    tables = detections.Tables(folders)
    with tempfile.TemporaryDirectory() as scratch:
        packer = Packer(options, Path(scratch), folders)
        images = sum(_with_mcf(packer, unit) for unit in units)  # a first time, for caches and codecs
        cpu: dict[str, list[float]] = {"mcf": [], "Pillow loop": []}
        for _ in range(config.rounds):
            for name in cpu:
                began = time.process_time()
                for unit in units:
                    _with_mcf(packer, unit) if name == "mcf" else _with_pillow(unit, tables, options, Path(scratch))
                cpu[name].append(images / (time.process_time() - began))
        print(f"{images} images of {len(units)} tars, {config.rounds} rounds; images/CPU s, median")
        for name, rates in cpu.items():
            print(f"  {name:12} {np.median(rates):8.0f}   ({', '.join(f'{rate:.0f}' for rate in rates)})")
        ratios = [ours / loop for ours, loop in zip(*cpu.values())]
        print(f"  ratio        {np.median(ratios):8.2f}   ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        walls = {
            workers: [_wall(options, Path(scratch), folders, units, workers) for _ in range(2)] for workers in (1, 2)
        }
    best = {workers: images / min(seconds) for workers, seconds in walls.items()}
    print(f"images/s on 1 process {best[1]:.0f}, on 2 processes {best[2]:.0f}: {best[2] / best[1]:.2f} times")
    print(f"peak memory of a process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    return 0


def _with_mcf(packer: Packer, unit: Unit) -> int:
    return packer(unit, (), lambda kind, value: None).found


def _with_pillow(unit: Unit, tables: detections.Tables, options: PackConfig, scratch: Path) -> None:
    """The loop that one would write."""
    assert unit.path is not None and options.size is not None
    with tarfile.open(unit.path) as tar, tarfile.open(scratch / "loop.tar", "w") as out:
        content = b""
        for member in tar:
            if member.name.endswith(".jpg"):
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
            elif member.name.endswith(".json"):
                facts = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                (faces,) = tables.look_up([facts["SAMPLE_ID"]])
                with Image.open(io.BytesIO(content)) as opened:
                    image = opened.convert("RGB")
                for number, face in select(faces or [], *image.size, options)[0]:
                    _save(out, f"{member.name[:-5]}-{number}", _cut(image, face, options, options.size), facts)


def _cut(image: Image.Image, face: Face, options: PackConfig, size: int) -> bytes:
    view = around(face, *image.size, size, options.margin)
    stream = io.BytesIO()
    image.crop(view.box).resize((size, size), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=options.quality)  # type: ignore[arg-type]
    return stream.getvalue()


def _save(out: tarfile.TarFile, key: str, jpeg: bytes, facts: dict) -> None:
    for name, body in ((f"{key}.jpg", jpeg), (f"{key}.json", json.dumps(facts).encode())):
        info = tarfile.TarInfo(name)
        info.size = len(body)
        out.addfile(info, io.BytesIO(body))


def _wall(options: PackConfig, scratch: Path, folders: list[Path], units: tuple[Unit, ...], workers: int) -> float:
    """Seconds of so many processes for all units, from when all stand ready until the last is done."""
    context = multiprocessing.get_context("spawn")
    ready, go, done = context.Barrier(workers + 1), context.Event(), context.Barrier(workers + 1)
    processes = [
        context.Process(
            target=_share, args=(options, scratch / f"{workers}-{i}", folders, units[i::workers], ready, go, done)
        )
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    go.set()
    done.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return seconds


def _share(options: PackConfig, scratch: Path, folders: list[Path], units: tuple[Unit, ...], ready, go, done) -> None:
    packer = Packer(options, scratch, folders)
    _with_mcf(packer, units[0])
    ready.wait()
    go.wait()
    for unit in units:
        _with_mcf(packer, unit)
    done.wait()


if __name__ == "__main__":
    raise SystemExit(main(None))
