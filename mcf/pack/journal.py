"""The output folder while packing is under way: who works in it, with which settings, and how far.

    OUT/.packing/lock              held by the process that writes; the system drops it when that process dies
    OUT/.packing/settings.json     what the bytes of the output depend on
    OUT/.packing/shard-00000.json  written after its shard is in place: how many candidates are done, and their tally

A shard without its record is written again. The folder is removed when the manifest, written last, is in place.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcf import atomic
from mcf.data.shards import MANIFEST, UNFINISHED, Shard, index_path, load_manifest
from mcf.errors import UserError
from mcf.pack.report import Tally

VERSIONS = ("mcf", "pillow", "libjpeg", "torch", "dali")  # keys of the settings that name the software


@dataclass(frozen=True)
class Record:
    """A finished shard: the candidates of the writing order that are done after it, and what became of them."""

    shard: Shard
    done: int
    tally: Tally


class Journal:
    """Opens an output folder for writing; `records` are the shards that an interrupted run finished.

    `finished` is true if the folder was packed with these settings before. Raises UserError if another process
    writes there, the settings differ, or the folder holds something else.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out = out
        self._folder = out / UNFINISHED
        self.records: list[Record] = []
        self.finished = False
        self._prepare()
        try:
            self._compare(settings)
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out={self.out} is a file; name a folder")
        ours = (self.out / MANIFEST).exists() or self._folder.exists()
        if self.out.exists() and not ours and any(self.out.iterdir()):
            raise UserError(f"out={self.out} is not empty and was not written by mcf.pack; name a new folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"out={self.out}: another mcf.pack is writing there; wait for it, or name a new folder"
            ) from None

    def _compare(self, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        file = self._folder / "settings.json"
        if (self.out / MANIFEST).exists():
            self.finished = True
            before = load_manifest(self.out).meta.get("pack", {})
            refuse_difference(self.out, before, settings, finished=True)
        elif self._record(0).exists():
            refuse_difference(self.out, json.loads(file.read_text()), settings)
            self._resume()
        else:
            atomic.write(file, json.dumps(settings).encode())
            self._resume()

    def _resume(self) -> None:
        for stale in self.out.glob("*.tmp"):
            stale.unlink()
        while (file := self._record(len(self.records))).exists():
            content = json.loads(file.read_text())
            shard = Shard(**content["shard"])
            tar = self.out / shard.name
            if not (tar.exists() and tar.stat().st_size == shard.bytes and index_path(tar).exists()):
                break
            self.records.append(Record(shard, content["done"], Tally.from_json(content["tally"])))

    def shard_path(self, number: int) -> Path:
        """Where the tar of a shard goes."""
        return self.out / f"shard-{number:05d}.tar"

    def _record(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.json"

    def commit(self, record: Record) -> None:
        """Remember that a shard is in place."""
        content = {"shard": vars(record.shard), "done": record.done, "tally": record.tally.to_json()}
        atomic.write(self._record(len(self.records)), json.dumps(content).encode())
        self.records.append(record)

    def close(self) -> None:
        """Let go of the folder; once the manifest is there the journal has done its work."""
        if (self.out / MANIFEST).exists():
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()


def refuse_difference(out: Path, before: dict[str, Any], now: dict[str, Any], *, finished: bool = False) -> None:
    """Raise UserError for the first setting that is not what the folder was begun with.

    finished: nothing will be written, so that other versions of the libraries are no reason to refuse.
    """
    for key in [*now, *before]:
        if (finished and key in VERSIONS) or before.get(key) == now.get(key):
            continue
        if key in ("files", "boxes"):
            changed = now["source"] if key == "files" else now["detections"]
            raise UserError(f"out={out} was begun with other files: {changed} has changed since; name a new folder")
        raise UserError(
            f"out={out} was begun with {key}={before.get(key)}, now it is {now.get(key)}; use that, or name a new folder"
        )
