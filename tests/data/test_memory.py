"""Memory: flat over 200,000 images, and at the start no more for 20 million samples than for a few.

In processes of their own: what the tests before have left in the heap would hide growth.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import itertools, json, sys, psutil
from mcf.config import DataConfig
from mcf.data.loader import Loader
folder, marks, batch = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
process, found, seen = psutil.Process(), [], 0
data = DataConfig(path=folder, streams=batch // 8, window=256, threads=1)
loader = Loader(data, batch=batch, micro_batch=64, seed=0, image_size=32, rank=0, world_size=1, device="cpu")
for batch in loader:
    seen += len(batch.keys)
    while marks and seen >= marks[0]:
        marks.pop(0)
        found.append(process.memory_info().rss)
    if not marks:
        break
loader.close()
print(json.dumps(found))
"""


def resident(folder: Path, marks: list[int], batch: int = 512) -> list[int]:
    """RSS in bytes of a process that reads, after so many images each."""
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(marks), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_200_000_images_leave_nothing_behind(shards):
    """Every 20,000 images; the first two are warm-up. 8 bytes kept an image would be 1.3 MB, 100 bytes 16 MB."""
    folder = shards(*[700] * 8, meta=False)
    sizes = resident(folder, list(range(20_000, 200_001, 20_000)))
    early, late = sizes[2], sizes[-1]
    # The allocator's pages come and go by a few MB with which windows happen to be open.
    assert late - early < 12e6, [round(size / 1e6, 1) for size in sizes]


def test_twenty_million_samples_begin_in_the_memory_of_a_few(twenty_millions, shards):
    few = resident(shards(*[700] * 8, meta=False), [64])[0]
    many = resident(twenty_millions, [64], batch=4096)[0]
    # 16 bytes a sample would be 320 MB. What differs is the manifest of 2,000 shards, and windows of 512 streams
    # (256 JPEGs of 1 kB each) where the few have 64.
    assert many - few < 320e6, (few, many)
    print(f"{few / 1e6:.0f} MB, {many / 1e6:.0f} MB")
