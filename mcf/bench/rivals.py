"""The other ways of reading the same shards, as one would write them: what the loader is measured beside.

    DALI webdataset      DALI's own reader with its shuffle buffer, decoder, mirror, resize: all of it in DALI
    webdataset, Pillow   the webdataset package in torch's DataLoader, Pillow in its worker processes
    loose files, Pillow  the JPEGs as single files, torch's DataLoader with a random sampler, Pillow

None of them can be resumed at a sample, keeps its order on other ranks, or survives a bad JPEG; they do the same work on
the pictures: decode, mirror half of them, resize to a square, uint8 [b, H, W, 3].
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from mcf.data.dali import import_dali
from mcf.data.shards import Manifest

_SHUFFLE = 1024  # pictures in a shuffle buffer


def rivals(
    manifest: Manifest, folder: Path, *, batch: int, side: int, threads: int, device: torch.device
) -> dict[str, Callable[[], Iterator[int]]]:
    """What begins endless loops that yield how many pictures they made, by name; without those that are not installed.

    folder: an empty one that loose files and DALI's indices are written to.
    """
    found: dict[str, Callable[[], Iterator[int]]] = {}
    sizes = {"batch": batch, "side": side, "threads": threads}
    found["DALI webdataset"] = lambda: _dali(manifest, folder, device=device, **sizes)
    if find_spec("webdataset"):
        found["webdataset, Pillow"] = lambda: _webdataset(manifest, **sizes)
    found["loose files, Pillow"] = lambda: _loose(manifest, folder, **sizes)
    return found


def _dali(
    manifest: Manifest, folder: Path, *, batch: int, side: int, threads: int, device: torch.device
) -> Iterator[int]:
    fn, types, pipeline, _ = import_dali()
    tars = [str(manifest.path / shard.name) for shard in manifest.shards]
    indices = [str(_wds_index(manifest, shard, folder)) for shard in range(len(tars))]
    on_gpu = device.type == "cuda"
    pipe = pipeline(
        batch_size=batch, num_threads=threads, device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=2
    )
    with pipe:
        jpegs = fn.readers.webdataset(
            paths=tars, index_paths=indices, ext=["jpg"], random_shuffle=True, initial_fill=_SHUFFLE, name="reader"
        )
        images = fn.decoders.image(jpegs, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        images = fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5))
        if not _all_of_size(manifest, side):
            images = fn.resize(images, resize_x=side, resize_y=side, interp_type=types.INTERP_LINEAR, antialias=True)
        pipe.set_outputs(images)
    pipe.build()
    while True:
        (images,) = pipe.run()
        if not on_gpu:
            images.as_array()  # one block of memory, as a training step takes it
        yield len(images)


def _all_of_size(manifest: Manifest, side: int) -> bool:
    """Whether packing made squares of that side: then nobody has to resize."""
    settings = manifest.meta.get("pack", {})
    return settings.get("crop") not in (None, "none") and settings.get("size") == side


def _wds_index(manifest: Manifest, shard: int, folder: Path) -> Path:
    """The index that DALI wants beside a tar, from ours."""
    path = folder / f"{shard:05d}.idx"
    rows = manifest.index(shard)
    lines = [f"v1.2 {len(rows)}"]
    lines += [f"jpg {offset} {size} {key.decode()}.jpg" for offset, size, key in rows.tolist()]
    path.write_text("\n".join(lines) + "\n")
    return path


def _webdataset(manifest: Manifest, *, batch: int, side: int, threads: int) -> Iterator[int]:
    import webdataset

    tars = [str(manifest.path / shard.name) for shard in manifest.shards]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(_SHUFFLE).map(_Opened(side))
    loader = DataLoader(
        data.batched(batch, partial=False),
        batch_size=None, num_workers=threads, prefetch_factor=4, persistent_workers=True,
    )  # fmt: skip
    return _endless(loader)


def _loose(manifest: Manifest, folder: Path, *, batch: int, side: int, threads: int) -> Iterator[int]:
    files = []
    for shard in range(len(manifest.shards)):
        content = (manifest.path / manifest.shards[shard].name).read_bytes()
        for offset, size, key in manifest.index(shard).tolist():
            files.append(folder / f"{key.decode()}.jpg")
            files[-1].write_bytes(content[offset : offset + size])
    loader = DataLoader(
        _Files(files, side), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=threads, prefetch_factor=4, persistent_workers=True,
    )  # fmt: skip
    return _endless(loader)


def _endless(loader: DataLoader) -> Iterator[int]:
    while True:
        for images in loader:
            yield len(images[0]) if isinstance(images, (list, tuple)) else len(images)


class _Opened:
    """A sample of webdataset → picture; a class, so that worker processes can be given it."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, sample: dict[str, Any]) -> tuple[np.ndarray]:
        return (opened(sample["jpg"], self.side),)


class _Files(Dataset):
    """Loose JPEGs."""

    def __init__(self, files: list[Path], side: int):
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> np.ndarray:
        return opened(self.files[number].read_bytes(), self.side)


def opened(jpeg: bytes, side: int) -> np.ndarray:
    """Decode, mirror half of them, resize, with Pillow."""
    with Image.open(io.BytesIO(jpeg)) as image:
        picture = image.convert("RGB")
    if random.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    return np.array(picture)  # torch wants to be able to write to it
