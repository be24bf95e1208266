"""A run small enough for tests, through the real parts: shards of drawn pictures, a recipe of seconds, processes.

Imported by the tests of training; nothing here asserts anything.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from mcf.data.shards import Manifest, ShardWriter, write_manifest

SIZE = 32


def jpeg(seed: int, size: int = SIZE) -> bytes:
    """A JPEG of a smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def shards(folder: Path, samples: int = 120, per_shard: int = 45, bad: dict[int, bytes] | None = None) -> Manifest:
    """Write shards of `samples` pictures; `bad` puts other bytes in the place of some."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for first in range(0, samples, per_shard):
        with ShardWriter(folder / f"shard-{first // per_shard:05d}.tar") as writer:
            for i in range(first, min(samples, first + per_shard)):
                writer.add(f"{i:06d}", (bad or {}).get(i, jpeg(i)))
            written.append(writer.close())
    return write_manifest(folder, written, {})


def recipe(run_dir: Path, data: Path, ranks: int = 1, **overrides) -> dict:
    """A recipe as plain values: 16 patches, widths of 32, effective batch 8 in two micro-batches on one rank."""
    values = {
        "name": run_dir.name,
        "output": str(run_dir.parent),
        "seed": 3,
        "batch": 8,
        "micro_batch": 4,
        "gpus_per_node": ranks,
        "model": {
            "image_size": SIZE,
            "patch_size": 8,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "decoder": {"width": 32, "depth": 1, "heads": 2},
            "projection": {"hidden": 48, "dim": 16},
        },
        "teacher": {"source": "random", "width": 32, "depth": 2, "heads": 2, "patch_size": 8, "taps": [0, 1]},
        "data": {"path": str(data), "streams": 4, "window": 8, "threads": 1},
        "optimizer": {"blr": 0.02, "warmup_epochs": 0.3},
        "train": {"steps": 20, "precision": "fp32", "log_every": 1, "threads": 1},
        "checkpoint": {"every": 4, "keep": 2},
        "track": {"mlflow": "off", "images_every": 0},
    }
    values["teacher"]["allow_random"] = True
    for dotted, value in overrides.items():
        *path, last = dotted.split("__")
        section = values
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return values


def write_recipe(run_dir: Path, values: dict) -> Path:
    """RUN/recipe.yaml, as mcf.launch leaves it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(values))
    return run_dir


def start(run_dir: Path, ranks: int = 1, logs: Path | None = None) -> list[subprocess.Popen]:
    """Start the ranks of a run as mcf.launch does; their output goes to rank-R.log in RUN, or in `logs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with ((logs or run_dir) / f"rank-{rank}.log").open("a") as log:
            processes.append(
                subprocess.Popen([sys.executable, "-m", "mcf.train", f"run={run_dir}"], env=env, stdout=log, stderr=log)
            )
    return processes


def run(run_dir: Path, ranks: int = 1, timeout: float = 240, logs: Path | None = None) -> int:
    """Run to the end; the highest exit status of the ranks."""
    processes = start(run_dir, ranks, logs)
    try:
        return max(p.wait(timeout) for p in processes)
    finally:
        for process in processes:
            process.kill()


def said(run_dir: Path, rank: int = 0) -> str:
    """What a rank printed."""
    return (run_dir / f"rank-{rank}.log").read_text()
