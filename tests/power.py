"""A disk as a power loss would leave it: of a file what its last fsync found, of a folder the names that its last found.

Imported by tests of what is written; nothing but a renaming of what is not on the disk fails in here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Disk:
    """Sees every os.fsync and Path.replace from here on, which do what they always do.

    renamed: (old name, new name) so far. before: files that have to be on the disk before anything is called step-….
    """

    def __init__(self, monkeypatch: Any, *before: Path):
        self.kept: dict[int, bytes | dict[str, int]] = {}
        self.renamed: list[tuple[str, str]] = []
        fsync, replace = os.fsync, Path.replace

        def synced(file: int) -> None:
            fsync(file)
            self.kept[os.fstat(file).st_ino] = now(Path(f"/proc/self/fd/{file}").resolve())

        def renamed(path: Path, target: Path) -> Path:
            if not path.name.startswith("step-"):  # to be removed
                self.renamed.append((path.name, Path(target).name))
                for needed in (path, *(before if Path(target).name.startswith("step-") else ())):
                    assert self.has(needed), f"{needed} is not on the disk, and {path} is called {target}"
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", renamed)

    def has(self, path: Path) -> bool:
        """Whether a power loss would leave a file, or a folder with all that is in it, as it is now."""
        inside = path.iterdir() if path.is_dir() else ()
        return self.kept.get(path.stat().st_ino) == now(path) and all(map(self.has, inside))


def now(path: Path) -> bytes | dict[str, int]:
    """Content of a file; names in a folder, and what each is."""
    if path.is_dir():
        return {entry.name: entry.stat().st_ino for entry in path.iterdir()}
    return path.read_bytes()
