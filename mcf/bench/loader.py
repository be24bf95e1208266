"""How fast the loader alone is, beside the plain loops one would write instead.

    loader          mcf.data.loader, nothing else running
    beside a step   the same while a pretended training step takes its images at `train_rate`: how long that waits
    DALI            DALI and torch over JPEGs that lie in memory: decode, mirror, resize; no order, no files, no thread ahead
    Pillow          decode and resize of the same JPEGs in as many threads
    with rivals     DALI's webdataset reader, webdataset and loose files in torch's DataLoader (mcf.bench.rivals)

The rows take turns, several rounds each, so that a busy machine is busy for all of them; images per second of CPU time
hardly depend on its neighbours. Before the timing, the loader's pictures are held against Pillow's.
"""

from __future__ import annotations

import io
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from pydantic import Field

from mcf import cli
from mcf.bench.rivals import rivals
from mcf.config import DataConfig, Positive, Section
from mcf.data.dali import Decoder, Undecodable
from mcf.data.loader import Loader
from mcf.data.reader import Reader
from mcf.errors import UserError


class LoaderBench(Section):
    """Keys of `python -m mcf.bench part=loader`."""

    data: str = Field(description="folder that mcf.pack wrote")
    batch: Positive = Field(256, description="effective batch")
    micro_batch: Positive = Field(64, description="images decoded at once")
    image_size: Positive = Field(224, description="side of the square pictures, pixels")
    streams: Positive = Field(64, description="logical streams; divides batch")
    window: Positive = Field(256, description="samples a stream reads at once")
    threads: Positive | None = Field(None, description="decoder threads; default: the cores this process may run on")
    decoder: Literal["auto", "mixed", "cpu"] = Field("auto", description="DALI's decoder")
    train_rate: float = Field(1000.0, gt=0, description="images/s of the pretended training step")
    rounds: Positive = Field(5, description="rounds of each row")
    seconds: float = Field(2.0, gt=0, description="length of a round, seconds")
    prefetch: Positive = Field(3, description="micro-batches decoded ahead")
    rivals: bool = Field(False, description="also time DALI's webdataset reader, webdataset and loose files in torch")
    json_file: str | None = Field(None, description="file that also gets the numbers")


@cli.main
def main(argv: list[str]) -> int:
    """Measure, print a table, and write the numbers as JSON."""
    config = cli.parse(LoaderBench, argv, verb="bench part=loader")
    report = measure(config)
    print(table(report))
    text = json.dumps(report)
    print(text)
    if config.json_file:
        Path(config.json_file).write_text(text + "\n")
    return 0


def measure(config: LoaderBench) -> dict[str, Any]:
    """All numbers: rows of rates, what a bad image costs, memory, and what they were measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = DataConfig(
        path=config.data,
        streams=config.streams,
        window=config.window,
        threads=config.threads,
        decoder=config.decoder,
        prefetch=config.prefetch,
    )
    loader = Loader(
        data,
        batch=config.batch,
        micro_batch=config.micro_batch,
        seed=0,
        image_size=config.image_size,
        rank=0,
        world_size=1,
        device=device,
    )
    jpegs = _some_jpegs(loader)
    decoder = Decoder(
        config.image_size, config.micro_batch, device=device, decoder=config.decoder, threads=loader.threads
    )
    error = _against_pillow(decoder, jpegs[: config.micro_batch])

    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - began
    waited: dict[str, list[float]] = {"loader": [], "beside a step": []}
    rows: dict[str, Callable[[], Iterator[int]]] = {
        "loader": lambda: _loader(loader, batches, waited["loader"]),
        "beside a step": lambda: _loader(loader, batches, waited["beside a step"], config.train_rate),
        "DALI": lambda: _plain_dali(decoder, jpegs),
        "Pillow": lambda: _pillow(jpegs, config.image_size, loader.threads),
    }
    with tempfile.TemporaryDirectory() as folder:
        if config.rivals:
            sizes = {"batch": config.micro_batch, "side": config.image_size, "threads": loader.threads}
            rows |= rivals(loader.manifest, Path(folder), device=device, **sizes)
        wall: dict[str, list[float]] = {name: [] for name in rows}
        cpu: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(config.rounds):
            for name, run in rows.items():
                # What rivals' processes have made ahead while others were timed is taken before the clock runs.
                ahead = data.prefetch if name in waited else 4 * loader.threads if name not in ("DALI", "Pillow") else 0
                rate, per_cpu = _rate(run(), config.seconds, ahead)
                wall[name].append(rate)
                cpu[name].append(per_cpu)
    loader.close()
    return {
        "rows": [
            {
                "name": name,
                "images_per_s": _spread(wall[name]),
                "images_per_cpu_s": _spread(cpu[name]),
                "wait_share": float(np.mean(waited[name])) if waited.get(name) else None,
            }
            for name in rows
        ],
        "first_batch_s": first,
        "bad_image_s": _cost_of_a_bad_image(decoder, jpegs[: config.micro_batch]),
        "error_against_pillow": error,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "jpeg_bytes": float(np.mean([len(jpeg) for jpeg in jpegs])),
        "machine": _machine(device, loader.threads),
        "config": config.model_dump(),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'':19} {'images/s':>9} {'p20':>7} {'p80':>7} {'images/CPU s':>13} {'waits':>7}"]
    for row in report["rows"]:
        wait = "" if row["wait_share"] is None else f"{row['wait_share']:.1%}"
        p20, p50, p80 = row["images_per_s"]
        lines.append(f"{row['name']:19} {p50:9.0f} {p20:7.0f} {p80:7.0f} {row['images_per_cpu_s'][1]:13.0f} {wait:>7}")
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines += [
        f"first batch {report['first_batch_s']:.2f} s; a bad image costs {report['bad_image_s'] * 1e3:.0f} ms once; "
        f"peak memory {report['peak_memory_gb']:.2f} GB; JPEGs of {report['jpeg_bytes'] / 1e3:.1f} kB; "
        f"pictures differ from Pillow's by {report['error_against_pillow']} of 255 at most",
        machine,
    ]
    return "\n".join(lines)


def _rate(counts: Iterator[int], seconds: float, ahead: int) -> tuple[float, float]:
    """Images per second, and per second of CPU time (worker processes included), of a loop that yields how many it made.

    ahead: batches that may lie ready from before; they are taken before the clock runs.
    """
    for _ in range(ahead + 1):
        next(counts)
    began, cpu_began, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() < began + seconds:
        images += next(counts)
    now = time.perf_counter()
    return images / (now - began), images / max(_cpu_seconds() - cpu_began, 1e-9)


def _cpu_seconds() -> float:
    """CPU time of this process and of the worker processes that live now."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in times)


def _loader(loader: Loader, batches, waited: list[float], train_rate: float | None = None) -> Iterator[int]:
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


def _spread(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return [round(float(v), 1) for v in np.percentile(values, [20, 50, 80])]


def _machine(device: torch.device, threads: int) -> dict[str, Any]:
    try:
        dali = version("nvidia-dali-cuda130")
    except PackageNotFoundError:
        dali = "?"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": threads, "DALI": dali, "torch": torch.__version__}


if __name__ == "__main__":
    raise SystemExit(main(None))
