"""One unit of the source becomes one part: the work of a process that is independent of all others.

    OUT/.packing/parts/00012.json            the record, last: without it the part is made again
                       shard-00012.tar       and its index; not there if the unit gave nothing
                       shard-00012.rows.npy  of each crop: digest of its bytes, difference hash, shorter side of the face
                       00012.jsonl           what was left out: name, reason, details

A part is made in a folder of its own (.scratch-HOST-PID) and renamed into place, record last: a process that is killed
leaves nothing half, and two that make the same part leave the same bytes, whichever comes last.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcf import atomic
from mcf.data.shards import Shard, ShardWriter, index_path, rewrite
from mcf.errors import UserError
from mcf.pack import convert, detections, tars
from mcf.pack.checking import Checker
from mcf.pack.convert import Prepared, Refused
from mcf.pack.cut import BATCH, Cut, Cutter
from mcf.pack.detectors import finder
from mcf.pack.faces import Face
from mcf.pack.inputs import Boxes, Unit
from mcf.pack.options import PackConfig
from mcf.pack.report import Tally
from mcf.pack.source import Candidate, LeftOut
from mcf.pack.tars import Entry

ROW = np.dtype([("digest", "V16"), ("hash", "<u8"), ("face", "<u4")])
NO_BOXES = "not in the detections"
NO_ID = "no SAMPLE_ID"
EXAMPLES = 20  # files a reason that a record lists
_STRANGE = 100  # images of a unit, none of them in the detections: those are of other images


@dataclass(frozen=True)
class Record:
    """A finished part: its shard (None if the unit gave nothing), what was found, and what became of it."""

    number: int
    unit: str
    found: int
    shard: Shard | None
    tally: Tally
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A form for a file."""
        return vars(self) | {"shard": self.shard and asdict(self.shard), "tally": self.tally.to_json()}

    @classmethod
    def read(cls, file: Path) -> Record:
        """The inverse, from a file. Raises OSError, ValueError, KeyError or TypeError."""
        content = json.loads(file.read_text())
        shard = content["shard"] and Shard(**content["shard"])
        return cls(**(content | {"shard": shard, "tally": Tally.from_json(content["tally"])}))


def record_path(parts: Path, number: int) -> Path:
    """Where the record of a unit lies."""
    return parts / f"{number:05d}.json"


def shard_name(number: int) -> str:
    """The file name of a unit's shard."""
    return f"shard-{number:05d}.tar"


def rows_path(tar: Path) -> Path:
    """Where the digests and hashes of a part's crops lie."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".rows.npy")


class Packer:
    """Makes parts; one a process, since decoders and tables are opened once."""

    def __init__(self, options: PackConfig, parts: Path, tables: list[Path]):
        self.options, self.parts = options, parts
        by_name = None
        if options.detections and not tables:
            by_name = detections.boxes(Path(options.detections))
        self.boxes = Boxes(tables, by_name)
        self.cutter = Cutter(options, finder(options.detector) if options.detector else None)
        self.checker = Checker(hashes=options.near_duplicates is not None)
        gc.freeze()  # what is alive now stays: looking through it again and again takes 3 % of the time

    def __call__(self, unit: Unit, deaths: tuple[Any, ...], note: Callable[[str, Any], None]) -> Record:
        """Make the part of a unit, or read its record if it is made.

        deaths: which images were under way when this unit killed a process, as (first, count).
        """
        scratch = self.parts / f".scratch-{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            return _Part(self, unit, scratch, deaths, note).make()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


class _Part:
    """One part under way."""

    def __init__(self, packer: Packer, unit: Unit, scratch: Path, deaths: tuple[Any, ...], note):
        self.packer, self.unit, self.scratch, self.note = packer, unit, scratch, note
        self.options = packer.options
        self.links = tars.links(unit.path) if unit.path is not None else "no tar"
        self.tally = Tally()
        self.found = self.looked_up = self.strangers = self.nameless = 0
        self.made: list[tuple[str, Prepared, bytes]] = []  # key, without its bytes, digest
        # Where a process died in a batch, images go one by one; where it died on one image, that one is left out.
        self.careful = [range(first, first + count) for first, count in filter(None, deaths) if count > 1]
        self.deadly = {first for first, count in filter(None, deaths) if count == 1}

    def make(self) -> Record:
        with ShardWriter(self.scratch / shard_name(self.unit.number)) as writer:
            for samples in self._batches():
                self._pack(samples, writer)
            self._refuse_strangers()
            if not self.made:
                writer.discard()
        shard = self._checked(writer) if self.made else None
        if isinstance(self.links, tars.Links):
            self.tally.links.update(self.links.ends)
        return self._put_in_place(shard)

    def _batches(self) -> Iterator[list[Entry]]:
        """Samples to be cut together; what is left out before is counted here."""
        batch: list[Entry] = []
        number = 0
        for item in self.unit.samples(self.options):
            if isinstance(item, LeftOut):
                self.found += 1
                self.tally.add(item)
                continue
            alone = any(number in some for some in self.careful)
            if batch and (alone or len(batch) == BATCH):
                yield batch
                batch = []
            self.found += 1
            if number in self.deadly:
                self.tally.add(LeftOut(item.name, convert.DAMAGED, "the process that decoded it died"))
            else:
                if not batch:
                    self.note("at", (number, 1 if alone else BATCH))
                batch.append(item)
                if alone:
                    yield batch
                    batch = []
            number += 1
        if batch:
            yield batch

    def _pack(self, samples: list[Entry], writer: ShardWriter) -> None:
        for sample, cut, sample_id in self._cut(samples):
            if cut.left_out is not None:
                self.tally.add(LeftOut(sample.name, cut.left_out.reason, cut.left_out.detail))
            self.tally.refused.update(cut.refused)
            self.tally.images += bool(cut.crops)
            for crop in cut.crops:
                self.tally.count(crop)
                key = Candidate(sample.name, "", 0).key + (f"-{crop.number}" if crop.face else "")
                writer.add(key, crop.jpeg, _facts(sample, sample_id, crop))
                self.made.append((key, crop.light, hashlib.sha256(crop.jpeg).digest()[:16]))
        self.note("done", len(samples))

    def _cut(self, samples: list[Entry]) -> Iterator[tuple[Entry, Cut, int | None]]:
        """What became of each sample; boxes are those of the image before img2dataset resized it."""
        ids = [self._sample_id(sample) for sample in samples]
        if not self.options.by_faces:
            for sample, sample_id in zip(samples, ids):
                yield sample, self._whole(sample), sample_id
            return
        found = self.packer.boxes.look_up(samples, ids)
        self.looked_up += len(samples)
        asked: list[tuple[int, list[Face] | None]] = []
        refusals: dict[int, Refused] = {}
        for i, (sample, faces) in enumerate(zip(samples, found)):
            factors = sample.resized
            if faces is None and self.packer.boxes.any:
                self.strangers += 1
                nameless = self.packer.boxes.by_id and ids[i] is None
                self.nameless += nameless
                refusals[i] = Refused(NO_ID if nameless else NO_BOXES)
            elif faces and factors and abs(factors[0] / factors[1] - 1) > 0.02:
                refusals[i] = Refused(convert.UNSUPPORTED, "img2dataset changed its shape: the boxes no longer fit")
            else:
                asked.append((i, [face.scaled(*factors) for face in faces] if faces and factors else faces))
        cuts = self.packer.cutter.cut([(samples[i].content, faces) for i, faces in asked])
        results = {i: cut for (i, _), cut in zip(asked, cuts)}
        for i, sample in enumerate(samples):
            yield sample, results.get(i) or Cut([], [], refusals[i]), ids[i]

    def _whole(self, sample: Entry) -> Cut:
        try:
            return Cut([convert.prepare(sample.content, self.options)], [])
        except Refused as refusal:
            return Cut([], [], refusal)

    def _sample_id(self, sample: Entry) -> int | None:
        """From KEY.json, or where that does not say, from the parquet."""
        value = sample.sample_id
        if value is None and isinstance(self.links, tars.Links):
            value = self.links.sample_ids.get(sample.key)
        return value

    def _refuse_strangers(self) -> None:
        seen = self.looked_up
        if seen < _STRANGE or self.strangers < seen:
            return
        if self.nameless == self.strangers:
            raise UserError(
                f"{self.unit.name}: none of its {seen:,} images has a SAMPLE_ID in its .json, and the parquet beside it "
                f"has none either ({'it names none' if isinstance(self.links, tars.Links) else self.links}); download "
                "with img2dataset's --save_additional_columns '[\"SAMPLE_ID\"]'"
            )
        raise UserError(
            f"{self.unit.name}: none of its {seen:,} images is in detections={self.options.detections}, which are of other "
            "images; add the file that belongs to it, or take it out of the source"
        )

    def _checked(self, writer: ShardWriter) -> Shard | None:
        """Close the shard, decode all of it, and write it again without what does not decode."""
        shard = writer.close()
        index = np.load(index_path(writer.path))
        reasons, hashes = self.packer.checker.look(writer.path, index)
        kept = [row for row in range(len(index)) if row not in reasons]
        for row in reasons:
            self.tally.uncount(self.made[row][1])
            self.tally.dropped[convert.NOT_DECODABLE] += 1
        rows = np.zeros(len(kept), dtype=ROW)
        for place, row in enumerate(kept):
            _, crop, digest = self.made[row]
            rows[place] = (digest, hashes[row], round(crop.face.side) if crop.face else 0)
        np.save(rows_path(writer.path), rows)
        if not reasons:
            return shard
        return rewrite(writer.path, writer.path, set(kept)) if kept else None

    def _put_in_place(self, shard: Shard | None) -> Record:
        number, parts = self.unit.number, self.packer.parts
        lines = (json.dumps([file.name, file.reason, file.detail]) for file in self.tally.left_out)
        (self.scratch / "list").write_text("".join(f"{line}\n" for line in lines))
        self.tally.shorten(EXAMPLES)
        note = self.links if isinstance(self.links, str) and self.unit.path is not None else ""
        record = Record(number, self.unit.name, self.found, shard, self.tally, note)
        (self.scratch / "list").replace(parts / f"{number:05d}.jsonl")
        if shard is not None:
            tar = self.scratch / shard.name
            for file in (rows_path(tar), index_path(tar), tar):
                file.replace(parts / file.name)
        scratch = self.scratch / "record"
        atomic.write(scratch, json.dumps(record.to_json()).encode())
        scratch.replace(record_path(parts, number))
        return record


def _facts(sample: Entry, sample_id: int | None, crop: Prepared) -> dict[str, Any]:
    """What KEY.json tells of a crop."""
    facts: dict[str, Any] = {
        "path": sample.name,
        "width": crop.size[0],
        "height": crop.size[1],
        "original_width": crop.original[0],
        "original_height": crop.original[1],
    }
    if sample_id is not None:
        facts["sample_id"] = sample_id
    if crop.face is not None:
        facts |= {"face": crop.number, "box": [round(v, 1) for v in crop.face.box], "score": round(crop.face.score, 4)}
    else:
        facts["changes"] = list(crop.changes)
    return facts
