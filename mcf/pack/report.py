"""What became of every file: counts, reasons, sizes; report.json for programs, report.md for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcf import atomic
from mcf.pack.convert import Prepared
from mcf.pack.source import LeftOut

REPORT = "report.json"
PAGE = "report.md"
LISTS = "left_out"  # folder with a list for every tar of the source
SHOWN = 1000  # files listed on the page; report.json lists all
_SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024)


@dataclass
class Tally:
    """Counts of a part of the work; parts add up to the whole.

    kept: JPEGs. images: those they come from, as many unless several faces of an image are kept. left_out: images that
    gave none; `unlisted` counts those by reason that are not in the list (the source has millions: a file of their own
    has them). dropped: JPEGs that were made and are not kept (duplicates). refused: faces that are out, by reason. sides, faces: shorter side as stored and of the face's box.
    links: how the downloads of the source ended.
    """

    kept: int = 0
    images: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    unlisted: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    faces: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    links: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Prepared | LeftOut) -> None:
        """Count one file."""
        if isinstance(outcome, LeftOut):
            self.left_out.append(outcome)
            return
        self.images += 1
        self.count(outcome)

    def count(self, prepared: Prepared) -> None:
        """Count one JPEG."""
        self.kept += 1
        self.changes.update(prepared.changes)
        self.sides[side_class(min(prepared.size))] += 1
        if prepared.face is not None:
            self.faces[side_class(prepared.face.side)] += 1

    def uncount(self, prepared: Prepared) -> None:
        """Take back one JPEG that was counted."""
        self.kept -= 1
        self.changes.subtract(prepared.changes)
        self.sides[side_class(min(prepared.size))] -= 1
        if prepared.face is not None:
            self.faces[side_class(prepared.face.side)] -= 1

    def shorten(self, most: int) -> None:
        """List no more than `most` files a reason; the rest is only counted."""
        listed: Counter[str] = Counter()
        files, self.left_out = self.left_out, []
        for file in files:
            listed[file.reason] += 1
            if listed[file.reason] <= most:
                self.left_out.append(file)
            else:
                self.unlisted[file.reason] += 1

    def absorb(self, other: Tally) -> None:
        """Add another part."""
        self.kept += other.kept
        self.images += other.images
        self.left_out += other.left_out
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    @property
    def out(self) -> int:
        """Files left out."""
        return len(self.left_out) + self.unlisted.total()

    @property
    def reasons(self) -> dict[str, int]:
        """How many files each reason left out, most first."""
        return most_first(Counter(file.reason for file in self.left_out) + self.unlisted)

    def to_json(self) -> dict[str, Any]:
        """A form for a journal."""
        return {
            "kept": self.kept,
            "images": self.images,
            "left_out": [[file.name, file.reason, file.detail] for file in self.left_out],
            **{name: {str(key): count for key, count in getattr(self, name).items()} for name in _COUNTERS},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Tally:
        """The inverse of `to_json`."""
        tally = cls(content["kept"], content["images"], [LeftOut(*file) for file in content["left_out"]])
        for name in _COUNTERS:
            numbers = name in ("sides", "faces")
            getattr(tally, name).update({int(k) if numbers else k: count for k, count in content[name].items()})
        return tally


_COUNTERS = ("unlisted", "dropped", "changes", "sides", "faces", "refused", "links")


def side_class(side: float) -> int:
    """The class of the histograms that a side belongs to: its lower edge."""
    return max((edge for edge in _SIDES if edge <= side), default=0)


def most_first(counts: Counter[str]) -> dict[str, int]:
    """Counts over 0, the largest first, equal ones by name."""
    return dict(sorted((+counts).items(), key=lambda item: (-item[1], item[0])))


def write_report(
    out: Path, found: int, tally: Tally, settings: dict[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write both reports; return the counts, which the manifest keeps too. `notes` are for people."""
    counts = {
        "found": found,
        "images": tally.images,
        "kept": tally.kept,
        "left_out": tally.reasons,
        "dropped": most_first(tally.dropped),
        "faces_left_out": most_first(tally.refused),
        "changed": dict(sorted((+tally.changes).items())),
        "downloads": most_first(tally.links),
    }
    files = sorted(tally.left_out, key=lambda file: file.name)
    content = {
        **counts,
        "shorter_side": _histogram(tally.sides),
        "face_side": _histogram(tally.faces),
        "notes": list(notes),
        "settings": settings,
        "files_left_out": [vars(file) for file in files],
        "files_not_listed": tally.unlisted.total(),
    }
    atomic.write(out / PAGE, _page(content, files).encode())
    atomic.write(out / REPORT, json.dumps(content, indent=1).encode())
    return counts


def _histogram(sides: Counter[int]) -> dict[str, int]:
    """Images of each class of a side that occurs."""
    edges = zip([0, *_SIDES], [*_SIDES, None])
    return {f"{low}–{high - 1}" if high else f"{low}+": sides[low] for low, high in edges if sides[low]}


def balance(counts: dict[str, Any]) -> str:
    """Found = kept + left out, in a sentence; with faces, images and crops are two sums."""
    out = f"{sum(counts['left_out'].values()):,} left out"
    dropped = sum(counts["dropped"].values())
    made = counts["kept"] + dropped
    if made == counts["images"] and not dropped:
        return f"{counts['found']:,} found = {counts['kept']:,} kept + {out}."
    return (
        f"{counts['found']:,} images found = {counts['images']:,} used + {out}. "
        f"Those used gave {made:,} crops = {counts['kept']:,} kept + {dropped:,} dropped."
    )


def _page(content: dict[str, Any], files: list[LeftOut]) -> str:
    lines = ["# Packing report", "", balance(content), "", *(f"{note}\n" for note in content["notes"])]
    for title, rows in tables(content):
        lines += _table(title, rows)
    lines += _table("Setting", content["settings"], "Value")
    if files:
        lines += ["## Files left out", "", "| File | Reason | Details |", "| --- | --- | --- |"]
        lines += [f"| {_cell(f.name)} | {f.reason} | {_cell(f.detail)} |" for f in files[:SHOWN]]
        if len(files) > SHOWN:
            lines.append(f"\n… and {len(files) - SHOWN:,} more, all in {REPORT}.")
        if content["files_not_listed"]:
            lines.append(f"\n… and {content['files_not_listed']:,} more, all in {LISTS}/.")
    return "\n".join(lines) + "\n"


def tables(content: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """The tables of a report.json that have rows, with their titles."""
    titles = {
        "left_out": "Images left out because",
        "faces_left_out": "Faces left out because",
        "dropped": "Crops dropped because",
        "changed": "Re-encoded because (an image can have several reasons)",
        "shorter_side": "Shorter side as stored, pixels",
        "face_side": "Shorter side of the face's box, pixels",
        "downloads": "Downloads of the source",
    }
    return [(title, content[key]) for key, title in titles.items() if content.get(key)]


def _table(title: str, rows: dict[str, Any], value: str = "Images") -> list[str]:
    if not rows:
        return []
    return [
        f"| {title} | {value} |",
        "| --- | ---: |",
        *(f"| {_cell(str(k))} | {_cell(str(v))} |" for k, v in rows.items()),
        "",
    ]


def _cell(text: str) -> str:
    """Any text, also file names with line breaks or bytes that are no text, in one cell of a table."""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text.replace("|", "\\|")
