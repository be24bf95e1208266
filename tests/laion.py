"""A made-up LAION-Face: generated faces (and real ones, where they are at hand) pasted into larger scenes, in
img2dataset's exact layout, with detections in RetinaFace's. Nothing here asserts anything.

    python tests/laion.py OUT [IMAGES] [REAL_FACES]     20,000 images in 13 splits; REAL_FACES is ../shared/data/youtube_faces

    OUT/images/split_00003/00001.tar, .parquet, _stats.json      members KEY.jpg, KEY.json, KEY.txt; KEYs repeat across splits
    OUT/detections/sample2detect_3.pth                           {SAMPLE_ID: [(box, 5 landmarks, score), …]}
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PARTS = (0, 2, 5, 8, 13, 15, 17, 18, 21, 22, 24, 25, 28)  # of the 20 million
FAILED = ("failed_to_download", "failed_to_resize")


@dataclass(frozen=True)
class Cutout:
    """A face to paste: picture uint8 [H, W, 3], landmarks [5, 2] and box, in its pixels."""

    picture: np.ndarray
    landmarks: np.ndarray
    box: tuple[float, float, float, float]


def cutout(picture: np.ndarray, points: np.ndarray) -> Cutout:
    """From 68 landmarks (iBUG's order): the five that RetinaFace gives, and a box like its own, from chin to hairline."""
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    left, top, right, bottom = points[:, 0].min(), points[:, 1].min(), points[:, 0].max(), points[:, 1].max()
    return Cutout(picture, five, (left, max(0.0, top - 0.25 * (bottom - top)), right, bottom))


def coloured(count: int = 8, size: int = 96) -> list[Cutout]:
    """Stand-ins for faces that cost nothing to draw: soft blots with five points, each its own."""
    found = []
    for index in range(count):
        rng = np.random.default_rng(index)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
        five = np.array([[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]]) * size / 112
        found.append(Cutout(picture, five, (0.15 * size, 0.1 * size, 0.85 * size, 0.95 * size)))
    return found


def drawn(count: int, size: int = 192, seed: int = 0) -> list[Cutout]:
    """Generated faces."""
    from mcf.data.faces import draw, sample

    faces = (draw(sample(seed, index, images_per_person=2), size) for index in range(count))
    return [cutout(face.image, face.landmarks) for face in faces]


def real(folder: Path, count: int) -> list[Cutout]:
    """Faces of youtube_faces with their 68 landmarks."""
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    found = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        with Image.open(folder / "images" / Path(row[0]).name) as image:
            picture = np.asarray(image.convert("RGB"))
        found.append(cutout(picture, np.array(row[2:], np.float64).reshape(68, 2)))
    return found


@dataclass
class Scene:
    """An image and what a detector would say of it."""

    content: bytes
    size: tuple[int, int]
    faces: list[tuple[list[float], list[list[float]], float]] = field(default_factory=list)


def scene(
    rng: np.random.Generator, cutouts: list[Cutout], most: int = 3, sizes: tuple[int, int] = (320, 1280)
) -> Scene:
    """A soft background with up to `most` faces, JPEG of quality 95; some faces are small, some scores low."""
    width, height = (int(rng.integers(*sizes)) for _ in range(2))
    coarse = Image.fromarray(
        rng.integers(0, 256, (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 3), dtype=np.uint8)
    )
    canvas = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    faces = []
    for _ in range(int(rng.integers(1, most + 1))):
        face = cutouts[int(rng.integers(len(cutouts)))]
        scale = min(width, height) * float(rng.uniform(0.2, 0.9)) / max(face.picture.shape[:2])
        shape = (max(8, round(face.picture.shape[1] * scale)), max(8, round(face.picture.shape[0] * scale)))
        picture = np.asarray(Image.fromarray(face.picture).resize(shape, Image.Resampling.BICUBIC))
        picture = np.clip(picture * rng.uniform(0.8, 1.15) + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)
        x, y = (int(rng.integers(0, side - part + 1)) for side, part in zip((width, height), shape))
        canvas[y : y + shape[1], x : x + shape[0]] = picture
        factors = np.array([shape[0] / face.picture.shape[1], shape[1] / face.picture.shape[0]])
        box = np.array(face.box).reshape(2, 2) * factors + [x, y] + rng.normal(0, 0.01 * shape[0], (2, 2))
        score = float(rng.uniform(0.98, 1.0)) if rng.random() < 0.93 else float(rng.uniform(0.5, 0.9))
        faces.append((box.ravel().tolist(), (face.landmarks * factors + [x, y]).tolist(), score))
    stream = io.BytesIO()
    Image.fromarray(canvas).save(stream, "JPEG", quality=95)
    return Scene(stream.getvalue(), (width, height), faces)


def write_tar(path: Path, shard: int, samples: list[tuple[int, Scene | None]]) -> None:
    """TAR, parquet and stats as img2dataset leaves them; None is a link that failed: it is in the parquet alone."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, (sample_id, content) in enumerate(samples):
            key = f"{shard:05d}{index:04d}"
            row = {
                "SAMPLE_ID": sample_id, "url": f"https://example.org/{sample_id}.jpg", "caption": f"a face, {sample_id}",
                "key": key, "status": "success" if content else FAILED[index % 2],
                "error_message": None if content else "HTTP Error 404: Not Found",
                "width": content and content.size[0], "height": content and content.size[1],
                "original_width": content and content.size[0], "original_height": content and content.size[1],
                "exif": "{}" if content else None,
            }  # fmt: skip
            rows.append(row)
            if content is not None:
                for form, body in (
                    ("jpg", content.content), ("json", json.dumps(row).encode()), ("txt", row["caption"].encode())
                ):  # fmt: skip
                    # As webdataset's writer, which img2dataset uses: a time with a fraction costs each file a pax header.
                    info = tarfile.TarInfo(f"{key}.{form}")
                    info.size, info.mtime, info.mode = len(body), 1_600_000_000.25 + index, 0o444
                    info.uname = info.gname = "bigdata"
                    tar.addfile(info, io.BytesIO(body))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    stats = {"count": len(rows), "successes": sum(content is not None for _, content in samples)}
    path.with_name(path.stem + "_stats.json").write_text(json.dumps(stats))


def _make(root: Path, part: int, shard: int, count: int, seed: int, cutouts: list[Cutout], options: dict) -> dict:
    """One tar; what its images' detections are."""
    rng = np.random.default_rng([seed, part, shard])
    found, samples = {}, []
    for index in range(count):
        sample_id = (part * 100 + shard) * 10_000 + index * 7 + 3_000_000_000
        failed = index % 11 == 10  # ragged, as downloads are
        content = None if failed else scene(rng, cutouts, **options)
        samples.append((sample_id, content))
        if content is None:  # detections were made of images that are gone by now
            found[sample_id] = [([1.0, 1.0, 90.0, 90.0], [[30.0, 30.0]] * 5, 0.99)]
        else:
            found[sample_id] = content.faces
    write_tar(root / f"images/split_{part:05d}/{shard:05d}.tar", shard, samples)
    return found


def tree(
    root: Path,
    cutouts: list[Cutout],
    *,
    parts=(0, 2),
    tars: int = 2,
    per_tar: int = 20,
    seed: int = 0,
    workers: int = 1,
    **options,
) -> Path:
    """Write it all; `per_tar` counts links, of which one in eleven has failed."""
    jobs = [(root, part, shard, per_tar, seed, cutouts, options) for part in parts for shard in range(tars)]
    if workers == 1:
        made = [_make(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as pool:
            made = list(pool.map(_make, *zip(*jobs)))
    detections: dict[int, dict] = {part: {} for part in parts}
    for job, found in zip(jobs, made):
        detections[job[1]] |= found
    (root / "detections").mkdir(parents=True, exist_ok=True)
    for part, found in detections.items():
        torch.save(found, root / f"detections/sample2detect_{part}.pth")
    return root


if __name__ == "__main__":
    out, images = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    faces = drawn(400)
    if len(sys.argv) > 3:
        faces += real(Path(sys.argv[3]), 400)
    each = -(-images * 11 // 10 // (len(PARTS) * 2)) + 1
    tree(out, faces, parts=PARTS, tars=2, per_tar=each, workers=2, sizes=(240, 800))
    print(f"{out}: {len(PARTS) * 2} tars of {each} links")
