"""Where images come from: a folder, walked so that every file in it is accounted for.

A source yields candidates, each with a name that is its own within the source, and what had to be left out before
any decoding. Nothing is skipped in silence: a folder that cannot be opened counts as one thing found and left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DUPLICATE = "duplicate"
UNREADABLE = "unreadable"
NOT_A_FILE = "not a file"
LINK_LOOP = "folder seen before"


@dataclass(frozen=True)
class Candidate:
    """A file that may become a sample. `name` is its path below the source, with slashes; `size` in bytes."""

    name: str
    path: str
    size: int

    @property
    def key(self) -> str:
        """Key of the sample: letters, digits, '_' and '-' only; the same wherever the source lies."""
        stem = unicodedata.normalize("NFKD", self.name.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        slug = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_")[:40] or "image"
        return f"{slug}-{hashlib.sha256(os.fsencode(self.name)).hexdigest()[:16]}"


@dataclass(frozen=True)
class LeftOut:
    """Something that was found and is not in the shards."""

    name: str
    reason: str
    detail: str = ""


class Folder:
    """All files below a folder, links followed, each real folder entered once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def walk(self) -> Iterator[Candidate | LeftOut]:
        """Everything found, in an order that depends on names alone (real folders first, then links to folders)."""
        seen: set[tuple[int, int]] = set()
        linked: list[str] = [""]
        while linked:
            later: list[str] = []
            for start in linked:
                yield from self._walk_tree(start, seen, later)
            linked = sorted(later)

    def _walk_tree(self, start: str, seen: set[tuple[int, int]], linked: list[str]) -> Iterator[Candidate | LeftOut]:
        waiting = [start]
        while waiting:
            name = waiting.pop()
            folder = self.root / name
            try:
                status = folder.stat()
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                yield LeftOut(f"{name}/", UNREADABLE, _why(error))
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                yield LeftOut(f"{name}/", LINK_LOOP, "a link to a folder that was read under another name")
                continue
            seen.add(identity)
            folders: list[str] = []
            for entry in entries:
                below = f"{name}/{entry.name}" if name else entry.name
                try:
                    mode = entry.stat()
                except OSError as error:
                    yield LeftOut(below, UNREADABLE, _why(error))
                    continue
                if stat.S_ISDIR(mode.st_mode):
                    (linked if entry.is_symlink() else folders).append(below)
                elif stat.S_ISREG(mode.st_mode):
                    yield Candidate(below, entry.path, mode.st_size)
                else:
                    yield LeftOut(below, NOT_A_FILE)
            waiting.extend(reversed(folders))


def without_duplicates(
    candidates: Iterable[Candidate], threads: int, *, digest: Callable[[Candidate], str | None] | None = None
) -> tuple[list[Candidate], list[LeftOut]]:
    """Of files with the same bytes, keep the one whose name sorts first.

    Only files of equal length are read. One that cannot be read stays a candidate: its reason comes with decoding.
    """
    by_size: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        by_size.setdefault(candidate.size, []).append(candidate)
    unsure = sorted((c for same in by_size.values() if len(same) > 1 for c in same), key=lambda c: c.name)
    with ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(digest or _digest, unsure))
    first: dict[str, str] = {}
    doubles: list[LeftOut] = []
    for candidate, value in zip(unsure, digests):
        if value is not None and first.setdefault(value, candidate.name) != candidate.name:
            doubles.append(LeftOut(candidate.name, DUPLICATE, f"same bytes as {first[value]}"))
    dropped = {double.name for double in doubles}
    return [c for same in by_size.values() for c in same if c.name not in dropped], doubles


def mixed(candidates: Iterable[Candidate], seed: int) -> list[Candidate]:
    """The order of writing: random by the seed, and the same with any version of any random generator."""

    def place(candidate: Candidate) -> bytes:
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(candidate.name)).digest()

    return sorted(candidates, key=place)


def read(candidate: Candidate) -> bytes:
    """The bytes of a candidate. Raises OSError."""
    return Path(candidate.path).read_bytes()


def _digest(candidate: Candidate) -> str | None:
    try:
        with Path(candidate.path).open("rb") as file:
            value = hashlib.sha256()
            while block := file.read(1 << 20):
                value.update(block)
            return value.hexdigest()
    except OSError:
        return None


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
