"""All parts become one data set: duplicates out, shards in place, one report, one manifest.

A crop is dropped if its bytes are those of an earlier one (units in order, crops in order), whichever task made them.
A shard without duplicates is renamed into place, another one is written anew without them. OUT/.packing/placed/ has a
note for each shard that is in place: killed at any moment, merging again does the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mcf import atomic
from mcf.data.shards import UNFINISHED, Manifest, Shard, index_path, rewrite, write_manifest
from mcf.errors import UserError
from mcf.pack.inputs import Source
from mcf.pack.options import PackConfig
from mcf.pack.parts import ROW, Record, record_path, rows_path
from mcf.pack.report import LISTS, PAGE, Tally, side_class, write_report
from mcf.pack.source import DUPLICATE

NEAR = "near-duplicate"
_LISTED = 100  # files a reason that the report lists
_THREADS = 4  # shards rewritten at once: it is reading and writing
_BLOCK = 4096  # hashes compared with others at once


def merge(source: Source, parts: Path, out: Path, options: PackConfig, settings: dict[str, Any]) -> Manifest:
    """Make the whole of parts that are all there. Raises UserError if they hold nothing."""
    records = [_record(parts, unit.number) for unit in source.units]
    rows = [np.load(rows_path(_tar(parts, record))) if record.shard else np.empty(0, ROW) for record in records]
    dropped = duplicates(np.concatenate([*rows, np.empty(0, ROW)]), options.near_duplicates)
    ends = np.cumsum([len(part) for part in rows])
    drops = np.split(dropped, ends[:-1]) if len(rows) else []

    tally = Tally(left_out=list(source.left_out))
    for record in records:
        tally.absorb(record.tally)
    for part, drop in zip(rows, drops):
        _uncount(tally, part[drop > 0], drop[drop > 0], options.size)
    found = len(source.left_out) + sum(record.found for record in records)
    _account(found, tally)

    placed = out / UNFINISHED / "placed"
    placed.mkdir(exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [
            pool.submit(_place, record, parts, placed, out, np.flatnonzero(drop == 0))
            for record, drop in zip(records, drops)
            if record.shard
        ]
        shards = [shard for job in jobs if (shard := job.result())]
    lists = out / LISTS
    lists.mkdir(exist_ok=True)
    for record in records:
        _list(parts / f"{record.number:05d}.jsonl", lists / f"{record.number:05d}.jsonl")
    return _finish(out, shards, found, tally, settings, _notes(records))


def duplicates(rows: np.ndarray, near: int | None) -> np.ndarray:
    """For rows of ROW: 0 for a crop that stays, 1 if its bytes came before, 2 if a hash within `near` bits did."""
    result = np.zeros(len(rows), dtype=np.uint8)
    digests = np.ascontiguousarray(rows["digest"]).view("<u8").reshape(-1, 2)
    _, first = np.unique(digests, axis=0, return_index=True)
    again = np.ones(len(rows), dtype=bool)
    again[first] = False
    result[again] = 1
    if near is not None:
        rest = np.flatnonzero(~again)
        result[rest[_near(rows["hash"][rest], near)]] = 2
    return result


def _near(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Places of hashes that differ from an earlier one in at most `bits` bits.

    Cut into bits+1 bands, two such hashes agree in one band at least: only those are compared.
    """
    far = np.ones(len(hashes), dtype=bool)
    width = -(-64 // (bits + 1))
    for band in range(bits + 1):
        value = hashes >> np.uint64(band * width) & np.uint64((1 << min(width, 64 - band * width)) - 1)
        order = np.argsort(value, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(value[order]) != 0]) if len(order) else np.empty(0, np.int64)
        lengths = np.diff(np.r_[starts, len(order)])
        for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist()):
            group = order[start : start + length]
            for first in range(1, len(group), _BLOCK):
                mine = group[first : first + _BLOCK]
                for other in range(0, first + len(mine), _BLOCK):
                    earlier = group[other : other + _BLOCK]
                    apart = np.bitwise_count(hashes[mine][:, None] ^ hashes[earlier][None])
                    hit = (apart <= bits) & (earlier[None] < mine[:, None])
                    far[mine[hit.any(1)]] = False
    return np.flatnonzero(~far)


def _record(parts: Path, number: int) -> Record:
    file = record_path(parts, number)
    try:
        return Record.read(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged record ({error!r}); delete it and give the same command again") from None


def _tar(folder: Path, record: Record) -> Path:
    assert record.shard is not None
    return folder / record.shard.name


def _uncount(tally: Tally, rows: np.ndarray, kinds: np.ndarray, size: int | None) -> None:
    """Take dropped crops out of the counts; all crops of faces are squares of one size."""
    tally.kept -= len(rows)
    for kind, name in ((1, DUPLICATE), (2, NEAR)):
        tally.dropped[name] += int((kinds == kind).sum())
    for row in rows:
        if row["face"]:
            tally.faces[side_class(int(row["face"]))] -= 1
            tally.sides[side_class(size or int(row["face"]))] -= 1


def _account(found: int, tally: Tally) -> None:
    if found != tally.images + tally.out:
        raise RuntimeError(f"{found} found, {tally.images} used, {tally.out} left out: images were lost")


def _place(record: Record, parts: Path, placed: Path, out: Path, kept: np.ndarray) -> Shard | None:
    """Put a shard into OUT with the rows that stay; None if none do."""
    note = placed / f"{record.number:05d}.json"
    if note.exists():
        content = json.loads(note.read_text())
        return content and Shard(**content)
    assert record.shard is not None
    tar, target = _tar(parts, record), out / record.shard.name
    shard: Shard | None = record.shard
    if not len(kept):
        shard = None
    elif len(kept) < record.shard.samples:
        shard = rewrite(tar, target, set(kept.tolist()))
    else:
        for file, to in ((index_path(tar), index_path(target)), (tar, target)):
            if file.exists():  # else it was renamed before an interruption
                file.replace(to)
    atomic.write(note, json.dumps(shard and asdict(shard)).encode())
    tar.unlink(missing_ok=True)
    index_path(tar).unlink(missing_ok=True)
    return shard


def _list(source: Path, target: Path) -> None:
    if source.exists() and source.stat().st_size:
        shutil.copyfile(source, target)


def _notes(records: Sequence[Record]) -> list[str]:
    """What a person should know of the source: tars whose parquet was not there or not readable."""
    notes: dict[str, list[str]] = {}
    for record in records:
        if record.note:
            notes.setdefault(record.note, []).append(record.unit)
    return [
        f"{note} beside {len(units):,} of {len(records):,} tars ({units[0]}{', …' if len(units) > 1 else ''}): how many of "
        "their downloads failed is not known."
        for note, units in sorted(notes.items())
    ]


def _finish(
    out: Path, shards: list[Shard], found: int, tally: Tally, settings: dict[str, Any], notes: list[str]
) -> Manifest:
    tally.shorten(_LISTED)
    counts = write_report(out, found, tally, settings, notes)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in list(tally.reasons.items())[:6])
    if not tally.kept:
        raise UserError(f"none of the {found:,} images can be kept ({reasons}); see {out / PAGE}")
    manifest = write_manifest(out, shards, {"pack": settings, "counts": counts})
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    dropped = sum(counts["dropped"].values())
    print(
        f"packed {tally.kept:,} crops of {found:,} images into {len(shards):,} shards in {out}"
        + (f"; dropped {dropped:,}" if dropped else "")
        + (f"; left out {tally.out:,} ({reasons}), listed in {PAGE}" if tally.out else "")
    )
    return manifest
