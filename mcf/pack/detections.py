"""The boxes that come with the images: LAION-Face's pickles by SAMPLE_ID, a CSV or JSON by file name.

    DETECTIONS/sample2detect_3.pth ──► CONVERTED/sample2detect_3/   once, by one process; all others wait for it
                                           ids.npy     int64 [n], sorted SAMPLE_IDs
                                           first.npy   int64 [n+1], where the faces of each begin
                                           faces.npy   float32 [m, 15], box 4, landmarks 10, score 1
                                           source.json size and time of the .pth: another one is converted anew

The arrays are memory-mapped: a look-up is a binary search in pages that all processes of a machine share. The pickles
are read by torch with `weights_only`, which makes numbers and lists and runs nothing.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mcf import atomic
from mcf.errors import UserError
from mcf.pack.faces import COLUMNS, Face

PATTERN = "sample2detect_*.pth"
LAYOUT = 1  # of the converted folder; another one is converted anew


class Tables:
    """Faces by SAMPLE_ID, out of the converted folders in `folder` that belong to the .pth files of `detections`."""

    def __init__(self, folders: Sequence[Path]):
        self._tables = [
            # As plain arrays over the mapped files: each look into a memmap itself takes ten times as long.
            tuple(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ids", "first", "faces"))
            for folder in folders
        ]

    def __len__(self) -> int:
        return sum(len(ids) for ids, _, _ in self._tables)

    def look_up(self, sample_ids: Sequence[int | None]) -> list[list[Face] | None]:
        """The faces of each sample; None where no table has it. Of several tables the first counts."""
        found: list[list[Face] | None] = [None] * len(sample_ids)
        asked = [i for i, value in enumerate(sample_ids) if value is not None and -(2**63) <= value < 2**63]
        for ids, first, faces in self._tables:
            asked = [i for i in asked if found[i] is None]
            if not asked or not len(ids):
                continue
            wanted = np.array([sample_ids[i] for i in asked], dtype=np.int64)
            rows = np.searchsorted(ids, wanted)
            hit = ids[np.minimum(rows, len(ids) - 1)] == wanted
            for i, row in zip(np.array(asked)[hit].tolist(), rows[hit].tolist()):
                found[i] = [Face.of_row(face) for face in faces[first[row] : first[row + 1]].tolist()]
        return found


def pickles(detections: Path) -> list[Path]:
    """The sample2detect files of a folder. Raises UserError if there are none."""
    if not detections.is_dir():
        raise UserError(f"detections={detections}: no such folder; name the folder of LAION-Face's {PATTERN}")
    found = sorted(detections.glob(PATTERN))
    if not found:
        raise UserError(f"detections={detections}: no {PATTERN} in it; name the folder of LAION-Face's detections")
    return found


def converted(detections: Path, folder: Path | None, begin: int = 0) -> list[Path]:
    """Convert what is not converted yet; the folders of the tables, one a pickle.

    begin: which pickle to look at first, so that the tasks of an array share the work. Raises UserError for a file that
    is none of LAION-Face's, and where the folder cannot be written.
    """
    files = pickles(detections)
    target = folder or detections / "mcf-boxes"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for i in range(len(files)):
            file = files[(begin + i) % len(files)]
            if not _current(file, target / file.stem):
                with _locked(target / f"{file.stem}.lock"):
                    if not _current(file, target / file.stem):
                        print(f"converting {file} to {target / file.stem}", flush=True)
                        _convert(file, target / file.stem)
    except OSError as error:
        raise UserError(
            f"{target}: the detections cannot be converted into it ({error.strerror or error}); name another folder with "
            "converted="
        ) from None
    return [target / file.stem for file in files]


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"layout": LAYOUT, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _current(file: Path, folder: Path) -> bool:
    try:
        return json.loads((folder / "source.json").read_text()) == _stamp(file)
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path) -> None:
    stamp = _stamp(file)
    ids, first, faces = _arrays(file, _unpickled(file))
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for name, array in (("ids", ids), ("first", first), ("faces", faces)):
        np.save(scratch / f"{name}.npy", array)
    atomic.write(scratch / "source.json", json.dumps(stamp).encode())
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


def _unpickled(file: Path) -> dict[Any, Any]:
    import torch

    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle brings about
        raise UserError(f"{file}: cannot be read as plain numbers ({_first_line(error)}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not SAMPLE_ID → faces; is it of LAION-Face?")
    return content


def _numpy_globals() -> list[Any]:
    """What arrays and scalars of NumPy are pickled with, under its old and its new names."""
    core = np._core if hasattr(np, "_core") else np.core  # type: ignore[attr-defined]
    rebuild, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1")}
    old = [(part, f"numpy.core.multiarray.{name}") for part, name in ((rebuild, "_reconstruct"), (scalar, "scalar"))]
    return [np.ndarray, np.dtype, rebuild, scalar, *kinds, *old]


def _arrays(file: Path, content: dict[Any, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, first, faces) of SAMPLE_ID → [(box, landmarks, score), …]."""
    try:
        pairs = sorted((int(key), value) for key, value in content.items())
    except (TypeError, ValueError):
        raise UserError(f"{file}: its keys are no SAMPLE_IDs; is it of LAION-Face?") from None
    content.clear()
    counts = np.fromiter((len(value) for _, value in pairs), dtype=np.int64, count=len(pairs))
    first = np.concatenate([[0], np.cumsum(counts)])
    faces = np.empty((int(first[-1]), COLUMNS), dtype=np.float32)
    for (key, value), start in zip(pairs, first.tolist()):
        for i, face in enumerate(value):
            if (row := _row(face)) is None:
                raise UserError(
                    f"{file}: sample {key}: face {i} is no (box of 4, 5 landmarks, score); is it of LAION-Face?"
                )
            faces[start + i] = row
    return np.array([key for key, _ in pairs], dtype=np.int64), first, faces


def _row(face: Any) -> list[float] | None:
    """(box, landmarks, score) as COLUMNS numbers; None if it is something else."""
    try:
        box, marks, score = face
        numbers = (
            np.asarray(part, dtype=np.float64).reshape(size) for part, size in ((box, 4), (marks, 10), (score, 1))
        )
        return [value for part in numbers for value in part.tolist()]
    except (TypeError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- boxes of a folder of images ------------------------------------------------------------------------------------


def boxes(file: Path) -> dict[str, list[Face]]:
    """Faces by file name (below the source, with slashes) from a .csv or .json. Raises UserError for what is none."""
    if not file.is_file():
        raise UserError(f"detections={file}: no such file; for a folder of images name a .csv or .json of boxes")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"detections={file}: not a text file; give a .csv or .json in UTF-8") from None
    if file.suffix.lower() == ".json":
        return _of_json(file, text)
    if file.suffix.lower() == ".csv":
        return _of_csv(file, text)
    raise UserError(f"detections={file}: unknown form; give a .csv or .json")


def _of_csv(file: Path, text: str) -> dict[str, list[Face]]:
    rows = csv.reader(text.splitlines())
    header = [name.strip().lower() for name in next(rows, [])]
    needed = ["file", "left", "top", "right", "bottom"]
    if missing := [name for name in needed if name not in header]:
        raise UserError(
            f"{file}:1: no column {missing[0]}; the first line names the columns: {','.join(needed)}[,score]"
        )
    marks = [f"{axis}{i}" for i in range(5) for axis in "xy"]
    has_marks = all(name in header for name in marks)
    found: dict[str, list[Face]] = {}
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        values = dict(zip(header, row))
        try:
            left, top, right, bottom = (float(values[name]) for name in needed[1:])
            score = float(values["score"]) if values.get("score", "").strip() else 1.0
            points = tuple(float(values[name]) for name in marks) if has_marks and values[marks[0]].strip() else None
        except (KeyError, ValueError) as error:
            raise UserError(f"{file}:{number}: not a box ({error}); correct the line or take it out") from None
        found.setdefault(values["file"], []).append(Face((left, top, right, bottom), score, points))
    return found


def _of_json(file: Path, text: str) -> dict[str, list[Face]]:
    form = "a table {file: [{box: [left, top, right, bottom], score: 0.99, landmarks: [[x, y], …]}, …]}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"detections={file}: not valid JSON ({error}); give {form}") from None
    if not isinstance(content, dict):
        raise UserError(f"detections={file}: a {type(content).__name__}; give {form}")
    name = ""
    found: dict[str, list[Face]] = {}
    try:
        for name, faces in content.items():
            found[name] = [_face_of(face) for face in faces]
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"detections={file}: {name}: not a list of boxes ({error}); give {form}") from None
    return found


def _face_of(face: Any) -> Face:
    if not isinstance(face, dict):
        face = {"box": face}
    left, top, right, bottom = (math.nan if value is None else float(value) for value in face["box"])
    marks = face.get("landmarks")
    points = tuple(float(v) for v in np.asarray(marks, dtype=np.float64).reshape(10)) if marks is not None else None
    return Face((left, top, right, bottom), float(face.get("score", 1.0)), points)
