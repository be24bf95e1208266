"""img2dataset's tars: samples KEY.jpg, KEY.json, KEY.txt one after another, read front to back and never unpacked.

    SOURCE/split_00003/00012.tar             KEY repeats across splits: identity is (folder, KEY), or the JSON's SAMPLE_ID
    SOURCE/split_00003/00012.parquet         one row a link, those that failed too; here it says how many, and why
    SOURCE/split_00003/00012_stats.json

A tar comes from the net, so nothing in it is believed: names are text and never paths, sizes are held against limits
before anything is read, links, devices and sparse files are left out, and a tar that is damaged gives what lies before
the damage. Everything left out is named with its reason.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcf.pack import convert
from mcf.pack.options import PackConfig
from mcf.pack.source import UNREADABLE, LeftOut

UNEXPECTED = "unexpected member"
UNSAFE = "unsafe name"
SEEN = "name seen before"
NO_IMAGE = "no image"
DAMAGED_TAR = "damaged tar"
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
_TEXTS = frozenset({"json", "txt"})
_MAX_JSON = 1 << 20  # bytes; img2dataset's are under 2 kB


@dataclass
class Entry:
    """A sample of a tar: its name (TAR/KEY.jpg, below the source), the image's bytes, and what KEY.json says."""

    name: str
    content: bytes
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sample_id(self) -> int | None:
        """LAION's SAMPLE_ID, if KEY.json has one."""
        value = self.facts.get("SAMPLE_ID", self.facts.get("sample_id"))
        try:
            return int(value) if value is not None and not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            return None

    @property
    def key(self) -> str:
        """KEY, as the parquet has it."""
        return self.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    @property
    def resized(self) -> tuple[float, float] | None:
        """What img2dataset multiplied (width, height) with, as far as KEY.json tells; None if it did not resize."""
        try:
            width, height = (float(self.facts[k]) / float(self.facts[f"original_{k}"]) for k in ("width", "height"))
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        return None if (width, height) == (1, 1) else (width, height)


def entries(path: Path, name: str, options: PackConfig) -> Iterator[Entry | LeftOut]:
    """The samples of a tar in their order, and what is left out of it. `name` is the tar's below the source.

    Holds one sample at a time. Raises nothing for what is wrong with the tar.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _grouped(tar, name, options)
    except tarfile.ReadError as error:
        detail = "empty file" if not path.stat().st_size else f"no plain tar ({error})"
        yield LeftOut(name, DAMAGED_TAR, detail[:200])
    except OSError as error:
        yield LeftOut(name, UNREADABLE, error.strerror or str(error))


def _grouped(tar: tarfile.TarFile, name: str, options: PackConfig) -> Iterator[Entry | LeftOut]:
    """Members with one KEY that follow each other are one sample."""
    seen: set[str] = set()
    group: _Group | None = None
    for item in _members(tar, name, options):
        member = item.name.removeprefix(f"{name}/") if isinstance(item, LeftOut) else item[0]
        key, _, form = member.rpartition(".")
        if group is None or group.key != key:
            yield from group.finished(name) if group else ()
            group = _Group(key)
        if isinstance(item, LeftOut):
            group.answered = True
            yield item
        elif form.lower() not in IMAGES:
            group.facts = _parsed(item[1])
        elif member in seen or group.entry is not None:
            group.answered = True
            yield LeftOut(f"{name}/{member}", SEEN, "another image of this name comes before it")
        else:
            seen.add(member)
            group.entry = Entry(f"{name}/{member}", item[1])
    yield from group.finished(name) if group else ()


@dataclass
class _Group:
    """A sample under way. `answered`: something of it was left out already, and so named."""

    key: str
    entry: Entry | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    answered: bool = False

    def finished(self, name: str) -> Iterator[Entry | LeftOut]:
        if self.entry is not None:
            self.entry.facts = self.facts
            yield self.entry
        elif not self.answered:
            yield LeftOut(f"{name}/{self.key}", NO_IMAGE, str(self.facts.get("error_message") or "")[:200])


def _members(tar: tarfile.TarFile, name: str, options: PackConfig) -> Iterator[tuple[str, bytes] | LeftOut]:
    """(member, content) of the files that a sample is made of; what is left out, and where the tar breaks off."""
    read = 0
    while True:
        try:
            info = tar.next()
        except (tarfile.TarError, OSError, ValueError) as error:
            yield LeftOut(name, DAMAGED_TAR, f"after {read} members: {error}"[:200])
            return
        if info is None:
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            if _block(tar) != bytes(tarfile.BLOCKSIZE):
                yield LeftOut(name, DAMAGED_TAR, f"after {read} members: no header and no end mark")
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers them all: a tar of a million members must not
        read += 1
        label = f"{name}/{info.name}"
        form = info.name.rpartition(".")[2].lower()
        limit = options.max_bytes if form in IMAGES else _MAX_JSON
        if info.isdir():
            continue
        if info.name.startswith("/") or ".." in info.name.split("/"):
            yield LeftOut(label, UNSAFE)
        elif not info.isreg() or info.issparse() or form not in IMAGES | _TEXTS or "/" in info.name.removeprefix("./"):
            yield LeftOut(label, UNEXPECTED)
        elif info.size > limit:
            yield LeftOut(label, convert.TOO_LARGE, f"{info.size} bytes, the limit is {limit}")
        elif form != "txt":
            reader = tar.extractfile(info)
            try:
                content = reader.read() if reader else b""
            except (tarfile.TarError, OSError) as error:
                yield LeftOut(name, DAMAGED_TAR, f"after {read - 1} members: {error}"[:200])
                return
            if len(content) < info.size:
                yield LeftOut(name, DAMAGED_TAR, f"ends inside {info.name}")
                return
            yield info.name.removeprefix("./"), content


def _block(tar: tarfile.TarFile) -> bytes:
    """The block where the next header should be."""
    file = tar.fileobj
    assert file is not None
    try:
        file.seek(tar.offset)  # type: ignore[attr-defined]
        return file.read(tarfile.BLOCKSIZE)
    except OSError:
        return b""


def _parsed(content: bytes) -> dict[str, Any]:
    """KEY.json; nothing if it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Links:
    """What the parquet beside a tar says: how its downloads ended, and SAMPLE_ID by KEY. None without one."""

    ends: dict[str, int]
    sample_ids: dict[str, int]


def links(tar: Path) -> Links | str:
    """Read TAR's parquet; if there is none or it cannot be read, why."""
    path = tar.with_suffix(".parquet")
    if not path.exists():
        return "no parquet"
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        return "pyarrow is not installed"
    try:
        names = set(parquet.read_schema(path).names)
        columns = [n for n in ("key", "status", "SAMPLE_ID") if n in names]
        rows = parquet.read_table(path, columns=columns).to_pylist()
        ends = Counter(str(row.get("status") or "unknown") for row in rows)
        named = (row for row in rows if row.get("SAMPLE_ID") is not None and row.get("key") is not None)
        return Links(dict(ends), {str(row["key"]): int(row["SAMPLE_ID"]) for row in named})
    except Exception as error:  # whatever a damaged file brings about
        return f"unreadable parquet ({type(error).__name__})"
