"""A folder of labelled faces, for probing: tables → labels, groups, points; pictures → squares as the encoder sees them.

    FOLDER/images/                       pictures
    FOLDER/train.csv, test.csv|dev.csv   a heading, then a row a picture; or faces.csv or landmarks.csv alone
        file,person,smiling,x0,y0,x1,y1,…    columns after `file` are labels, until the points (which may be missing)

Nobody stands on both sides of a split:
    neighbours      a face is looked for among those of other groups (videos) alone
    linear probe    of each label every second group is fitted, the others are tested; labels of one group are left out
    ridge           fitted on the people of train.csv, tested on the others'; with one table a fifth of its people is tested
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mcf.config import ProbeKeys
from mcf.downstream.datasets.faceset import Face, box_around, no_heading, read_image, table_points, table_rows
from mcf.downstream.datasets.splits import split_by_person
from mcf.downstream.loader import whole_box
from mcf.errors import UserError

TABLES, ALONE = ("train.csv", ("test.csv", "dev.csv")), ("faces.csv", "landmarks.csv")
PERSON = "person"
VIDEO = r"(\d+)\d$"
RIDGE_TEST = 0.2  # share of the people of a single table
SCALE = 0.8  # of the box around the points


@dataclass(frozen=True)
class ProbeFaces:
    """What is known of the faces: all lists and arrays are N long.

    labels: int64, −1 for a face without one, or empty where the tables have no labels. groups: int64, numbers of what must
    not find itself. people: int64. fit: bool, the faces that the linear probe is fitted to; none where a label has only one
    group. told: bool, faces that it fits or tests. train: bool, the faces that the ridge is fitted to.
    """

    faces: list[Face]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    people: NDArray[np.int64]
    fit: NDArray[np.bool_]
    told: NDArray[np.bool_]
    train: NDArray[np.bool_]

    @property
    def points(self) -> int:
        """Number of points of each face, 0 without any."""
        first = self.faces[0].points
        return 0 if first is None else len(first)

    def describe(self, label: str) -> str:
        """What is asked of whom, in a line."""
        said = [f"on {len(self.faces)} faces in {self.groups.max() + 1} groups"]
        if len(self.labels):
            count = len(set(self.labels[self.labels >= 0].tolist()))
            said.append(
                f"{count} values of {label}, linear probe fitted on {self.fit.sum()} and tested on {(self.told & ~self.fit).sum()}"
            )
        if self.points:
            said.append(f"ridge fitted on {self.train.sum()} and tested on {(~self.train).sum()}")
        return "; ".join(said)


@dataclass(frozen=True)
class Row:
    """A row of a table: the face, and its labels by column."""

    face: Face
    labels: dict[str, str]


def read_faces(keys: ProbeKeys, where: str) -> ProbeFaces:
    """The faces of a folder. `where` opens messages about it, for example `probe.data=FOLDER`.

    Raises UserError, one line, for a folder or a table that is not as above, a label that no table has, faces of whom
    nobody can be found, and images that are not there.
    """
    root = Path(keys.data or "").expanduser()
    tables = [read_table(path, root / "images") for path in find_tables(root, where)]
    rows = [row for table in tables for row in table]
    columns = sorted({name for row in rows for name in row.labels})
    if keys.label not in columns and (columns or keys.label != PERSON or rows[0].face.points is None):
        known = f"there are {', '.join(columns)}" if columns else "there are no labels at all"
        raise UserError(f"{where}: no column {keys.label} in its tables, {known}; set label=")
    if len({len(row.face.points) if row.face.points is not None else 0 for row in rows}) > 1:
        raise UserError(f"{where}: its tables differ in the number of points; give all faces the same")

    chosen = [chosen_rows(table, keys.faces * len(table) // len(rows)) for table in tables]
    rows = [row for table in chosen for row in table]
    if missing := next((row.face.image for row in rows if not row.face.image.is_file()), None):
        raise UserError(
            f"{missing}: no such image, but a table of {root} has a row for it; add it, or take the row away"
        )
    names = [group_of(row.face, keys) for row in rows]
    groups, people = numbered(names), numbered([row.face.person or row.face.name for row in rows])
    labels = np.zeros(0, np.int64)
    fit = told = np.zeros(len(rows), bool)
    if keys.label in columns:
        texts = [row.labels.get(keys.label, "") for row in rows]
        labels = np.where([text != "" for text in texts], numbered(texts), -1)
        fit, told = alternate_groups(labels, groups)
        if not told.any():
            raise UserError(
                f"{where}: no {keys.label} has faces in two groups (the group of {rows[0].face.name} is {names[0]!r}), so "
                "that none can be found; set group=, or another label="
            )
    if len(tables) == 2:
        train = np.array([index < len(chosen[0]) for index in range(len(rows))])
    else:
        inside = {id(face) for face in split_by_person([row.face for row in rows], RIDGE_TEST)[0]}
        train = np.array([id(row.face) in inside for row in rows])
    return ProbeFaces([row.face for row in rows], labels, groups, people, fit, told, train)


def find_tables(root: Path, where: str) -> list[Path]:
    """One table, or those of two parts. Raises UserError where there is none, or no folder of images."""
    layout = "expected images/ and train.csv with test.csv or dev.csv, or faces.csv or landmarks.csv alone"
    if not (root / "images").is_dir():
        raise UserError(f"{where}: {'no images/ in it' if root.is_dir() else 'no such folder'}; {layout}")
    first, seconds = TABLES
    if (root / first).is_file():
        second = next((root / name for name in seconds if (root / name).is_file()), None)
        return [root / first] if second is None else [root / first, second]
    if (alone := next((root / name for name in ALONE if (root / name).is_file()), None)) is None:
        raise UserError(f"{where}: no table in it; {layout}")
    return [alone]


def read_table(path: Path, images: Path) -> list[Row]:
    """The rows of a table. Raises UserError for one that cannot be read as such."""
    lines = table_rows(path)
    heading = lines[0] if lines else []
    if not heading or heading[0] != "file":
        raise no_heading(path, lines, "file,person,…,x0,y0,…")
    first = heading.index("x0") if "x0" in heading else len(heading)
    points = [f"{axis}{i}" for i in range((len(heading) - first) // 2) for axis in "xy"]
    if heading[first:] != points or len(set(heading)) < len(heading):
        raise UserError(f"{path}: the heading must be file, labels, then x0,y0,x1,y1,…, each once; rename its columns")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        where = f"{path}:{number}"
        if len(line) != len(heading):
            raise UserError(f"{where}: {len(line)} values, the heading has {len(heading)}; mend the row")
        labels = dict(zip(heading[1:first], line[1:first]))
        found = table_points(line[first:], where) if points else None
        box = None if found is None else box_around(found)
        face = Face(line[0], images / line[0], points=found, box=box, person=labels.get(PERSON, ""))
        rows.append(Row(face, labels))
    if not rows:
        raise UserError(f"{path}: has no rows; add some, or take the file away")
    return rows


def chosen_rows(rows: list[Row], most: int) -> list[Row]:
    """About `most` of the rows, people whole: as many of them as fit, spread evenly over their names."""
    if len(rows) <= most:
        return rows
    people = sorted({row.face.person or row.face.name for row in rows})
    count = max(1, len(people) * most // len(rows))
    kept = {people[int(index)] for index in np.linspace(0, len(people) - 1, count)}
    return [row for row in rows if (row.face.person or row.face.name) in kept]


def group_of(face: Face, keys: ProbeKeys) -> str:
    """What a face must not be found by: by the pattern, else the frames of its video, else all faces of the person."""
    stem = Path(face.name).stem
    if keys.group is not None:
        found = re.search(keys.group, stem)
        return found[1] if found and found[1] is not None else stem
    if keys.label != PERSON:
        return face.person or stem
    # One frame may lie under two names (a_X_21, b_X_21), so that what stands before the number is not looked at.
    video = re.search(VIDEO, stem)
    return f"{face.person} {video[1]}" if video else stem


def numbered(names: Sequence[str]) -> NDArray[np.int64]:
    """Names as numbers from 0, in the order of the names."""
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def alternate_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each label every second group: (faces to fit, faces to fit or test); labels with a single group are in neither.

    A group with several labels stands on the side where its first label puts it.
    """
    side: dict[int, bool] = {}
    for label in np.unique(labels[labels >= 0]):
        inside = np.unique(groups[labels == label])
        turn = itertools.cycle((True, False))
        for group in inside:
            if int(group) not in side:
                side[int(group)] = next(turn)
    fit = np.array([side.get(int(group), False) for group in groups])
    fitted = {int(label) for label in labels[fit]}
    tested = {int(label) for label in labels[~fit]}
    told = np.isin(labels, sorted((fitted & tested) - {-1}))
    return fit & told, told


# --- squares --------------------------------------------------------------------------------------------------------


def square_of(face: Face, shape: tuple[int, int] = (1, 1)) -> NDArray[np.float64]:
    """What the encoder sees of an image (height, width): left, top, right, bottom in its pixels, (0, 0) a pixel's centre.

    The square around the points, at the scale at which alignment crops; without points the one around the whole image.
    """
    box = whole_box(shape).numpy() if face.box is None else face.box
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    half = half if face.box is None else half / SCALE
    return np.concatenate([centre - half, centre + half])


def cut(face: Face, side: int) -> Tensor:
    """The face as uint8 [side, side, 3], 0 outside of the image; Pillow's antialiased bilinear filter, as in training.

    Raises UserError for a file that is no image.
    """
    image = read_image(face)
    # Pillow counts from the corner of the first pixel.
    square = square_of(face, (image.shape[0], image.shape[1])) + 0.5
    low, high = np.floor(square[:2]), np.ceil(square[2:])
    part = Image.fromarray(image).crop((*low.astype(int), *high.astype(int)))
    inside = (square - np.concatenate([low, low])).clip(0, [*part.size, *part.size])
    small = part.resize((side, side), Image.Resampling.BILINEAR, box=tuple(inside))
    return torch.from_numpy(np.array(small))


def cuts(faces: Sequence[Face], side: int, threads: int) -> Iterator[Tensor]:
    """The faces' squares, in order."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda face: cut(face, side), faces)


def points_in_square(face: Face) -> Tensor:
    """The face's points in units of its square's side, float64 [P, 2], from its corner."""
    square = square_of(face)
    return torch.from_numpy((np.asarray(face.points) - square[:2]) / (square[2:] - square[:2]))


def points_in_image(face: Face, points: Tensor) -> NDArray[np.float64]:
    """The way back: points of the square as pixels of the image, [P, 2]."""
    square = square_of(face)
    return points.numpy() * (square[2:] - square[:2]) + square[:2]
