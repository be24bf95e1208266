"""Writes a folder of generated faces, on all cores; what is there already is not drawn again.

OUT/images/000000.jpg    baseline JPEG
OUT/masks/000000.png     palette PNG, 19 classes
OUT/landmarks.csv        file, person, x0, y0 … x67, y67 in pixels; written last
OUT/faces.json           the settings: another run with others is refused
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mcf import atomic
from mcf.data.faces.parameters import sample
from mcf.data.faces.render import draw, landmarks
from mcf.errors import UserError

STYLE = 1  # raise it when the same parameters give another picture
CHUNK = 16  # faces a task
PALETTE = (
    (0, 0, 0), (214, 160, 130), (86, 160, 60), (200, 190, 60), (60, 90, 250), (150, 70, 220), (90, 220, 230),
    (250, 190, 200), (130, 80, 30), (230, 60, 40), (110, 10, 40), (250, 230, 60), (20, 40, 150), (90, 60, 40),
    (240, 70, 150), (30, 200, 180), (240, 240, 240), (250, 150, 60), (30, 120, 40),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of every file, but not how many there are."""

    seed: int
    size: int
    quality: int
    images_per_person: int
    style: int = STYLE


def write_faces(out: Path, count: int, settings: Settings, workers: int) -> Iterator[int]:
    """Draw faces 0 … count−1 into `out`; gives the number done so far, now and then, up to `count`.

    Raises UserError where the folder cannot be written or holds faces of other settings.
    """
    try:
        _claim(out, settings)
        rows: dict[int, list[str]] = {}
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        for chunk_rows in _map(out, settings, chunks, workers):
            rows.update(chunk_rows)
            yield len(rows)
        _write_table(out / "landmarks.csv", [rows[index] for index in range(count)])
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror or error}; choose a folder that can be written") from error


def read_table(path: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """File names, persons and landmarks [N, 68, 2] of a landmarks.csv."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    points = np.array([row[2:] for row in rows], np.float64).reshape(-1, 68, 2)
    return [row[0] for row in rows], [row[1] for row in rows], points


def _claim(out: Path, settings: Settings) -> None:
    for folder in (out / "images", out / "masks"):
        folder.mkdir(parents=True, exist_ok=True)
    note = out / "faces.json"
    if note.exists():
        try:
            other = json.loads(note.read_text())
        except ValueError:
            other = None
        if other != asdict(settings):
            raise UserError(f"out={out} holds faces of other settings ({note.name}: {other}); choose another folder")
    atomic.write(note, json.dumps(asdict(settings)).encode(), sync=False)


def _map(out: Path, settings: Settings, chunks: list[range], workers: int) -> Iterator[dict[int, list[str]]]:
    if min(workers, len(chunks)) <= 1:
        for chunk in chunks:
            yield _draw_chunk(out, settings, chunk)
        return
    # One process a core is enough: its linear algebra must not start threads of its own.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=spawn) as pool:
        tasks = [pool.submit(_draw_chunk, out, settings, chunk) for chunk in chunks]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool as error:
            raise UserError("a drawing process was killed (out of memory?); start again with fewer workers=") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _draw_chunk(out: Path, settings: Settings, indices: range) -> dict[int, list[str]]:
    """Draw some faces and give their rows of the table."""
    rows = {}
    for index in indices:
        image, mask = out / "images" / f"{index:06d}.jpg", out / "masks" / f"{index:06d}.png"
        parameters = sample(settings.seed, index, images_per_person=settings.images_per_person)
        if image.exists() and mask.exists():
            points = landmarks(parameters, settings.size)
        else:
            face = draw(parameters, settings.size)
            points = face.landmarks
            atomic.write(mask, _png(face.mask), sync=False)
            atomic.write(image, _jpeg(face.image, settings.quality), sync=False)
        person = f"person_{parameters.identity.person:05d}"
        rows[index] = [image.name, person, *(f"{value:.2f}" for value in points.ravel())]
    return rows


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _png(mask: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(mask).convert("L")
    picture.putpalette([channel for colour in PALETTE for channel in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write_table(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "person", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    writer.writerows(rows)
    atomic.write(path, text.getvalue().encode(), sync=False)
