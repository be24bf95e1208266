"""What became of every file: counts, reasons, sizes; report.json for programs, report.md for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcf.data.shards import write_atomically
from mcf.pack.convert import Prepared
from mcf.pack.source import LeftOut

REPORT = "report.json"
PAGE = "report.md"
SHOWN = 1000  # files listed on the page; report.json lists all
_SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024)


@dataclass
class Tally:
    """Counts of a part of the work; parts add up to the whole."""

    kept: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)

    def add(self, outcome: Prepared | LeftOut) -> None:
        """Count one file."""
        if isinstance(outcome, LeftOut):
            self.left_out.append(outcome)
            return
        self.kept += 1
        self.changes.update(outcome.changes)
        self.sides[max((side for side in _SIDES if side <= min(outcome.size)), default=0)] += 1

    def absorb(self, other: Tally) -> None:
        """Add another part."""
        self.kept += other.kept
        self.left_out += other.left_out
        self.changes += other.changes
        self.sides += other.sides

    @property
    def reasons(self) -> dict[str, int]:
        """How many files each reason left out, most first."""
        return dict(
            sorted(Counter(file.reason for file in self.left_out).items(), key=lambda item: (-item[1], item[0]))
        )

    def to_json(self) -> dict[str, Any]:
        """A form for a journal."""
        return {
            "kept": self.kept,
            "left_out": [[file.name, file.reason, file.detail] for file in self.left_out],
            "changes": dict(self.changes),
            "sides": {str(side): count for side, count in self.sides.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Tally:
        """The inverse of `to_json`."""
        return cls(
            content["kept"],
            [LeftOut(*file) for file in content["left_out"]],
            Counter(content["changes"]),
            Counter({int(side): count for side, count in content["sides"].items()}),
        )


def write_report(out: Path, found: int, tally: Tally, settings: dict[str, Any]) -> dict[str, Any]:
    """Write both reports; return the counts, which the manifest keeps too."""
    counts = {
        "found": found,
        "kept": tally.kept,
        "left_out": tally.reasons,
        "changed": dict(sorted(tally.changes.items())),
    }
    files = sorted(tally.left_out, key=lambda file: file.name)
    sides = {f"{low}–{high - 1}" if high else f"{low}+": count for low, high, count in _histogram(tally)}
    content = {
        **counts,
        "shorter_side": sides,
        "settings": settings,
        "files_left_out": [vars(file) for file in files],
    }
    write_atomically(out / PAGE, _page(counts, sides, files, settings).encode())
    write_atomically(out / REPORT, json.dumps(content, indent=1).encode())
    return counts


def _histogram(tally: Tally) -> list[tuple[int, int | None, int]]:
    """(from, to or None, images) of each class of the shorter side that occurs."""
    edges = [0, *_SIDES]
    return [(low, high, tally.sides[low]) for low, high in zip(edges, [*edges[1:], None]) if tally.sides[low]]


def _page(counts: dict[str, Any], sides: dict[str, int], files: list[LeftOut], settings: dict[str, Any]) -> str:
    lines = [
        "# Packing report",
        "",
        f"{counts['found']:,} found = {counts['kept']:,} kept + {len(files):,} left out.",
        "",
        *_table("Left out because", counts["left_out"]),
        *_table("Re-encoded because (an image can have several reasons)", counts["changed"]),
        *_table("Shorter side as stored, pixels", sides),
        *_table("Setting", settings, "Value"),
    ]
    if files:
        lines += ["## Files left out", "", "| File | Reason | Details |", "| --- | --- | --- |"]
        lines += [f"| {_cell(f.name)} | {f.reason} | {_cell(f.detail)} |" for f in files[:SHOWN]]
        if len(files) > SHOWN:
            lines.append(f"\n… and {len(files) - SHOWN:,} more, all in {REPORT}.")
    return "\n".join(lines) + "\n"


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
