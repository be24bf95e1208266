"""Sets of faces with points: AFLW-19, 300W, WFLW as they are published, and any table of images and points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mcf.downstream.datasets.faceset import (
    Face,
    FaceSet,
    box_around,
    count_note,
    need,
    no_heading,
    table_points,
    table_rows,
    units_of,
)
from mcf.downstream.metrics import BOX, DIAGONAL
from mcf.errors import UserError

AFLW_TRAIN = 20_000
WFLW_SUBSETS = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")
# HRNet's list of 300W names one file as it never was.
W300_NAMES = {"ibug/image_092_01.jpg": "ibug/image_092 _01.jpg"}
TEST_TABLES = ("test.csv", "dev.csv")


def aflw19(root: Path) -> FaceSet:
    """AFLW-19: AFLWinfo_release.mat and data/flickr/{0,2,3}; all 19 points count, visible or not."""
    from scipy.io import loadmat

    mat = "AFLWinfo_release.mat"
    need(root, "aflw19", mat, "data/flickr/")
    try:
        info = loadmat(root / mat)
        box, data, visible = (np.asarray(info[key], np.float64) for key in ("bbox", "data", "mask_new"))
        names = [str(entry[0][0]) for entry in info["nameList"]]
        order = info["ra"].astype(np.int64).ravel() - 1
    except Exception as error:  # a damaged file of MATLAB's can raise anything at all
        raise UserError(f"{root / mat}: not AFLW's file of labels ({error!r}); fetch it again") from None
    if data.shape != (len(names), 38) or box.shape != (len(names), 4) or sorted(order) != list(range(len(names))):
        raise UserError(f"{root / mat}: its parts are not of one length; fetch it again")
    faces = []
    for index in order:
        left, right, top, bottom = box[index]
        faces.append(
            Face(
                name=names[index],
                image=root / "data/flickr" / names[index],
                points=data[index].reshape(2, 19).T,
                box=np.array([left, top, right, bottom]),
                tags=("frontal",) if (visible[index] == 1).all() else (),
            )
        )
    return FaceSet(
        "aflw19", "alignment", faces[:AFLW_TRAIN], faces[AFLW_TRAIN:], crop="box", epochs=150, units=(DIAGONAL, BOX),
        auc=("box", 0.07), notes=count_note("AFLW-19", faces[:AFLW_TRAIN], faces[AFLW_TRAIN:], 20_000, 4_386),
    )  # fmt: skip


def w300(root: Path) -> FaceSet:
    """300W in HRNet's tables; coordinates and centres are 2 too large in them."""
    tables = {part: f"face_landmarks_300w_{part}.csv" for part in ("train", "valid_common", "valid_challenge")}
    need(root, "300w", *tables.values(), "afw/", "helen/", "ibug/", "lfpw/")
    read = {part: list(_hrnet(root, root / name, 68, shift=-2.0, names=W300_NAMES)) for part, name in tables.items()}
    tagged = [_tagged(face, tag) for tag in ("common", "challenge") for face in read[f"valid_{tag}"]]
    return FaceSet(
        "300w", "alignment", read["train"], tagged, crop="box", scale=0.8, epochs=250, units=units_of(68),
        notes=count_note("300W", read["train"], tagged, 3_148, 689),
    )  # fmt: skip


def wflw(root: Path) -> FaceSet:
    """WFLW in HRNet's tables; images under WFLW_images."""
    subsets = {subset: f"face_landmarks_wflw_test_{subset}.csv" for subset in WFLW_SUBSETS}
    whole = {part: f"face_landmarks_wflw_{part}.csv" for part in ("train", "test")}
    need(root, "wflw", *whole.values(), *subsets.values(), "WFLW_images/")
    images = root / "WFLW_images"
    train, test = (list(_hrnet(images, root / name, 98)) for name in whole.values())
    tags: dict[tuple, list[str]] = {}
    for subset, name in subsets.items():
        for face in _hrnet(images, root / name, 98):
            tags.setdefault(_identity(face), []).append(subset)
    test = [_tagged(face, *tags.get(_identity(face), ())) for face in test]
    return FaceSet(
        "wflw", "alignment", train, test, crop="box", scale=0.8, epochs=150, units=units_of(98), auc=("inter_ocular", 0.10),
        notes=count_note("WFLW", train, test, 7_500, 2_500),
    )  # fmt: skip


def table(root: Path) -> FaceSet:
    """Any images with a table of points: train.csv and test.csv or dev.csv (file, person?, x0, y0, x1, y1 …), images/.

    The box is 1.25 times the points' own, and the crop shows it at scale 0.8, as in 300W.
    """
    need(root, "csv", "train.csv", "images/")
    second = next((name for name in TEST_TABLES if (root / name).is_file()), None)
    if second is None:
        raise UserError(f"data={root}: no {' or '.join(TEST_TABLES)}; dataset=csv expects one beside train.csv")
    train, test = (read_table(root / name, root / "images") for name in ("train.csv", second))
    labelled = {face.image.name for face in [*train, *test]}
    without = sorted(path.name for path in (root / "images").iterdir() if path.is_file() and path.name not in labelled)
    notes = [f"{len(without)} images have no label and are left out (for example {without[0]})"] if without else []
    return of_table("csv", train, test, notes)


def of_table(name: str, train: list[Face], test: list[Face], notes: list[str]) -> FaceSet:
    """A set of alignment without a protocol of its own."""
    points = next((len(face.points) for face in [*train, *test] if face.points is not None), 0)
    units = units_of(points)
    return FaceSet(
        name,
        "alignment",
        train,
        test,
        crop="box",
        scale=0.8,
        epochs=150,
        units=units,
        auc=(units[0].name, 0.10),
        notes=notes,
    )


def read_table(path: Path, images: Path) -> list[Face]:
    """Faces of a table: a heading, then file, person (if the heading has it), x0, y0, x1, y1 … in pixels."""
    rows = table_rows(path)
    if not rows or not rows[0] or rows[0][0] != "file":
        raise no_heading(path, rows, "file,person,x0,y0,x1,y1,…")
    first = 2 if "person" in rows[0][:2] else 1
    wanted = [f"{axis}{i}" for i in range((len(rows[0]) - first) // 2) for axis in "xy"]
    if not wanted or rows[0][first:] != wanted:
        raise UserError(
            f"{path}: the heading after {','.join(rows[0][:first])} must be x0,y0,x1,y1,…; rename its columns"
        )
    faces = []
    for number, row in enumerate(rows[1:], 2):
        where = f"{path}:{number}"
        if not row:
            continue
        if len(row) != len(rows[0]):
            raise UserError(
                f"{where}: {len(row)} values, the heading has {len(rows[0])}; points are missing or too many"
            )
        points = table_points(row[first:], where)
        person = row[1] if first == 2 else ""
        faces.append(Face(row[0], images / row[0], points=points, box=box_around(points), person=person))
    return faces


def _hrnet(
    images: Path, path: Path, points: int, shift: float = 0.0, names: dict[str, str] | None = None
) -> Iterator[Face]:
    """Faces of one of HRNet's tables: file, scale, centre x and y, then coordinates; the box is 200·scale wide."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines[1:], 2):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path}:{number}"
        file, *values = line.strip().split(",")
        if len(values) != 3 + 2 * points:
            raise UserError(
                f"{where}: {len(values)} values after the file, expected 3 and {points} points; points are missing"
            )
        file = (names or {}).get(file, file)
        scale = table_points([values[0], "0"], where)[0, 0]
        centre = table_points(values[1:3], where)[0] + shift
        half = 100.0 * scale
        yield Face(
            name=file,
            image=images / file,
            points=table_points(values[3:], where) + shift,
            box=np.concatenate([centre - half, centre + half]),
        )


def _identity(face: Face) -> tuple:
    """What a face is known by in a second table: one image may hold several."""
    points: NDArray[np.float64] | None = face.points
    assert points is not None
    return (face.name, *points.round(3).ravel().tolist())


def _tagged(face: Face, *tags: str) -> Face:
    return Face(face.name, face.image, points=face.points, box=face.box, tags=tags)
