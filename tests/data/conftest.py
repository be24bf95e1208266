"""Small folders of shards with real JPEGs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tiny.py

from data_shards import make_jpeg

from mcf.data.shards import Shard, ShardWriter, index_path, write_manifest


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of shards with the given numbers of samples; keys are s<shard>r<row>."""

    def make(*counts: int, size: tuple[int, int] = (40, 40), meta: bool = True) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        written = []
        for shard, count in enumerate(counts):
            with ShardWriter(folder / f"shard-{shard:05d}.tar") as writer:
                for row in range(count):
                    jpeg = make_jpeg(shard * 1000 + row, size)
                    writer.add(f"s{shard}r{row}", jpeg, {"row": row} if meta else None)
                written.append(writer.close())
        write_manifest(folder, written, {})
        return folder

    return make


@pytest.fixture
def twenty_millions(tmp_path):
    """A folder of 2,000 shards of 10,000 samples each. One tar is written; the others are further names of it."""
    folder = tmp_path / "twenty"
    folder.mkdir()
    jpegs = [make_jpeg(number) for number in range(8)]
    with ShardWriter(folder / "shard-00000.tar") as writer:
        for row in range(10_000):
            writer.add(f"r{row}", jpegs[row % 8])
        first = writer.close()
    for number in range(1, 2000):
        tar = folder / f"shard-{number:05d}.tar"
        tar.hardlink_to(folder / first.name)
        index_path(tar).hardlink_to(index_path(folder / first.name))
    shards = [Shard(f"shard-{number:05d}.tar", 10_000, first.bytes, first.sha256) for number in range(2000)]
    write_manifest(folder, shards, {})
    return folder
