"""Data sets by name: files as they are published → `FaceSet`. Each reader says which files it expects where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mcf.downstream.datasets import alignment, parsing
from mcf.downstream.datasets.faceset import Face, FaceSet, Task, checked, need
from mcf.downstream.datasets.splits import split_by_person
from mcf.errors import UserError

__all__ = ["READERS", "Face", "FaceSet", "open_faces"]

DRAWN_TEST = 0.2  # share of the people of generated faces that are tested on


def _drawn_points(root: Path) -> FaceSet:
    """Points of generated faces (mcf.data.faces): a fifth of the people are the test set."""
    need(root, "faces", "images/", "masks/", "landmarks.csv")
    train, test = split_by_person(_drawn(root), DRAWN_TEST)
    return alignment.of_table("faces", train, test, [])


def _drawn_masks(root: Path) -> FaceSet:
    """Masks of generated faces."""
    need(root, "faces", "images/", "masks/", "landmarks.csv")
    faces = [
        dataclasses.replace(face, points=None, labels=root / "masks" / f"{face.image.stem}.png")
        for face in _drawn(root)
    ]
    for face in faces:
        if face.labels is not None and not face.labels.is_file():
            raise UserError(f"{face.labels}: no such mask, but there is an image for it; draw the faces again")
    return parsing.of_masks("faces", *split_by_person(faces, DRAWN_TEST), parsing.CELEBAMASK_CLASSES)


def _drawn(root: Path) -> list[Face]:
    return alignment.read_table(root / "landmarks.csv", root / "images")


READERS: dict[Task, dict[str, Callable[[Path], FaceSet]]] = {
    "alignment": {
        "aflw19": alignment.aflw19,
        "300w": alignment.w300,
        "wflw": alignment.wflw,
        "csv": alignment.table,
        "faces": _drawn_points,
    },
    "parsing": {
        "lapa": parsing.lapa,
        "celebamask_hq": parsing.celebamask_hq,
        "masks": parsing.masks,
        "faces": _drawn_masks,
    },
}


def open_faces(task: Task, dataset: str, root: str | Path) -> FaceSet:
    """The faces of a data set and their labels, checked.

    Raises UserError, one line, for a set that the task does not have, files that are not there, and labels that cannot
    be right (see `checked`); masks are looked at when they are read.
    """
    readers = READERS[task]
    if dataset not in readers:
        other = next((t for t in READERS if dataset in READERS[t]), None)
        hint = f" (it is a set of task={other})" if other else ""
        raise UserError(f"dataset={dataset}: no set of task={task}{hint}; there are: {', '.join(readers)}")
    path = Path(root).expanduser()
    return checked(readers[dataset](path), path)
