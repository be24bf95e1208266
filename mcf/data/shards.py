"""Shards: JPEGs in tar files, an index beside each, and one manifest over all.

    DIR/manifest.json            what is in the folder: shards with samples, bytes and checksums
    DIR/shard-00000.tar          plain webdataset tar: KEY.jpg (and KEY.json beside it), in order
    DIR/shard-00000.index.npy    one row a sample: where its JPEG lies in the tar, and its key

The index is a plain NumPy array that is memory-mapped: reading a window of samples is one seek and one read, opening a
shard costs nothing that grows with its length. Everything is written under a temporary name and renamed, so that a
file under its right name is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from mcf import atomic
from mcf.data import ustar
from mcf.data.storage import Storage, is_remote, storage_of
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = ".packing"  # folder of an output whose packing has not ended
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar of the manifest: file name, number of samples, size in bytes, sha256 of the tar in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder, in order. `url` is the folder's where it is a remote one; `path` is its name then."""

    path: Path
    shards: tuple[Shard, ...]
    meta: dict[str, Any]
    url: str = ""

    @property
    def storage(self) -> Storage:
        """What its files are read through."""
        return storage_of(self.url or self.path)

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples of each shard, int64 [shards]."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the data in 16 hex digits: equal for equal shards in equal order, wherever they lie."""
        text = json.dumps([[s.name, s.samples, s.sha256] for s in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def index(self, shard: int) -> np.ndarray:
        """The memory-mapped index of a shard: structured rows (offset int64, size int64, key bytes)."""
        path = index_path(self.path / self.shards[shard].name)
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: unreadable index ({error}); {_restore(self.path)}") from None
        if len(rows) != self.shards[shard].samples:
            raise UserError(
                f"{path}: {len(rows)} samples, {MANIFEST} says {self.shards[shard].samples}; {_restore(self.path)}"
            )
        return rows


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.npy")


def load_manifest(path: str | Path, *, check: bool = True, key: str = "data.path", lost: float = 0.0) -> Manifest:
    """Read the manifest of a folder, and hold it against the files (sizes only: it is done at every start).

    lost: share of its samples (of at least 100) whose shards may be missing or truncated: these are warned of. A run that has
    begun bears them, as it did when they went.

    Raises UserError, which names the `key` that the folder was given by, if it is missing, empty, not packed, or does not
    fit its manifest (a truncated tar).
    """
    if is_remote(path):
        return _load_remote(str(path), key)
    folder = Path(path)
    pack = "pack images with: python -m mcf.pack source=IMAGES out="
    if not folder.exists():
        raise UserError(f"{key}={folder}: no such folder; {pack}{folder}")
    if not folder.is_dir():
        raise UserError(f"{key}={folder} is a file; give the folder that mcf.pack wrote, or {pack}FOLDER")
    file = folder / MANIFEST
    if not file.exists():
        if (folder / UNFINISHED).is_dir():
            raise UserError(f"{key}={folder}: packing has not ended; give the same mcf.pack command again")
        if any(folder.iterdir()):
            raise UserError(f"{key}={folder}: no {MANIFEST} in it, so mcf.pack did not write it; {pack}NEW_FOLDER")
        raise UserError(f"{key}={folder}: the folder is empty; {pack}{folder}")
    try:
        text = file.read_text()
    except OSError as error:
        if not isinstance(error, PermissionError):
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); launch again when it can be", UNAVAILABLE
            ) from None
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise UserError(f"{file}: damaged manifest ({error!r}); {_restore(folder)}") from None
    manifest = _parsed(text, file, _restore(folder), folder)
    if check:
        _hold_against_files(manifest, lost)
    return manifest


def _parsed(text: str | bytes, file: object, remedy: str, folder: Path, url: str = "") -> Manifest:
    """The manifest that a manifest.json states."""
    try:
        content = json.loads(text)
        shards = tuple(Shard(s["name"], int(s["samples"]), int(s["bytes"]), s["sha256"]) for s in content["shards"])
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged manifest ({error!r}); {remedy}") from None
    if version != FORMAT:
        raise UserError(f"{file}: format {version}, this version reads {FORMAT}; {remedy}")
    manifest = Manifest(folder, shards, content.get("meta", {}), url)
    if not manifest.samples:
        raise UserError(f"{file}: no samples in it; {remedy}")
    return manifest


def _load_remote(url: str, key: str) -> Manifest:
    """The manifest of a remote folder. Its files are not looked at: that would be thousands of requests at every start."""
    file = f"{url.rstrip('/')}/{MANIFEST}"
    try:
        text = storage_of(url).whole(MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{key}={url}: no {MANIFEST} there; copy a folder that mcf.pack wrote to it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); check the address, the network and your keys") from None
    return _parsed(text, file, "copy the folder there again", Path(url), url)


def _hold_against_files(manifest: Manifest, lost: float) -> None:
    left = lost * max(manifest.samples, 100)
    for shard in manifest.shards:
        if wrong := _wrong(manifest.path / shard.name, shard):
            left -= shard.samples
            if left < 0:
                raise UserError(f"{wrong}; {_restore(manifest.path)}")
            log.warning("%s; its samples are bad where they cannot be read", wrong)


def _wrong(tar: Path, shard: Shard) -> str:
    """What is wrong with the files of a shard; "" if nothing is."""
    for file in (tar, index_path(tar)):
        if not file.exists():
            return f"{file}: named by {MANIFEST} but not there"
    size = tar.stat().st_size
    return "" if size == shard.bytes else f"{tar}: {size} bytes, {MANIFEST} says {shard.bytes} (truncated or changed)"


def sight(path: str | Path) -> str:
    """What this machine sees in a folder, to be compared with what others see: one file read and one listing.

    Fingerprint of the manifest and files of it that are not there, or what is wrong with the manifest; never raises.
    """
    try:
        manifest = load_manifest(path, check=False)
        if manifest.url:
            return f"fingerprint {manifest.fingerprint} of {manifest.url}"
        with os.scandir(manifest.path) as entries:
            there = {entry.name for entry in entries}
    except UserError as error:
        return str(error).partition(";")[0]
    except OSError as error:
        return f"{path}: {error.strerror}"
    names = [file.name for shard in manifest.shards for file in (Path(shard.name), index_path(Path(shard.name)))]
    missing = [name for name in names if name not in there]
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return f"fingerprint {manifest.fingerprint} of {manifest.path}" + (
        f" without {missing[0]}{more}" if missing else ""
    )


def _restore(folder: Path) -> str:
    """The remedy for damage. Packing is reproducible: what is packed again the same way is the same data to a run."""
    return f"restore it, or delete {folder} and pack it again: python -m mcf.pack source=IMAGES out={folder}"


def verify(manifest: Manifest) -> None:
    """Read every shard in full and hold it against its checksum and its index; load_manifest looks at sizes alone.

    Raises UserError naming the first shard that is not as it was written.
    """
    for number, shard in enumerate(manifest.shards):
        tar = manifest.path / shard.name
        with tar.open("rb") as file:
            digest = _sha256(file)
        if digest != shard.sha256:
            raise UserError(f"{tar}: its checksum is not the one in {MANIFEST}; {_restore(manifest.path)}")
        with tarfile.open(tar) as content:
            found = [(m.offset_data, m.size, m.name[:-4].encode()) for m in content if m.name.endswith(".jpg")]
        if found != [(int(offset), int(size), key) for offset, size, key in manifest.index(number)]:
            raise UserError(f"{index_path(tar)}: does not fit its tar; {_restore(manifest.path)}")


def write_manifest(path: str | Path, shards: list[Shard], meta: dict[str, Any]) -> Manifest:
    """Write manifest.json for shards that are in place; the last thing that packing does."""
    folder = Path(path)
    content = {
        "format": FORMAT,
        "samples": sum(s.samples for s in shards),
        "meta": meta,
        "shards": [vars(s) for s in shards],
    }
    atomic.write(folder / MANIFEST, json.dumps(content, indent=1).encode())
    return load_manifest(folder)


class _Hashing:
    """A file that is written front to back, and its sha256 on the way: no shard is read again for its checksum."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


class ShardWriter:
    """Writes one shard: `add` samples in order, `close` puts tar and index in place and returns the Shard.

    Equal samples give equal bytes (member times are zero). Used as a context manager, an error inside leaves
    nothing behind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._hashing = _Hashing(self._file)
        self._offset = 0
        self._rows: list[tuple[int, int, bytes]] = []

    def add(self, key: str, jpeg: bytes, meta: dict[str, Any] | None = None) -> None:
        """Append a sample: KEY.jpg, and KEY.json if `meta` is given. Keys have no dot and no slash."""
        header = self._member(f"{key}.jpg", jpeg)
        self._rows.append((header, len(jpeg), key.encode()))
        if meta is not None:
            self._member(f"{key}.json", json.dumps(meta, separators=(",", ":")).encode())

    def _member(self, name: str, content: bytes) -> int:
        """Append a file to the tar; return where its content starts."""
        start = self._offset + ustar.BLOCK
        fill = bytes(ustar.padding(len(content)))
        self._hashing.write(b"".join((ustar.header(name, len(content)), content, fill)))
        self._offset = start + len(content) + len(fill)
        return start

    def close(self) -> Shard:
        """Put index and tar in place (in this order: a tar under its name always has its index)."""
        end = self._offset + 2 * ustar.BLOCK
        self._hashing.write(bytes(end + -end % ustar.RECORD - self._offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        width = max((len(key) for _, _, key in self._rows), default=1)
        index = np.array(self._rows, dtype=[("offset", "<i8"), ("size", "<i8"), ("key", f"S{width}")])
        buffer = io.BytesIO()
        np.save(buffer, index)
        atomic.write(index_path(self.path), buffer.getvalue())
        size = self._temporary.stat().st_size
        self._temporary.replace(self.path)
        return Shard(self.path.name, len(self._rows), size, self._hashing.sha256.hexdigest())

    def discard(self) -> None:
        """Leave nothing of a shard that was not closed."""
        with contextlib.suppress(OSError):  # closing writes what is buffered: the disk may be full
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.discard()


def rewrite(source: Path, target: Path, rows: set[int]) -> Shard:
    """Write the samples of some rows of a shard to another, which may be the same file."""
    with ShardWriter(target) as writer, tarfile.open(source) as tar:
        row, key, jpeg = -1, "", b""
        pending = False  # a sample whose KEY.json may still come
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers all it has read
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            name, _, form = member.name.rpartition(".")
            if form == "jpg":
                if pending:
                    writer.add(key, jpeg)
                row, key, jpeg = row + 1, name, content
                pending = row in rows
            elif pending and name == key:
                writer.add(key, jpeg, json.loads(content))
                pending = False
        if pending:
            writer.add(key, jpeg)
        return writer.close()


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
