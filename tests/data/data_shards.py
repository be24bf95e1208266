"""Makes and damages small JPEGs and shards for the tests of the data's way."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def make_jpeg(number: int, size: tuple[int, int] = (40, 40)) -> bytes:
    """A smooth colour picture (width, height) that no other number gives, and that its mirror image differs from."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def damage(folder: Path, shard: int, row: int, content: bytes | Callable[[bytes], bytes]) -> None:
    """Overwrite the bytes of a sample inside its tar, from the start of its JPEG; the length of the file stays."""
    tar = folder / f"shard-{shard:05d}.tar"
    index = np.load(tar.with_name(f"shard-{shard:05d}.index.npy"))
    offset, size = int(index["offset"][row]), int(index["size"][row])
    with tar.open("r+b") as file:
        file.seek(offset)
        old = file.read(size)
        new = content(old) if callable(content) else content
        assert len(new) <= size
        file.seek(offset)
        file.write(new)
