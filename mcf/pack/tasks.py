"""Packing a source in parts, by one process or by a Slurm array of them.

    every task:   the units of the source ──► detections converted, once ──► its share of the parts ──► is all made?
    the last one: duplicates out ──► shards in place ──► report ──► manifest

Task i of n makes the parts of units i, i+n, i+2n …; what is made already is kept, whoever made it, so that a task that
died is simply started again, and the number of tasks may change. Without tasks one process does it all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, features

import mcf
from mcf.data.shards import MANIFEST, UNFINISHED, Manifest, load_manifest
from mcf.errors import UserError
from mcf.pack import crew, detections, inputs
from mcf.pack.inputs import Source, Unit
from mcf.pack.journal import refuse_difference
from mcf.pack.merge import merge
from mcf.pack.options import PackConfig
from mcf.pack.parts import Packer, Record, record_path
from mcf.pack.progress import meter
from mcf.pack.source import Candidate, LeftOut


def pack_parts(
    source: Path, found: Sequence[Candidate | LeftOut], out: Path, options: PackConfig, workers: int
) -> Manifest | None:
    """Make this task's parts, and the whole once all are there. None if other tasks have parts to make."""
    inputs.check(options, inputs.tars_in(found))
    task, tasks = inputs.task_of(options)
    whole = inputs.survey(found, options)
    shared = _Folder(out, _settings(source, whole, options))
    with shared.joined():
        if shared.finished:
            return shared.said_finished()
        missing = _missing(shared.parts, whole.units, range(task, len(whole.units), tasks))
        if missing:
            tables = _tables(options, task, tasks)
            _make(missing, shared.parts, tables, options, workers)
    with shared.alone():
        if shared.finished:
            return shared.said_finished()
        left = _missing(shared.parts, whole.units, range(len(whole.units)))
        if left:
            print(
                f"task {task} of {tasks} is done; {len(left):,} of {len(whole.units):,} parts are other tasks' to make"
            )
            return None
        if not options.merge:
            print(f"task {task} of {tasks} is done, and all parts are there to be merged (merge=false)")
            return None
        return merge(whole, shared.parts, out, options, shared.settings)


def _settings(source: Path, whole: Source, options: PackConfig) -> dict[str, Any]:
    """What the bytes of the output depend on."""
    return {
        "source": str(source),
        **options.decisive(),
        "detections": options.detections and str(Path(options.detections).resolve()),
        "files": whole.digest,
        "boxes": _boxes_digest(options, whole),
        "mcf": mcf.__version__,
        "pillow": Image.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "torch": _version("torch"),
        "dali": _version("nvidia-dali-cuda130"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _boxes_digest(options: PackConfig, whole: Source) -> str | None:
    """Names and sizes of LAION-Face's pickles, or the content of a file of boxes."""
    if not options.detections:
        return None
    path = Path(options.detections)
    if path.is_dir():
        text = json.dumps([[file.name, file.stat().st_size] for file in detections.pickles(path)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    names = detections.boxes(path)  # says what is wrong with it
    known = {file.name for unit in whole.units for file in unit.files}
    if not names.keys() & known:
        example = next(iter(names), "nothing")
        raise UserError(
            f"detections={path}: none of the files it names is in the source (the first: {example}); name them by their "
            "path below the source, with slashes"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _tables(options: PackConfig, task: int, tasks: int) -> list[Path]:
    """The folders of converted pickles; each task begins elsewhere, so that they share the converting."""
    if not options.detections or not Path(options.detections).is_dir():
        return []
    count = len(detections.pickles(Path(options.detections)))
    folder = Path(options.converted) if options.converted else None
    return detections.converted(Path(options.detections), folder, begin=task * count // tasks)


def _missing(parts: Path, units: Sequence[Unit], numbers: range) -> list[Unit]:
    return [units[number] for number in numbers if not record_path(parts, number).exists()]


def _make(units: list[Unit], parts: Path, tables: list[Path], options: PackConfig, workers: int) -> None:
    left_out = 0
    with meter(len(units), 0, "parts") as progress:

        def told(_: str, images: int) -> None:
            progress.note(images)

        record: Record
        for record in crew.run(Packer, (options, parts, tables), units, min(workers, len(units)), told):
            left_out += record.tally.out
            progress.advance(left_out)


class _Folder:
    """The output folder that tasks share: settings that all agree on, and a lock.

    Tasks hold the lock together while they make parts; the one that merges holds it alone, which it can once all others
    have let go.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, json.loads(json.dumps(settings))
        self.parts = out / UNFINISHED / "parts"

    @property
    def finished(self) -> bool:
        """Whether the manifest is there; with other settings than these that is a UserError."""
        if not (self.out / MANIFEST).exists():
            return False
        refuse_difference(self.out, load_manifest(self.out).meta.get("pack", {}), self.settings, finished=True)
        return True

    def said_finished(self) -> Manifest:
        manifest = load_manifest(self.out)
        print(f"{self.out} is packed already: {manifest.samples:,} images in {len(manifest.shards):,} shards")
        return manifest

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Work in the folder beside other tasks."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out={self.out} is a file; name a folder")
        ours = (self.out / MANIFEST).exists() or (self.out / UNFINISHED).exists()
        if self.out.exists() and not ours and any(self.out.iterdir()):
            raise UserError(f"out={self.out} is not empty and was not written by mcf.pack; name a new folder")
        if (self.out / MANIFEST).exists():
            yield
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH, self._begin):
            self._agree()
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work in the folder when no other task does."""
        if (self.out / MANIFEST).exists():
            yield
            return
        with self._locked(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _locked(self, how: int, first: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock; `first` is called before, if nobody else holds it then."""
        try:
            file = (self.out / UNFINISHED / "lock").open("a")
        except FileNotFoundError:  # another task has merged and cleared it away meanwhile
            yield
            return
        with file:
            if first is not None:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    first()
            fcntl.flock(file, how)
            yield

    def _begin(self) -> None:
        """Alone, and no part is made: what an earlier attempt wanted does not matter."""
        file = self.out / UNFINISHED / "settings.json"
        if not any(self.parts.glob("*.json")):
            file.unlink(missing_ok=True)
        for stale in self.parts.glob(".scratch-*"):
            shutil.rmtree(stale, ignore_errors=True)

    def _agree(self) -> None:
        """Write the settings, or hold them against those that are there; a link is made by one task alone."""
        file = self.out / UNFINISHED / "settings.json"
        mine = file.with_name(f"settings.{os.uname().nodename}-{os.getpid()}")
        mine.write_text(json.dumps(self.settings))
        try:
            file.hardlink_to(mine)
        except FileExistsError:
            refuse_difference(self.out, json.loads(file.read_text()), self.settings)
        finally:
            mine.unlink()
