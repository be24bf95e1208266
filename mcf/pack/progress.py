"""How packing is going: a bar on a terminal, a line every few seconds in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcf.pack.report import Tally

INTERVAL = 10.0  # seconds between two plain lines


class Meter:
    """Counts files of one run of the program (not those that an earlier run did) for rate and remaining time."""

    def __init__(self, total: int, done: int, bar: Progress | None):
        self.total, self.done, self._first = total, done, done
        self._begin = self._last = time.monotonic()
        self._bar = bar
        self._task = bar.add_task("packing", total=total, completed=done, note="") if bar else None

    @property
    def rate(self) -> float:
        """Files a second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._begin, 1e-9)

    def advance(self, tally: Tally) -> None:
        """One file more is done."""
        self.done += 1
        if self._bar is not None and self._task is not None:
            note = f"{self.rate:,.0f} files/s · {len(tally.left_out):,} left out"
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._last >= INTERVAL:
            self._last = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            print(
                f"pack  {self.done:,}/{self.total:,} files ({self.done / self.total:.0%})  {self.rate:,.0f} files/s  "
                f"{len(tally.left_out):,} left out  {left:,.0f} s to go",
                flush=True,
            )


@contextmanager
def meter(total: int, done: int) -> Iterator[Meter]:
    """A Meter for `total` files of which `done` were finished before."""
    console = Console()
    if not console.is_terminal:
        yield Meter(total, done, None)
        return
    columns = (
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Meter(total, done, bar)
