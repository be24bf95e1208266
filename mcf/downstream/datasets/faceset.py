"""What every reader makes of its files: faces with labels, and all that the protocol says of the set."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mcf.downstream.metrics import BOX, DIAGONAL, EYES, Unit
from mcf.errors import UserError

Task = Literal["alignment", "parsing"]
T = TypeVar("T")

ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112
QUOTED = 60  # signs of a file's own text in a message, at most


@dataclass(frozen=True, eq=False)
class Face:
    """One face and its label, in pixels of its image (the centre of the first pixel is (0, 0)).

    image: its file, upright by its EXIF tag. points: [P, 2]. box: left, top, right, bottom, the annotated one. align: the
    five points of a similarity crop. labels: palette or grey PNG of classes; or parts: PNG → class, later over earlier.
    side: both image and labels are brought to this size first. person: who it is. tags: subsets of the test set.
    """

    name: str
    image: Path
    points: NDArray[np.float64] | None = None
    box: NDArray[np.float64] | None = None
    align: NDArray[np.float64] | None = None
    labels: Path | None = None
    parts: tuple[tuple[Path, int], ...] = ()
    side: int | None = None
    person: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class FaceSet:
    """A data set of one task.

    crop: how a face comes out of its image: by `box`, by a `similarity` from `align`, or `whole`. scale: of the crop about
    its centre. warp: factor of the tanh-warp. epochs: length of the protocol's training. classes: names, background first
    (parsing). units: what NME is divided by, the headline first (alignment). auc: unit and threshold of AUC and FR.
    notes: what a user should know of these files.
    """

    name: str
    task: Task
    train: list[Face]
    test: list[Face]
    crop: Literal["box", "similarity", "whole"]
    scale: float = 1.0
    warp: float = 0.0
    epochs: int = 150
    classes: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    auc: tuple[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        """Number of points of a face."""
        found = self.test[0].points
        return 0 if found is None else len(found)

    @property
    def channels(self) -> int:
        """Channels of a network's output: points or classes."""
        return self.points if self.task == "alignment" else len(self.classes)


# --- files ----------------------------------------------------------------------------------------------------------


def need(root: Path, dataset: str, *expected: str) -> None:
    """Raise UserError unless all the files and folders (which end in /) are there; it names all that were expected."""
    layout = f"dataset={dataset} expects {', '.join(expected)} in it"
    if not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise UserError(f"data={root}: {what}; {layout}")
    missing = [
        name for name in expected if not ((root / name).is_dir() if name[-1] == "/" else (root / name).is_file())
    ]
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise UserError(f"data={root}: no {', '.join(missing[:2])}{more}; {layout}")


def read_image(face: Face) -> NDArray[np.uint8]:
    """RGB [H, W, 3], upright. Raises UserError for a file that is no whole image."""
    try:
        with Image.open(face.image) as opened:
            image = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{face.image}: cannot be read as an image ({error}); replace it, or take it away") from None
    if face.side is None or image.shape[:2] == (face.side, face.side):
        return image
    # Without a filter before it, as OpenCV's bilinear resizing of the released code.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (face.side, face.side), mode="bilinear", align_corners=False)
    return resized[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def read_labels(face: Face, classes: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Classes [H, W] of a face whose image has `shape` (H, W).

    Raises UserError for a mask of another size than the image, or with a class that the set does not have.
    """
    if face.labels is not None:
        labels = _read_mask(face.labels)
    else:
        side = face.side or shape[0]
        labels = np.zeros((side, side), np.uint8)
        for path, value in face.parts:
            part = _read_mask(path)
            if part.shape != labels.shape:
                raise UserError(f"{path}: mask of {_size(part.shape)} pixels, expected {_size(labels.shape)}")
            labels[part > 0] = value
    where = face.labels or face.image
    if labels.shape != shape[:2]:
        raise UserError(
            f"{where}: mask of {_size(labels.shape)} pixels for an image of {_size(shape)} ({face.image.name}); "
            "both must be of one size"
        )
    if labels.max() >= classes:
        raise UserError(
            f"{where}: class {labels.max()}, but classes are 0 to {classes - 1}; mend the mask, or name all classes in classes.txt"
        )
    return labels


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as opened:
            # A palette holds classes in its indices; anything else is read as grey.
            return np.array(opened if opened.mode in ("P", "L") else opened.convert("L"), np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a mask ({error}); replace it") from None


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}×{shape[0]}"


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, upright, from its header. Raises UserError where it is no image."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            return (height, width) if opened.getexif().get(ORIENTATION) in ROTATED else (width, height)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image, but there is a label for it; add it, or take the label away") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace it, or take it away") from None


# --- checks ---------------------------------------------------------------------------------------------------------


def checked(found: FaceSet, root: Path) -> FaceSet:
    """The set, after looking at every label that can be judged without decoding an image.

    Raises UserError for an empty split, points that are not numbers or lie absurdly far outside of the image, boxes
    without an area, and images that are not there. Points a little outside are noted: the protocol counts them.
    """
    for split, faces in (("training", found.train), ("test", found.test)):
        if not faces:
            raise UserError(
                f"data={root}: the {split} split of dataset={found.name} is empty; add images and labels to it"
            )
    faces = [*found.train, *found.test]
    sizes = dict(zip(paths := list(dict.fromkeys(f.image for f in faces)), in_threads(image_size, paths)))
    outside = [told for face in faces if (told := _outside(face, sizes[face.image]))]
    notes = list(found.notes)
    if outside:
        notes.append(f"{len(outside)} faces have points outside of their image (kept; for example {outside[0]})")
    if found.task == "alignment":
        counts = {0 if face.points is None else len(face.points) for face in faces}
        if len(counts) > 1:
            raise UserError(f"data={root}: faces with {min(counts)} and with {max(counts)} points; give all the same")
        for unit in found.units:
            for face in faces:
                assert face.points is not None and face.box is not None
                if not unit.of(face.points[None], face.box[None])[0] > 0:
                    raise UserError(
                        f"{face.image}: its {unit.name} distance is 0, so no error can be divided by it; mend it"
                    )
    return dataclasses.replace(found, notes=notes)


def _outside(face: Face, size: tuple[int, int]) -> str | None:
    """Words for the point that lies furthest outside of the image, if one does."""
    if face.points is None:
        return None
    if not np.isfinite(face.points).all():
        index = int(np.argwhere(~np.isfinite(face.points))[0, 0])
        raise UserError(f"{face.image}: point {index} of its label is not a number; mend the label, or take it away")
    beyond = np.maximum(-face.points, face.points - (np.array(size) - 1)).max(axis=1)
    worst = int(beyond.argmax())
    if beyond[worst] <= 0.5:
        return None
    x, y = face.points[worst]
    told = f"{face.image.name}: point {worst} at ({x:g}, {y:g}) of {size[0]}×{size[1]}"
    if beyond[worst] > max(np.ptp(face.points, axis=0).max() / 2, 1.0) or (beyond > 0).all():
        raise UserError(
            f"{face.image}: point {worst} at ({x:g}, {y:g}) lies far outside of the image of {size[0]}×{size[1]} pixels; "
            "is the label of another image, or of another size?"
        )
    return told


def table_rows(path: Path, where: str = "") -> list[list[str]]:
    """The rows of a table in CSV, its heading first; UserError, opening with `where` (the path), if it is no such file.

    The byte order mark that spreadsheets write is no part of the heading.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{where or path}: cannot be read as a table ({why}); save it as CSV in UTF-8") from None


def no_heading(path: Path, rows: Sequence[Sequence[str]], expected: str) -> UserError:
    """The error for a table that does not begin with the heading that was expected; what it begins with is cut short."""
    text = ",".join(rows[0]) if rows else "nothing"
    shown = text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
    commas = " with commas between its columns" if rows and len(rows[0]) == 1 and set(";\t") & set(text) else ""
    return UserError(f"{path}: begins with {shown!r}; expected a heading {expected}{commas}")


def table_points(text: Sequence[str], where: str) -> NDArray[np.float64]:
    """Points [P, 2] of a row x0, y0, x1, …; UserError, opening with `where`, for a value that is no finite number."""
    try:
        values = np.array(text, np.float64)
    except ValueError:
        values = np.array([np.nan])
    if len(values) != len(text) or not np.isfinite(values).all():
        index, bad = next((i, t) for i, t in enumerate(text) if not _is_number(t))
        raise UserError(
            f"{where}: {'xy'[index % 2]} of point {index // 2} is {bad.strip()[:QUOTED] or 'missing'!r}, not a number; mend the row, "
            "or take it away"
        )
    return values.reshape(-1, 2)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def units_of(points: int) -> tuple[Unit, ...]:
    """What NME is divided by, for a known number of points: between the eyes, and by the box; else by the box alone."""
    return (*EYES.get(points, ()), DIAGONAL, BOX)


def count_note(name: str, train: list[Face], test: list[Face], expected_train: int, expected_test: int) -> list[str]:
    """A note where a set is not as large as published: its numbers cannot be compared then."""
    if (len(train), len(test)) == (expected_train, expected_test):
        return []
    return [
        f"{len(train):,} training and {len(test):,} test faces, {name} has {expected_train:,} and {expected_test:,}: "
        "results are not comparable with published ones"
    ]


def box_around(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A box for a face that has none: a square about the points' own box, 1.25 times as large as its longer side."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = max((high - low).max(), 1e-6) * 1.25 / 2
    centre = (low + high) / 2
    return np.concatenate([centre - half, centre + half])


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """map over threads, for many small reads."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, items, chunksize=1))
