"""Small trees in the exact layouts of the published sets, with their quirks. Nothing here asserts anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

PARTS = ("neck", "skin", "cloth", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "mouth", "l_lip",
         "u_lip", "hair", "eye_g", "hat", "ear_r", "neck_l")  # fmt: skip


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0, exif: int | None = None) -> Path:
    """A smooth random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    tags = Image.Exif()
    if exif:
        tags[0x0112] = exif
    image.save(path, exif=tags)
    return path


def mask(path: Path, labels: np.ndarray, palette: bool = True) -> Path:
    """A PNG of classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)
    return path


def aflw19(root: Path, test: int = 5) -> dict:
    """20,000 training faces that share three images, and a few test faces; returns what was written."""
    rng = np.random.default_rng(0)
    count = 20_000 + test
    files = [picture(root / f"data/flickr/{folder}/image{folder}.jpg", seed=folder) for folder in (0, 2, 3)]
    names = [files[i % 3].relative_to(root / "data/flickr").as_posix() for i in range(count)]
    bbox = np.tile([10.0, 40.0, 8.0, 38.0], (count, 1))  # left, right, top, bottom
    data = np.concatenate([rng.uniform(10, 40, (count, 19)), rng.uniform(8, 38, (count, 19))], axis=1)
    visible = (rng.random((count, 19)) < 0.98).astype(np.uint8)
    order = rng.permutation(count)
    cells = np.empty((count, 1), object)
    for i, name in enumerate(names):
        cells[i, 0] = name
    savemat(
        root / "AFLWinfo_release.mat",
        {"bbox": bbox, "data": data, "mask_new": visible, "nameList": cells, "ra": order[None] + 1},
    )
    return {"data": data, "order": order, "visible": visible, "names": names}


def hrnet_row(file: str, scale: float, centre: tuple[float, float], points: np.ndarray) -> str:
    """A row of HRNet's tables."""
    return ",".join([file, f"{scale}", *(f"{v}" for v in centre), *(f"{v:.3f}" for v in points.ravel())])


def w300(root: Path) -> np.ndarray:
    """One training face, two common, one challenging of the misnamed file; returns the points as written (2 too large)."""
    points = np.random.default_rng(1).uniform(20, 40, (68, 2))
    for folder in ("afw", "helen", "ibug", "lfpw"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tables = {
        "train": ["helen/a.jpg"], "valid_common": ["lfpw/b.png", "helen/c.jpg"], "valid_challenge": ["ibug/image_092_01.jpg"],
    }  # fmt: skip
    for part, files in tables.items():
        rows = [hrnet_row(file, 0.2, (32.0, 27.0), points) for file in files]
        heading = "image_name,scale,center_w,center_h,original_0_x"
        (root / f"face_landmarks_300w_{part}.csv").write_text("\n".join([heading, "# a comment", *rows, ""]) + "\n")
        for file in files:
            picture(root / file.replace("image_092_01", "image_092 _01"))
    return points


def wflw(root: Path) -> np.ndarray:
    """One training face; two test faces of one image, the second in the subsets blur and makeup; returns the points [2]."""
    points = np.random.default_rng(2).uniform(10, 40, (2, 98, 2))
    picture(root / "WFLW_images/0--Parade/p.jpg")
    first, second = (hrnet_row("0--Parade/p.jpg", 0.3, (25.0, 25.0), p) for p in points)
    tables = {"train": [first], "test": [first, second], "test_blur": [second], "test_makeup": [second]}
    for subset in ("largepose", "expression", "illumination", "occlusion"):
        tables[f"test_{subset}"] = []
    for part, rows in tables.items():
        (root / f"face_landmarks_wflw_{part}.csv").write_text("\n".join(["heading", *rows]) + "\n")
    return points


def lapa(root: Path, classes: int = 11) -> np.ndarray:
    """Two training faces, one test face, one left aside; returns the 106 points."""
    points = np.random.default_rng(3).uniform(5, 40, (106, 2))
    for split, stems in {"train": ["a", "b"], "val": ["c"], "test": ["d"]}.items():
        for stem in stems:
            picture(root / split / "images" / f"{stem}.jpg")
            labels = np.random.default_rng(4).integers(0, classes, (48, 64))
            mask(root / split / "labels" / f"{stem}.png", labels, palette=False)
            text = "106\n" + "\n".join(f"{x:.3f} {y:.3f}" for x, y in points) + "\n"
            (root / split / "landmarks").mkdir(exist_ok=True)
            (root / split / "landmarks" / f"{stem}.txt").write_text(text)
    return points


def celebamask_hq(root: Path) -> None:
    """Images 0 (train), 1 (val), 2003 (test); 2003's hair overlaps its skin and its neck_l is the last of all."""
    for index in (0, 1, 2003):
        picture(root / f"CelebA-HQ-img/{index}.jpg", 1024, 1024, seed=index)
    full = np.zeros((512, 512), bool)
    for index, parts in {
        0: {"skin": (0, 512)}, 1: {"skin": (0, 512)}, 2003: {"skin": (100, 400), "hair": (50, 200), "neck_l": (190, 210)},
    }.items():  # fmt: skip
        for part, (first, last) in parts.items():
            area = full.copy()
            area[first:last] = True
            folder = root / "CelebAMask-HQ-mask-anno" / str(index // 2000)
            # Stored as grey-looking RGB, as the published files are.
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(area[:, :, None] * np.uint8(255), 3, axis=2)).save(
                folder / f"{index:05d}_{part}.png"
            )
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx   orig_idx   orig_file\n0      119613     119614.jpg\n1      99094      099095.jpg\n2003   200121   200122.jpg\n"
    )
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n119614.jpg 0\n099095.jpg 1\n200122.jpg 2\n")


def face_points(count: int = 68, seed: int = 5) -> np.ndarray:
    """Points of a face of sorts within 64×48 pixels, with its eyes apart."""
    points = np.random.default_rng(seed).uniform(12, 36, (count, 2))
    if count == 68:
        points[36:42] = [16, 20]
        points[42:48] = [32, 21]
    return points


def table(root: Path, train: int = 6, test: int = 4, points: int = 68) -> None:
    """A table of faces of people who have two images each."""
    for name, first, count in (("train.csv", 0, train), ("dev.csv", train, test)):
        heading = ["file", "person", *(f"{axis}{i}" for i in range(points) for axis in "xy")]
        rows = [",".join(heading)]
        for i in range(first, first + count):
            picture(root / f"images/{i}.jpg", seed=i)
            values = face_points(points, seed=i).ravel()
            rows.append(",".join([f"{i}.jpg", f"person {i // 2}", *(f"{v:.2f}" for v in values)]))
        (root / name).write_text("\n".join(rows) + "\n")


def masks(root: Path, train: int = 4, test: int = 2, classes: int = 19) -> None:
    """Images with masks as palette PNG."""
    for split, count in (("train", train), ("dev", test)):
        for i in range(count):
            picture(root / split / "images" / f"{i}.jpg", seed=i)
            labels = np.random.default_rng(i).integers(0, classes, (6, 8)).repeat(8, axis=0).repeat(8, axis=1)
            mask(root / split / "masks" / f"{i}.png", labels)
