"""Checkpoints as files: staged, sealed with a manifest, renamed, verified before they are believed.

    RUN/checkpoints/step-00001000/      a whole checkpoint: whatever files its writer put there
                    step-00001000/MANIFEST.json    sizes and sha256 of all of them, written last
    RUN/checkpoints/.staging-step-…     a save that has not ended, or never will
    RUN/checkpoints/damaged-step-…      a checkpoint that failed its checksums when a run wanted to go on from it

A save goes into a staging folder; when all its files are written and on disk, the manifest seals them and one rename
puts the folder in place. So a folder under its right name is whole, unless the disk damages it afterwards: that is
what the checksums are for. A full disk or a crash loses only that save. This module knows files, not tensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mcf.errors import UserError
from mcf.exits import UNAVAILABLE

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
PAUSES = (0.5, 2.0, 10.0)  # seconds before each further try to read a checkpoint
_NAME = re.compile(r"step-(\d{8,})$")


class SaveFailed(Exception):
    """A save came to nothing (disk full, I/O error); every earlier checkpoint is untouched. One line."""


@dataclass(frozen=True)
class Damage:
    """A checkpoint that must not be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def make_run_dir(run_dir: str | Path, *folders: str) -> None:
    """Make a run directory and folders in it; those that are there stay. Raises UserError where it cannot be made."""
    try:
        for folder in (run_dir, *(Path(run_dir) / name for name in folders)):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        output = Path(run_dir).parent
        raise UserError(f"output={output}: {run_dir} cannot be made ({error.strerror}); set output=") from None


def folder_of(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(run_dir) / "checkpoints"


def step_of(path: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    match = _NAME.search(path.name)
    if not match:
        raise ValueError(f"{path} is not the name of a checkpoint")
    return int(match.group(1))


def steps(run_dir: str | Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first, whole or not."""
    folder = folder_of(run_dir)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def verify(path: Path) -> Damage | None:
    """Hold a checkpoint against its manifest: every file there, of its size, with its sha256.

    Raises OSError where the storage does not answer, which says nothing of the checkpoint.
    """
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return Damage(path, f"no {MANIFEST}: the save never ended")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Damage(path, f"{MANIFEST} is damaged ({error!r})")
    if not expected:
        return Damage(path, f"{MANIFEST} is damaged (it names no files)")
    for name, length, checksum in expected:
        file = path / name
        try:
            size = file.stat().st_size
            if size != length:
                return Damage(path, f"{name} has {size} bytes, not {length}")
            if _sha256(file) != checksum:
                return Damage(path, f"{name} does not have the checksum it was written with")
        except FileNotFoundError:
            return Damage(path, f"{name} is not there")
    return None


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that is whole; older ones are fallen back to, and each damage is logged."""
    return newest(run_dir)[0]


def newest(run_dir: str | Path) -> tuple[Path | None, list[Damage]]:
    """The newest whole checkpoint, and the damaged newer ones that were passed over.

    One that cannot be read is tried again for some seconds, and is damaged if the storage then gives an older one.
    Raises UserError (UNAVAILABLE) where it gives none.
    """
    damaged: list[Damage] = []
    silent: OSError | None = None
    for path in reversed(steps(run_dir)):
        try:
            damage = _verify_patiently(path)
        except OSError as error:
            silent, damage = error, Damage(path, f"cannot be read ({error.strerror})")
        if damage is None:
            return path, damaged
        log.warning("damaged checkpoint passed over: %s", damage)
        damaged.append(damage)
    if silent is not None:
        raise UserError(
            f"{folder_of(run_dir)}: no checkpoint in it can be read ({silent.strerror}); launch again when the storage answers",
            UNAVAILABLE,
        )
    return None, damaged


def _verify_patiently(path: Path) -> Damage | None:
    for pause in PAUSES:
        try:
            return verify(path)
        except OSError as error:  # noqa: PERF203
            log.warning("%s cannot be read (%s), tried again in %g s", path, error.strerror, pause)
            time.sleep(pause)
    return verify(path)


def take_up(run_dir: str | Path) -> Path | None:
    """The checkpoint that a run goes on from, None at its beginning; damaged newer ones are renamed to damaged-….

    So they neither count among those kept nor are looked at again.
    Raises UserError where there are checkpoints, but none is whole: a run does not start again by itself.
    """
    path, damaged = newest(run_dir)
    if damaged and path is None:
        raise UserError(
            f"{damaged[0]}; and no older checkpoint is whole: put one back, or delete {folder_of(run_dir)} to start again"
        )
    for damage in damaged:
        aside = damage.path.with_name(f"damaged-{damage.path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        damage.path.replace(aside)
    return path


@contextlib.contextmanager
def save(run_dir: str | Path, step: int, *, keep: int, keep_every: int = 0) -> Iterator[Path]:
    """Give a staging folder; when the block ends, seal it and put it in place as the checkpoint of `step`.

    Afterwards the `keep` newest checkpoints stay, and those whose step is a multiple of `keep_every` (if not 0).
    Raises SaveFailed on any I/O error, inside the block or here; then nothing of this save is left behind, and
    everything saved before still stands.
    """
    folder = folder_of(run_dir)
    final = folder / f"step-{step:08d}"
    staging = folder / f".staging-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)  # what is new in RUN, this folder and the files of lines
        _sweep(folder)
        staging.mkdir()
        yield staging
        _seal(staging)
        if final.exists():
            _remove(final)
        staging.replace(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise SaveFailed(_why(error, folder)) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _retire(run_dir, keep, keep_every)


def _why(error: OSError, folder: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return f"checkpoint not saved in {folder}: {reason} ({free / 1e9:.2f} GB free); the last whole one stands, free some space"
    return f"checkpoint not saved in {folder}: {reason}; the last whole one stands"


def _seal(staging: Path) -> None:
    """Put every file and folder on disk, then write the manifest over them, last."""
    files = {}
    for file in sorted(staging.rglob("*")):
        if file.is_dir():
            _sync_folder(file)
            continue
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    with (staging / MANIFEST).open("w") as handle:
        json.dump({"files": files}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    _sync_folder(staging)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what earlier saves and removals left when they were cut off."""
    for leftover in (*folder.glob(".staging-*"), *folder.glob(".old-*")):
        # One that does not go (an open file on NFS) is in nobody's way; this save's own staging folder, mkdir asks for.
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    """Take a checkpoint away: renamed first, so that a removal cut short never looks like a damaged checkpoint."""
    doomed = path.with_name(f".old-{path.name}")
    path.replace(doomed)
    shutil.rmtree(doomed)


def _retire(run_dir: str | Path, keep: int, keep_every: int) -> None:
    """Remove checkpoints beyond the `keep` newest; a folder that will not go is only logged."""
    try:
        old = steps(run_dir)[:-keep]
    except OSError as error:
        log.warning("old checkpoints of %s could not be looked for: %s", run_dir, error.strerror)
        return
    for path in old:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        try:
            _remove(path)
        except OSError as error:
            log.warning("old checkpoint %s could not be removed: %s", path, error.strerror)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
