"""What a source is made of, as units of work: each becomes one shard, or none, by itself.

    tars      one unit a tar, in the order of their names
    images    a folder whose faces are cut out: units of so many files, in the order that the seed mixes them to

The units, their numbers and what is in them depend on names, sizes and settings alone: tasks that share them need not
talk to each other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcf.errors import UserError
from mcf.pack import convert, detections
from mcf.pack.faces import Face
from mcf.pack.options import PackConfig
from mcf.pack.source import UNREADABLE, Candidate, LeftOut, mixed, read
from mcf.pack.tars import Entry, entries

NOT_A_TAR = "not a tar"
_PER_UNIT = 1000  # files of a folder a unit, where shard_samples does not say
_BESIDE = (".parquet", "_stats.json")  # what img2dataset writes beside a tar


@dataclass(frozen=True)
class Unit:
    """A tar (`path`), or some files of a folder. `name` is below the source, `size` in bytes."""

    number: int
    name: str
    size: int
    path: Path | None = None
    files: tuple[Candidate, ...] = ()

    def samples(self, options: PackConfig) -> Iterator[Entry | LeftOut]:
        """Its images, in order, and what is left out before any decoding."""
        if self.path is not None:
            yield from entries(self.path, self.name, options)
            return
        for file in self.files:
            if file.size == 0:
                yield LeftOut(file.name, convert.EMPTY)
            elif file.size > options.max_bytes:
                detail = f"{file.size} bytes, max_bytes={options.max_bytes}"
                yield LeftOut(file.name, convert.TOO_LARGE, detail)
            else:
                try:
                    yield Entry(file.name, read(file))
                except OSError as error:
                    yield LeftOut(file.name, UNREADABLE, error.strerror or str(error))


@dataclass(frozen=True)
class Source:
    """All units, what is no part of any, and an identity of both."""

    units: tuple[Unit, ...]
    left_out: tuple[LeftOut, ...]
    digest: str


def tars_in(found: Iterable[Candidate | LeftOut]) -> bool:
    """Whether a source is one of tars."""
    return any(isinstance(item, Candidate) and item.name.lower().endswith(".tar") for item in found)


def survey(found: Sequence[Candidate | LeftOut], options: PackConfig) -> Source:
    """The units of what was found in a source."""
    files = [item for item in found if isinstance(item, Candidate)]
    left_out = [item for item in found if isinstance(item, LeftOut)]
    if tars_in(found):
        tars = sorted((file for file in files if file.name.lower().endswith(".tar")), key=lambda file: file.name)
        stems = {file.name[:-4] for file in tars}
        for file in files:
            beside = next((end for end in _BESIDE if file.name.endswith(end)), "")
            known = file.name.lower().endswith(".tar") or (beside and file.name.removesuffix(beside) in stems)
            if not known:
                left_out.append(LeftOut(file.name, NOT_A_TAR, "the source is one of tars"))
        units = [Unit(i, file.name, file.size, path=Path(file.path)) for i, file in enumerate(tars)]
    else:
        files = mixed(files, options.seed)
        each = options.shard_samples or _PER_UNIT
        parts = [files[first : first + each] for first in range(0, len(files), each)]
        units = [
            Unit(i, f"files {i * each}–{i * each + len(part) - 1}", sum(f.size for f in part), files=tuple(part))
            for i, part in enumerate(parts)
        ]
    digest = hashlib.sha256()
    for unit in units:
        for file in unit.files or (Candidate(unit.name, "", unit.size),):
            digest.update(os.fsencode(file.name) + f"\0{file.size}\0".encode())
    for item in sorted(left_out, key=lambda item: item.name):
        digest.update(os.fsencode(item.name) + f"\0{item.reason}\0".encode())
    return Source(tuple(units), tuple(left_out), digest.hexdigest()[:16])


class Boxes:
    """Where the faces of an image come from: tables by SAMPLE_ID, boxes by file name, or nowhere.

    `look_up` gives a list of faces for each sample, or None where this source of boxes does not know the image.
    """

    def __init__(self, tables: Sequence[Path] = (), by_name: dict[str, list[Face]] | None = None):
        self._tables = detections.Tables(tables) if tables else None
        self._by_name = by_name

    @property
    def any(self) -> bool:
        """Whether there are boxes at all."""
        return self._tables is not None or self._by_name is not None

    @property
    def by_id(self) -> bool:
        """Whether a sample is found by its SAMPLE_ID."""
        return self._tables is not None

    def look_up(self, samples: Sequence[Entry], sample_ids: Sequence[int | None]) -> list[list[Face] | None]:
        """The faces of each sample."""
        if self._by_name is not None:
            return [self._by_name.get(sample.name) for sample in samples]
        return self._tables.look_up(sample_ids) if self._tables is not None else [None] * len(samples)


def check(options: PackConfig, tars: bool) -> None:
    """Raise UserError for keys that do not go together, or not with this kind of source."""
    if options.by_faces and not (options.detections or options.detector):
        raise UserError(f"crop={options.cropping} needs boxes; give detections=, or detector=")
    if not options.by_faces and (options.detections or options.detector):
        key = "detections" if options.detections else "detector"
        raise UserError(f"crop={options.crop} keeps whole images; take {key}= away, or say crop=face")
    if options.detections and options.detector:
        raise UserError("detections and detector are both given; keep one of them")
    if tars and options.shard_samples:
        raise UserError(
            f"shard_samples={options.shard_samples}: every tar of the source becomes one shard; take it away"
        )
    if options.detections and tars != Path(options.detections).is_dir():
        wanted = "the folder of LAION-Face's sample2detect_*.pth" if tars else "a .csv or .json of boxes by file name"
        kind = "tars" if tars else "images"
        raise UserError(f"detections={options.detections}: the source is a folder of {kind}; give {wanted}")


def task_of(options: PackConfig) -> tuple[int, int]:
    """(which task this is, of how many), from the keys or from Slurm's array. Raises UserError where they do not fit."""
    task, tasks = options.task, options.tasks
    if task is None and tasks is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        number, first, step = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"))
        )
        tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        task = (number - first) // max(1, step)
    if (task is None) != (tasks is None):
        raise UserError("task and tasks belong together; give both, like task=0 tasks=8, or none")
    if task is not None and tasks is not None and task >= tasks:
        raise UserError(f"task={task} of tasks={tasks}: tasks are counted from 0; give 0 to {tasks - 1}")
    return (task or 0, tasks or 1)
