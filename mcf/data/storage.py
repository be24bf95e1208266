"""Where shards lie: a folder, or any URL that fsspec knows (s3, gs, http, hf …). The only door to fsspec.

Both give bytes of a file from a place on, raise OSError for whatever goes wrong, and may be used by several threads.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

from mcf.errors import UserError, missing_package


class EndsEarly(OSError):
    """A file that is shorter than it should be: what lies before its end can be read."""

    def __init__(self, missing: int):
        super().__init__(f"file ends {missing} bytes early")


class Storage(Hashable, Protocol):
    """Files of one folder by their names."""

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`. Raises OSError if the file ends before, or cannot be read."""

    def whole(self, name: str) -> bytes:
        """All of a (small) file. Raises OSError."""

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local one. Raises OSError."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def storage_of(path: str | Path) -> Storage:
    """The storage of a folder or URL. Raises UserError for a URL that no installed package can open."""
    return Remote(str(path)) if is_remote(path) else Local(Path(path))


class Local:
    """A folder. A file is opened for each read and closed after it: no handle outlives a fail-over of the storage."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`."""
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts, missing = [], size
            while missing:
                part = os.pread(descriptor, missing, start + size - missing)
                if not part:
                    raise EndsEarly(missing)
                parts.append(part)
                missing -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(descriptor)

    def whole(self, name: str) -> bytes:
        """All of a file."""
        return (self.folder / name).read_bytes()

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file."""
        with (self.folder / name).open("rb") as source, target.open("wb") as copy:
            while block := source.read(1 << 22):
                copy.write(block)


class Remote:
    """A URL. Keys, endpoints and regions come from where fsspec's file systems take them: files and environment."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._files, self._root = _opened(self.url)

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`."""
        content = self._told(self._files.cat_file, f"{self._root}/{name}", start=start, end=start + size)
        if len(content) != size:
            raise EndsEarly(size - len(content))
        return content

    def whole(self, name: str) -> bytes:
        """All of a file."""
        return self._told(self._files.cat_file, f"{self._root}/{name}")

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file."""
        self._told(self._files.get_file, f"{self._root}/{name}", str(target))

    @staticmethod
    def _told(function, *arguments, **keys) -> Any:
        """Call it; whatever a file system's own package raises becomes an OSError."""
        try:
            return function(*arguments, **keys)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from None


def _opened(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise missing_package("fsspec", f"reading {url}") from None
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {protocol}:// needs another package ({error})") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; fsspec names the protocols it knows") from None
