"""Packing, from a folder of images to shards that a training run can trust.

    walk the source ──► duplicates out ──► one order, mixed by the seed ──► decode and convert on all cores
                    ──► shards, in that order, each decoded once by DALI ──► reports ──► manifest, last

Every step depends on names, bytes and settings alone, so that the output is the same bytes whatever the number of
workers and however often the work was interrupted: a finished shard is kept, the next begins at the candidate after it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, features

import mcf
from mcf.data.shards import Manifest, Shard, ShardWriter, index_path, load_manifest, rewrite, write_manifest
from mcf.errors import UserError
from mcf.pack import convert, inputs
from mcf.pack.convert import Prepared
from mcf.pack.journal import Journal, Record
from mcf.pack.options import PackConfig
from mcf.pack.progress import Meter, meter
from mcf.pack.report import PAGE, Tally, write_report
from mcf.pack.source import UNREADABLE, Candidate, Folder, LeftOut, mixed, read, without_duplicates
from mcf.pack.workers import cores, ordered

if TYPE_CHECKING:
    from mcf.pack.checking import Checker

FULL_SHARD = 10_000
FEWEST_SHARDS = 16  # data order permutes whole shards: a few large ones would hardly be mixed
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Survey:
    """What a source holds: candidates in writing order, what is out already, and an identity of both."""

    candidates: list[Candidate]
    left_out: list[LeftOut]
    found: int
    digest: str


def pack(options: PackConfig) -> Manifest | None:
    """Pack `options.source` into `options.out`; a finished folder is left as it is.

    Faces are cut out of images, and tars are read, in parts that tasks can share (`mcf.pack.tasks`); None if others have
    parts to make. Raises UserError for everything that a user can mend, a full disk included: the same command goes on
    then.
    """
    source, out = places(options)
    workers = options.workers or max(2, cores())
    found = list(Folder(source).walk())
    if options.by_faces or inputs.tars_in(found):
        from mcf.pack.tasks import pack_parts  # needs torch and DALI; a folder is looked through without

        with _disk(out):
            return pack_parts(source, found, out, options, workers)
    return _pack_folder(source, found, out, options, workers)


def _pack_folder(
    source: Path, found: list[Candidate | LeftOut], out: Path, options: PackConfig, workers: int
) -> Manifest:
    """Whole images of a folder, by one process and its workers."""
    if options.detections or options.detector:
        raise UserError(
            f"crop={options.crop} keeps whole images; take detections= and detector= away, or say crop=face"
        )
    if inputs.task_of(options)[1] > 1:
        raise UserError(
            "tasks share tars, or faces to be cut out; a folder of whole images is packed by one: take tasks= away"
        )
    survey = look_through(source, found, options, workers)
    settings = {
        "source": str(source),
        **options.decisive(),
        "shard_samples": options.shard_samples or shard_samples(len(survey.candidates)),
        "files": survey.digest,
        "mcf": mcf.__version__,
        "pillow": Image.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
    }
    with _disk(out), closing(Journal(out, settings)) as journal:
        if journal.finished:
            manifest = load_manifest(out)
            print(
                f"{out} is packed already: {manifest.samples:,} images in {len(manifest.shards):,} shards; nothing to do"
            )
            return manifest
        tally = _write(survey, journal, options, settings["shard_samples"], workers)
        return _finish(survey, journal, tally, settings)


def look_through(source: Path, everything: list[Candidate | LeftOut], options: PackConfig, workers: int) -> Survey:
    """Of every file of the source, leave out what needs no decoding to be refused, and fix the order."""
    found = 0
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    for item in everything:
        found += 1
        if isinstance(item, LeftOut):
            left_out.append(item)
        elif item.size == 0:
            left_out.append(LeftOut(item.name, convert.EMPTY))
        elif item.size > options.max_bytes:
            left_out.append(LeftOut(item.name, convert.TOO_LARGE, f"{item.size} bytes, max_bytes={options.max_bytes}"))
        else:
            candidates.append(item)
    if not found:
        raise UserError(f"source={source}: the folder is empty; name a folder of images")
    print(f"found {found:,} files in {source}", flush=True)
    candidates, doubles = without_duplicates(candidates, threads=workers)
    left_out += doubles
    candidates = mixed(candidates, options.seed)
    digest = hashlib.sha256()
    for candidate in candidates:
        digest.update(os.fsencode(candidate.name) + f"\0{candidate.size}\0".encode())
    for file in sorted(left_out, key=lambda file: file.name):
        digest.update(os.fsencode(file.name) + f"\0{file.reason}\0".encode())
    return Survey(candidates, left_out, found, digest.hexdigest()[:16])


def shard_samples(candidates: int) -> int:
    """Samples a shard where none are asked for: 10,000, or so many that there are about 16 shards."""
    return max(1, min(FULL_SHARD, math.ceil(candidates / FEWEST_SHARDS)))


def handle(candidate: Candidate, options: PackConfig) -> Prepared | LeftOut:
    """What becomes of one candidate; the work of a worker process."""
    try:
        return convert.prepare(read(candidate), options)
    except convert.Refused as refusal:
        return LeftOut(candidate.name, refusal.reason, refusal.detail)
    except OSError as error:
        return LeftOut(candidate.name, UNREADABLE, error.strerror or str(error))
    except Exception as error:  # whatever one image brings about, it is told in the report and stops nothing
        return LeftOut(candidate.name, convert.DAMAGED, f"{type(error).__name__}: {error}")


def _died(candidate: Candidate) -> Prepared | LeftOut:
    return LeftOut(candidate.name, convert.DAMAGED, "the process that decoded it died")


def _write(survey: Survey, journal: Journal, options: PackConfig, shard_samples: int, workers: int) -> Tally:
    """Write all shards that are not there yet; return the tally of the whole source."""
    whole = Tally(left_out=list(survey.left_out))
    for record in journal.records:
        whole.absorb(record.tally)
    done = journal.records[-1].done if journal.records else 0
    if done:
        print(f"going on after {len(journal.records):,} finished shards ({done:,} files)", flush=True)
    todo = survey.candidates[done:]
    outcomes = ordered(functools.partial(handle, options=options), todo, workers, _died)
    with meter(len(survey.candidates), done) as progress, closing(outcomes):
        from mcf.pack.checking import Checker

        pairs, checker = iter(zip(todo, outcomes)), Checker(workers)
        while written := _write_shard(pairs, done, journal, shard_samples, progress, whole, checker):
            done = written.done
    return whole


def _write_shard(
    pairs: Iterator[tuple[Candidate, Any]],
    done: int,
    journal: Journal,
    samples: int,
    progress: Meter,
    whole: Tally,
    checker: Checker,
) -> Record | None:
    """Write one shard of the next `samples` images that are kept; None if none came."""
    part = Tally()
    written: list[tuple[str, Prepared]] = []
    with ShardWriter(journal.shard_path(len(journal.records))) as writer:
        for candidate, outcome in pairs:
            done += 1
            part.add(outcome)
            whole.add(outcome)
            progress.advance(whole.out)
            if not isinstance(outcome, LeftOut):
                writer.add(candidate.key, outcome.jpeg, _facts(candidate, outcome))
                written.append((candidate.name, outcome.light))
            if part.kept == samples:
                break
        if not part.kept:
            writer.discard()
            return None
        shard = writer.close()
    reasons, _ = checker.look(writer.path, np.load(index_path(writer.path)))
    if reasons:
        shard = _without(writer.path, written, reasons, (part, whole))
    record = Record(shard, done, part)
    journal.commit(record)
    return record


def _without(
    tar: Path, written: list[tuple[str, Prepared]], reasons: dict[int, str], tallies: tuple[Tally, ...]
) -> Shard:
    """Write a shard again without the rows that the decoder of training refuses."""
    kept = [row for row in range(len(written)) if row not in reasons]
    if not kept:
        raise UserError(
            f"{tar}: DALI decodes none of its {len(written):,} images ({reasons[0]}); is it installed whole?"
        )
    for row, reason in reasons.items():
        name, prepared = written[row]
        for tally in tallies:
            tally.uncount(prepared)
            tally.images -= 1
            tally.add(LeftOut(name, convert.NOT_DECODABLE, reason))
    return rewrite(tar, tar, set(kept))


def _facts(candidate: Candidate, prepared: convert.Prepared) -> dict[str, Any]:
    """What KEY.json tells of a sample."""
    return {
        "path": candidate.name,
        "width": prepared.size[0],
        "height": prepared.size[1],
        "original_width": prepared.original[0],
        "original_height": prepared.original[1],
        "changes": list(prepared.changes),
    }


def _finish(survey: Survey, journal: Journal, tally: Tally, settings: dict[str, Any]) -> Manifest:
    """Check that everything found is accounted for, and write reports and manifest."""
    _account(survey, journal.records, tally)
    counts = write_report(journal.out, survey.found, tally, settings)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.reasons.items())
    if not tally.kept:
        raise UserError(f"none of the {survey.found:,} files can be kept ({reasons}); see {journal.out / PAGE}")
    shards: list[Shard] = [record.shard for record in journal.records]
    manifest = write_manifest(journal.out, shards, {"pack": settings, "counts": counts})
    print(
        f"packed {tally.kept:,} of {survey.found:,} files into {len(shards):,} shards in {journal.out}"
        + (f"; left out {len(tally.left_out):,} ({reasons}), listed in {PAGE}" if tally.left_out else "")
    )
    return manifest


def _account(survey: Survey, records: list[Record], tally: Tally) -> None:
    written = sum(record.shard.samples for record in records)
    names = {file.name for file in tally.left_out}
    if not (written == tally.kept and len(names) == len(tally.left_out) and tally.kept + len(names) == survey.found):
        raise RuntimeError(
            f"{survey.found} found, {tally.kept} kept, {written} written, {len(tally.left_out)} left out: files were lost"
        )


def places(options: PackConfig) -> tuple[Path, Path]:
    """Source and output. Raises UserError where one of them cannot be that."""
    for key in ("source", "out"):
        if not getattr(options, key):
            raise UserError(f"{key} is missing; say python -m mcf.pack source=IMAGES out=SHARDS")
    source, out = Path(str(options.source)), Path(str(options.out))
    if not source.exists():
        raise UserError(f"source={source}: no such folder")
    if not source.is_dir():
        raise UserError(f"source={source} is a file; name the folder that holds the images")
    if not os.access(source, os.R_OK | os.X_OK):
        raise UserError(f"source={source}: no permission to read it")
    if (source / "faces.json").exists() and (source / "masks").is_dir():
        raise UserError(
            f"source={source} holds faces drawn by mcf.data.faces, and their masks, which would be packed as images; "
            f"say source={source / 'images'}"
        )
    source, inside = source.resolve(), out.resolve()
    if inside == source or source in inside.parents:
        raise UserError(f"out={out} lies in source={source}: shards would be found as images; name a folder outside")
    if inside in source.parents:
        raise UserError(f"source={source} lies in out={out}; name another folder for the shards")
    return source, out


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Failures of the output's disk, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            remedy = "free space and give the same command again: finished shards stay"
            raise UserError(f"out={out}: the disk is full ({error.strerror}); {remedy}") from None
        raise UserError(f"out={out}: cannot write ({error}); mend that and give the same command again") from None
