"""The mode of files that a library makes for its owner alone (safetensors: 0600), where runs are shared by a group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def as_umask_asks(path: Path) -> Iterator[None]:
    """Whatever is written at `path` inside ends with the mode of a file that open() makes there, or the one it had."""
    path.touch()  # umask is the process's, not to be read without setting it; a folder's ACL has a say too
    mode = path.stat().st_mode
    yield
    if path.stat().st_mode != mode:
        path.chmod(mode)
