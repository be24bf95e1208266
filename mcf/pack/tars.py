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
from typing import Any, BinaryIO

from mcf.data.ustar import BLOCK, only_times_and_owners, padding, read_header
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
_BUFFER = 1 << 18  # bytes that are read at once


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
        with path.open("rb", buffering=_BUFFER) as file:
            yield from _grouped(_Tar(file), name, options)
    except tarfile.ReadError as error:
        detail = "empty file" if not path.stat().st_size else f"no plain tar ({error})"
        yield LeftOut(name, DAMAGED_TAR, detail[:200])
    except OSError as error:
        yield LeftOut(name, UNREADABLE, error.strerror or str(error))


def _grouped(tar: _Tar, name: str, options: PackConfig) -> Iterator[Entry | LeftOut]:
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


def _members(tar: _Tar, name: str, options: PackConfig) -> Iterator[tuple[str, bytes] | LeftOut]:
    """(member, content) of the files that a sample is made of; what is left out, and where the tar breaks off."""
    read = 0
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, OSError, ValueError) as error:
            if not read and isinstance(error, (tarfile.ReadError, OSError)):
                raise
            yield LeftOut(name, DAMAGED_TAR, f"after {read} members: {error}"[:200])
            return
        if member is None:
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            if tar.block() != bytes(BLOCK):
                yield LeftOut(name, DAMAGED_TAR, f"after {read} members: no header and no end mark")
            return
        read += 1
        label = f"{name}/{member.name}"
        form = member.name.rpartition(".")[2].lower()
        limit = options.max_bytes if form in IMAGES else _MAX_JSON
        if member.folder:
            continue
        if member.name.startswith("/") or ".." in member.name.split("/"):
            yield LeftOut(label, UNSAFE)
        elif not member.file or form not in IMAGES | _TEXTS or "/" in member.name.removeprefix("./"):
            yield LeftOut(label, UNEXPECTED)
        elif member.size > limit:
            yield LeftOut(label, convert.TOO_LARGE, f"{member.size} bytes, the limit is {limit}")
        elif form != "txt":
            try:
                content = tar.read(member)
            except (tarfile.TarError, OSError) as error:
                yield LeftOut(name, DAMAGED_TAR, f"after {read - 1} members: {error}"[:200])
                return
            if len(content) < member.size:
                yield LeftOut(name, DAMAGED_TAR, f"ends inside {member.name}")
                return
            yield member.name.removeprefix("./"), content


@dataclass(frozen=True)
class _Member:
    """A member: its size in bytes, what it is, and tarfile's view of it if that read its header."""

    name: str
    size: int
    file: bool = True
    folder: bool = False
    info: tarfile.TarInfo | None = None


class _Tar:
    """The members of a tar, front to back. Plain headers are read here; from the first other one on, tarfile reads."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._next = 0  # where the next header begins
        self._rest: tarfile.TarFile | None = None

    def next(self) -> _Member | None:
        """The next member; None at the end, or at what is no header. Raises what tarfile raises."""
        if self._rest is None:
            if (member := self._plain()) or self.block() == bytes(BLOCK):
                return member
            self._file.seek(self._next)
            self._rest = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 – the caller closes the file
        info = self._rest.next()
        self._rest.members.clear()  # type: ignore[attr-defined]  # it remembers all: a tar of a million must not
        if info is None:
            self._next = self._rest.offset  # type: ignore[attr-defined]
            return None
        return _Member(info.name, info.size, info.isreg() and not info.issparse(), info.isdir(), info)

    def read(self, member: _Member) -> bytes:
        """The content of the member that `next` gave last; shorter than its size if the tar ends inside."""
        if self._rest is None:
            return self._file.read(member.size)
        reader = self._rest.extractfile(member.info) if member.info else None
        return reader.read() if reader else b""

    def block(self) -> bytes:
        """The block where the next header should be."""
        try:
            self._file.seek(self._next)
            return self._file.read(BLOCK)
        except OSError:
            return b""

    def _plain(self) -> _Member | None:
        """The next member if its header is plain, but for times and owners that a pax header before it may tell."""
        position = self._next
        while True:
            self._file.seek(position)
            header = read_header(self._file.read(BLOCK))
            if header is None:
                return None
            name, size, extended = header
            position += BLOCK + size + padding(size)
            if not extended:
                self._next = position
                return _Member(name, size)
            if size > _MAX_JSON or not only_times_and_owners(self._file.read(size)):
                return None


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
