"""Small folders of shards with real JPEGs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tiny.py

from data_shards import make_jpeg

from mcf.data.shards import ShardWriter, write_manifest


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
