"""Files that are whole or not there, whenever a process is killed or a disk is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A name beside `path`: what is written under it becomes `path` where the body ends well, else nothing is left of it.

    sync: the content is on the disk before it has its name, so that also a machine that crashes leaves the former file
    or all of the new one. Without, a crash of the process does.

    Raises OSError as the body and the disk do; `path` is then what it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file, text as UTF-8, that is whole or not there (see `replacing`)."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
