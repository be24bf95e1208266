"""metrics.jsonl and events.jsonl: what a run says about itself, one JSON object a line.

    {"step": 120, "samples": 491520, "time": 1764000000.123, "loss/total": 7.31, "lr": 0.0024}

The file is the truth of a run's numbers; every other sink may lose something. So a line reaches the kernel in one
write as soon as it exists (a killed process loses nothing that was written), `sync` carries it to the disk where a
checkpoint needs it there, and a run that goes on from an earlier step first cuts the lines that it will write again:
the file always reads as one unbroken run. NaN and infinity, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity", so that every JSON reader opens the file.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Writer:
    """Appends to a file of JSON lines; safe to use from several threads.

    The file is opened for the first line. `cut` and `append` raise OSError (disk full, folder gone); the file then still
    reads well, and later lines that can be written again are.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = -1
        self._torn = False

    def cut(self, step: int) -> None:
        """Remove the last lines whose `step` is `step` or later: they are about to be written again."""
        with self._lock:
            self._open()
            end = os.fstat(self._file).st_size
            keep = 0
            with self.path.open("rb") as lines:
                for line in lines:
                    record = _parse(line)
                    if record is not None and record.get("step", -1) >= step:
                        break
                    keep += len(line)
            if keep < end:
                os.ftruncate(self._file, keep)
                self._torn = not _ends_with_newline(self._file)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; it survives the death of the process as soon as this returns."""
        line = json.dumps(_encode(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        with self._lock:
            self._open()
            if self._torn:
                line = b"\n" + line
            self._torn = True
            self._torn = os.write(self._file, line) != len(line)
            if self._torn:
                raise OSError(f"{self.path}: the disk took only a part of a line")

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; the writer is of no use afterwards."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        if self._file < 0:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                self._torn = not _ends_with_newline(file)
            except OSError:
                os.close(file)
                raise
            self._file = file


def read(path: str | Path) -> list[dict[str, Any]]:
    """All records of a file of JSON lines, in order; [] where the file is not there.

    Lines that are no JSON object (the torn end of a killed run, a damaged block) are left out.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also UnicodeDecodeError
        return None
    return {name: _decode(value) for name, value in record.items()} if isinstance(record, dict) else None


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _encode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_encode(item) for item in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy and torch
        return _encode(value.tolist())
    return str(value)


def _decode(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _ends_with_newline(file: int) -> bool:
    size = os.fstat(file).st_size
    return size == 0 or os.pread(file, 1, size - 1) == b"\n"
