"""Pictures for the tests of packing: smooth, so that JPEG changes them little, and unlike under any turn."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture whose four corners and two axes all differ: any flip or turn moves its mean by tens of levels."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / width, y / height
    red = 40 + 180 * x
    green = 30 + 190 * y * y
    blue = 60 + 120 * x * (1 - y) + 8 * np.sin(7 * x + seed)
    return Image.fromarray(np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    if form == "JPEG":
        options = {"quality": 95} | options
    image.save(stream, form, **options)
    return stream.getvalue()


def decode(content: bytes) -> np.ndarray:
    """int32 [H, W, 3]."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int32)


def distance(found: np.ndarray, wanted: Image.Image) -> float:
    """Mean absolute difference, levels of 255."""
    wanted = np.asarray(wanted.convert("RGB")).astype(np.int32)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).mean())


def jpeg(seed: int, width: int = 96, height: int = 64) -> bytes:
    """A plain JPEG of its own bytes for every seed."""
    return encode(scene(width, height, seed), comment=b"%d" % seed)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class _Killed(BaseException):
    pass


def interruptions(run: Callable[[Path], object], folder: Path, monkeypatch) -> int:
    """How often `run(out)` can be interrupted at a renaming; each time it must go on to the files that it makes undisturbed."""
    run(folder / "whole")
    whole, replace, count = tree(folder / "whole"), Path.replace, 0
    for moment in range(100):
        out, calls = folder / f"out{moment}", iter(range(100))

        def failing(path, target, calls=calls, moment=moment):
            if next(calls) == moment:
                raise _Killed
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", failing)
        try:
            run(out)
        except _Killed:
            count += 1
        else:
            break
        finally:
            monkeypatch.setattr(Path, "replace", replace)
        run(out)
        assert tree(out) == whole
        shutil.rmtree(out)
    return count
