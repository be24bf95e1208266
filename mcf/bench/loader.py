"""How fast the loader alone is, beside the plain loops one would write instead.

    loader          mcf.data.loader, nothing else running
    beside a step   the same while a pretended training step takes its images at `train_rate`: how long that waits
    DALI            DALI and torch over JPEGs that lie in memory: decode, mirror, resize; no order, no files, no thread ahead
    Pillow          decode and resize of the same JPEGs in as many threads
    with rivals     DALI's webdataset reader, webdataset and loose files in torch's DataLoader (mcf.bench.rivals)

`threads=[1,2] prefetch=[1,3]` gives a row of the loader for each pair; the other rows have the most threads of these.

The rows take turns, several rounds each, so that a busy machine is busy for all of them; images per second of CPU time
hardly depend on its neighbours. A row begins when what the one before has left to do is done, and what lies ready is taken
before its clock runs. Before the timing, the loader's pictures are held against Pillow's.
"""

from __future__ import annotations

import io
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from mcf import cli
from mcf.bench.files import JsonFile, save
from mcf.bench.meter import machine_name, memory, rate, settle, spread
from mcf.bench.rivals import rivals
from mcf.config import DataConfig, Positive, Section
from mcf.data.dali import Decoder, Undecodable
from mcf.data.loader import Batch, Loader
from mcf.data.reader import Reader
from mcf.data.shards import load_manifest
from mcf.errors import UserError


class LoaderBench(Section):
    """Keys of `python -m mcf.bench part=loader`."""

    data: str = Field(description="folder that mcf.pack wrote")
    batch: Positive = Field(256, description="effective batch")
    micro_batch: Positive = Field(64, description="images decoded at once")
    image_size: Positive = Field(224, description="side of the square pictures, pixels")
    streams: Positive = Field(64, description="logical streams; divides batch")
    window: Positive = Field(256, description="samples a stream reads at once")
    threads: Positive | list[Positive] | None = Field(
        None, description="decoder threads; default: the cores this process may run on"
    )
    decoder: Literal["auto", "mixed", "cpu"] = Field("auto", description="DALI's decoder")
    train_rate: float = Field(1000.0, gt=0, description="images/s of the pretended training step")
    rounds: Positive = Field(5, description="rounds of each row")
    seconds: float = Field(2.0, gt=0, description="length of a round, seconds")
    prefetch: Positive | list[Positive] = Field(3, description="micro-batches decoded ahead")
    rivals: bool = Field(False, description="also time DALI's webdataset reader, webdataset and loose files in torch")
    json_file: JsonFile | None = Field(None, description="file that also gets the numbers")


@cli.main
def main(argv: list[str]) -> int:
    """Measure, print a table, and write the numbers as JSON."""
    config = cli.parse(LoaderBench, argv, verb="bench part=loader")
    report = measure(config)
    print(table(report))
    print(json.dumps(report))
    save(config.json_file, report)
    return 0


@dataclass
class Row:
    """A way of making pictures: an endless loop that yields how many it made, and what was measured of it.

    ahead: batches that it may have ready before the clock runs. memory: bytes by which the process and its workers have
    grown for it, or None.
    """

    name: str
    counts: Iterator[int]
    ahead: int = 0
    memory: int | None = None
    waited: list[float] = field(default_factory=list)  # shares of the time
    rate: list[float] = field(default_factory=list)  # images/s
    cpu_rate: list[float] = field(default_factory=list)  # images per second of CPU time


def measure(config: LoaderBench) -> dict[str, Any]:
    """All numbers: rows of rates, what a bad image costs, memory, and what they were measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaders = _loaders(config, device)
    loader = loaders[-1]  # the one with the most threads and the deepest queue stands beside the others
    size, batch, threads = config.image_size, config.micro_batch, loader.threads
    jpegs = _some_jpegs(loader)
    decoder = Decoder(size, batch, device=device, decoder=config.decoder, threads=threads)
    error = _against_pillow(decoder, jpegs[:batch])

    began = time.perf_counter()
    next(iter(loader))
    first = time.perf_counter() - began
    loader.close()
    rows = []
    for each in loaders:
        name = f"loader, {each.threads} threads, {each.data.prefetch} ahead" if len(loaders) > 1 else "loader"
        # What the queue holds, what is in DALI, and what the thread holds.
        rows.append(_made(name, lambda waited, each=each: _loader(each, iter(each), waited), each.data.prefetch + 2))  # type: ignore[misc]
    slow = _loaders(config, device)[-1]
    rows += [
        _made("beside a step", lambda waited: _loader(slow, iter(slow), waited, config.train_rate), rows[-1].ahead),
        Row("DALI", _plain_dali(decoder, jpegs)),
        Row("Pillow", _pillow(jpegs, size, threads)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        if config.rivals:
            ways = rivals(loader.manifest, Path(folder), batch=batch, side=size, threads=threads, device=device)
            rows += [_made(name, lambda _, make=make: make(), 4 * threads) for name, make in ways.items()]  # type: ignore[misc]
        for _ in range(config.rounds):
            for row in rows:
                settle()
                images, per_cpu = rate(row.counts, config.seconds, row.ahead)
                row.rate.append(images)
                row.cpu_rate.append(per_cpu)
    for each in (*loaders, slow):
        each.close()
    ours = rows[len(loaders) - 1]
    return {
        "rows": [
            {
                "name": row.name,
                "images_per_s": spread(row.rate),
                "images_per_cpu_s": spread(row.cpu_rate),
                "cores": float(np.median([rate / cpu_rate for rate, cpu_rate in zip(row.rate, row.cpu_rate)])),
                "wait_share": float(np.mean(row.waited)) if row.waited else None,
                "memory_gb": row.memory / 1e9 if row.memory is not None else None,
                "loader_is": _ratio(ours.rate, row.rate),
                "loader_is_per_cpu": _ratio(ours.cpu_rate, row.cpu_rate),
            }
            for row in rows
        ],
        "first_batch_s": first,
        "bad_image_s": _cost_of_a_bad_image(decoder, jpegs[:batch]),
        "error_against_pillow": error,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "jpeg_bytes": float(np.mean([len(jpeg) for jpeg in jpegs])),
        "machine": _machine(device, threads),
        "config": config.model_dump(),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = report["rows"]
    width = max(len(row["name"]) for row in rows)
    head = f"{'images/s':>9} {'p20':>7} {'p80':>7} {'images/CPU s':>13} {'cores':>6} {'waits':>7} {'GB':>6}"
    lines = [f"{'':{width}} {head} {'loader is':>10} {'per CPU s':>10}"]
    for row in rows:
        wait = "" if row["wait_share"] is None else f"{row['wait_share']:.1%}"
        memory = "" if row["memory_gb"] is None else f"{row['memory_gb']:.2f}"
        p20, p50, p80 = row["images_per_s"]
        lines.append(
            f"{row['name']:{width}} {p50:9.0f} {p20:7.0f} {p80:7.0f} {row['images_per_cpu_s'][1]:13.0f} "
            f"{row['cores']:6.2f} {wait:>7} {memory:>6} {row['loader_is']:10.2f} {row['loader_is_per_cpu']:10.2f}"
        )
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines += [
        f"first batch {report['first_batch_s']:.2f} s; a bad image costs {report['bad_image_s'] * 1e3:.0f} ms once; "
        f"peak memory {report['peak_memory_gb']:.2f} GB; JPEGs of {report['jpeg_bytes'] / 1e3:.1f} kB; "
        f"pictures differ from Pillow's by {report['error_against_pillow']} of 255 at most",
        machine,
    ]
    return "\n".join(lines)


def _loaders(config: LoaderBench, device: torch.device) -> list[Loader]:
    """One for each pair of threads and prefetch, the largest last."""
    threads = config.threads if isinstance(config.threads, list) else [config.threads]
    prefetch = config.prefetch if isinstance(config.prefetch, list) else [config.prefetch]
    manifest = load_manifest(config.data, key="data")
    _refuse_misfits(config, manifest.samples)
    return [
        Loader(
            DataConfig(
                path=config.data, streams=config.streams, window=config.window, threads=t, decoder=config.decoder, prefetch=p
            ),
            batch=config.batch, micro_batch=config.micro_batch, seed=0, image_size=config.image_size, rank=0, world_size=1,
            device=device, manifest=manifest,
        )
        for t in sorted(threads, key=lambda t: t or 0)
        for p in sorted(prefetch)
    ]  # fmt: skip


def _refuse_misfits(config: LoaderBench, samples: int) -> None:
    """Batch, streams and micro-batch that do not fit each other or the data, by the names that this verb has for them."""
    batch = config.batch if config.batch <= samples else 1 << max(samples, 1).bit_length() - 1
    fits = {
        "batch": batch,
        "streams": max(n for n in range(1, min(config.streams, batch) + 1) if batch % n == 0),
        "micro_batch": max(n for n in range(1, min(config.micro_batch, batch) + 1) if batch % n == 0),
    }
    wrong = [name for name, value in fits.items() if value != getattr(config, name)]
    if wrong:
        raise UserError(
            f"batch={config.batch} streams={config.streams} micro_batch={config.micro_batch}: streams and micro_batch divide "
            f"the batch, and the data has {samples} images; use {' '.join(f'{name}={fits[name]}' for name in wrong)}"
        )


def _made(name: str, make: Callable[[list[float]], Iterator[int]], ahead: int) -> Row:
    """A row whose loop has begun, and has all ready that it makes ahead: so it is seen what memory that takes."""
    waited: list[float] = []
    before = memory()
    counts = make(waited)
    for _ in range(ahead + 1):
        next(counts)
    settle()
    row = Row(name, counts, ahead, max(0, memory() - before), waited)
    waited.clear()
    return row


def _ratio(ours: list[float], others: list[float]) -> float:
    """How many times as fast the loader is: the median over rounds, whose parts are near in time."""
    return round(float(np.median([a / b for a, b in zip(ours, others)])), 3)


def _loader(
    loader: Loader, batches: Iterator[Batch], waited: list[float], train_rate: float | None = None
) -> Iterator[int]:
    while True:
        began = time.perf_counter()
        count = len(next(batches).keys)
        if train_rate:
            time.sleep(count / train_rate)
        waited.append(loader.wait / (time.perf_counter() - began))
        yield count


def _plain_dali(decoder: Decoder, jpegs: list[np.ndarray]) -> Iterator[int]:
    mirror = np.arange(decoder.batch) % 2 == 0
    while True:
        for first in range(0, len(jpegs) - decoder.batch + 1, decoder.batch):
            decoder.decode(jpegs[first : first + decoder.batch], mirror)
            yield decoder.batch


def _pillow(jpegs: list[np.ndarray], side: int, threads: int) -> Iterator[int]:
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for first in range(0, len(jpegs), 64):
                yield len(list(pool.map(lambda jpeg: _open(jpeg, side), jpegs[first : first + 64])))


def _open(jpeg: np.ndarray, side: int) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _some_jpegs(loader: Loader, batches: int = 8) -> list[np.ndarray]:
    reader = Reader(loader.manifest, loader.order, rank=0, world_size=1, ahead=0)
    try:
        samples = reader.take(min(batches * loader.micro_batch, loader.order.samples_per_epoch))
    finally:
        reader.close()
    return [sample.stored.jpeg for sample in samples if sample.stored.jpeg is not None]


def _against_pillow(decoder: Decoder, jpegs: list[np.ndarray]) -> int:
    """The largest difference of a pixel; a loader that is wrong is not timed."""
    images = decoder.decode(jpegs, np.zeros(len(jpegs), dtype=bool)).cpu().numpy().astype(int)
    error = int(np.abs(images - np.stack([_open(jpeg, decoder.image_size) for jpeg in jpegs])).max())
    limit = 3 if decoder.device.type == "cpu" else 32  # nvJPEG's arithmetic is its own
    if error > limit:
        raise UserError(f"the loader's pictures differ from Pillow's by {error} of 255, over {limit}: not timed")
    return error


def _cost_of_a_bad_image(decoder: Decoder, jpegs: list[np.ndarray]) -> float:
    """Seconds from a micro-batch with one truncated JPEG to knowing which it is, and having a new pipeline."""
    broken = [*jpegs]
    broken[len(broken) // 2] = broken[len(broken) // 2][: len(broken[len(broken) // 2]) // 2]
    mirror, times = np.zeros(len(jpegs), dtype=bool), []
    for _ in range(3):
        began = time.perf_counter()
        try:
            decoder.decode(broken, mirror)
        except Undecodable:
            times.append(time.perf_counter() - began)
    return float(np.median(times)) if times else 0.0


def _machine(device: torch.device, threads: int) -> dict[str, Any]:
    try:
        dali = version("nvidia-dali-cuda130")
    except PackageNotFoundError:
        dali = "?"
    return {"device": machine_name(device), "threads": threads, "DALI": dali, "torch": torch.__version__}


if __name__ == "__main__":
    raise SystemExit(main(None))
