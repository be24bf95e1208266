"""How packing is going: a bar on a terminal, a line every few seconds in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between two plain lines


class Meter:
    """Counts files of one run of the program (not those that an earlier run did) for rate and remaining time.

    Where what is counted are whole tars, `note` counts the images in them.
    """

    def __init__(self, total: int, done: int, bar: Progress | None, unit: str = "files"):
        self.total, self.done, self._first, self.unit = total, done, done, unit
        self.images = 0
        self._begin = self._last = time.monotonic()
        self._bar = bar
        self._task = bar.add_task("packing", total=total, completed=done, note="") if bar else None

    @property
    def rate(self) -> float:
        """Files a second since the start."""
        return (self.done - self._first) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9)

    def note(self, images: int) -> None:
        """So many images more were looked at, in a tar that is not done."""
        self.images += images
        self._tell(None)

    def advance(self, left_out: int) -> None:
        """One file more is done; so many are left out by now."""
        self.done += 1
        self._tell(left_out)

    def _tell(self, left_out: int | None) -> None:
        rate, unit = (self.rate, self.unit) if not self.images else (self.images / self._seconds, "images")
        out = "" if left_out is None else f"{left_out:,} left out"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=f"{rate:,.0f} {unit}/s {out}")
        elif time.monotonic() - self._last >= INTERVAL:
            self._last = time.monotonic()
            left = f"  {(self.total - self.done) / self.rate:,.0f} s to go" if self.rate else ""
            print(
                f"pack  {self.done:,}/{self.total:,} {self.unit} ({self.done / self.total:.0%})  {rate:,.0f} {unit}/s  "
                f"{out}{left}".rstrip(),
                flush=True,
            )


@contextmanager
def meter(total: int, done: int, unit: str = "files") -> Iterator[Meter]:
    """A Meter for `total` files of which `done` were finished before."""
    console = Console()
    if not console.is_terminal:
        yield Meter(total, done, None, unit)
        return
    columns = (
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Meter(total, done, bar, unit)
