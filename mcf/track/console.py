"""What a person sees of a run: a live line on a terminal, plain lines in a file.

    step 12,340/78,125 15.8%  loss 7.312  feature 4.31e-6  lr 2.4e-3  grad 0.8100  4.1k img/s  wait 3%  ETA 3h12m

`format_line` makes the line from a record of metrics.jsonl; a number that a record does not hold leaves no gap.
`read_line` knows such a line again, so that the launcher can show a rank that writes into a file as a live line.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, TextIO

from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HIDDEN = {"loss/total"}  # shown as `loss`, before its terms
GAP = "  "  # between the parts of a step line
# What a narrow terminal keeps, the least needed first: a part is known by its first or last word.
NEEDED = ("img/s", "ETA", "loss", "step")
BAR = 20  # columns of the bar, at most
_STEP_LINE = re.compile(r"step (?P<step>\d[\d,]*)(/(?P<steps>\d[\d,]*) \d+\.\d%)?(  |$)")


class Position(NamedTuple):
    """Where a run stands: steps done, and steps of the whole run (None if unknown)."""

    step: int
    steps: int | None


class Console:
    """Prints the records and events of one process."""

    def __init__(self, steps: int | None, batch: int, stream: TextIO | None = None):
        """`steps`: length of the run, or None if unknown; `batch`: samples a step; `stream`: stdout by default."""
        self.steps = steps
        self.batch = batch
        self.stream = stream or sys.stdout
        self._lock = threading.Lock()
        self._screen = Screen(self.stream) if can_move(self.stream) else None

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Show one record of metrics: the live line moves, or a line is printed."""
        self._show(format_line(record, self.steps, self.batch))

    def event(self, record: Mapping[str, Any]) -> None:
        """Print one event, above the live line."""
        self._show(format_event(record))

    def close(self) -> None:
        """Leave the last line where it is and give the terminal back."""
        with self._lock:
            if self._screen is not None:
                self._screen.close()

    def _show(self, line: str) -> None:
        with self._lock:
            if self._screen is None:
                print(line, file=self.stream, flush=True)
            else:
                self._screen.show(line)


class Screen:
    """A terminal: the newest step line stays at the bottom with a bar, all other lines scroll above it."""

    def __init__(self, stream: TextIO):
        self._terminal = Terminal(file=stream, highlight=False)
        self._live = Live(console=self._terminal, refresh_per_second=4)

    def show(self, line: str) -> None:
        """Show one line, without its newline."""
        position = read_line(line)
        if position is None:
            # Left to the terminal to wrap: a path can be copied whole.
            self._terminal.print(Text.from_ansi(line), soft_wrap=True)
            return
        if not self._live.is_started:
            self._live.start()
        self._live.update(_StepLine(line, position))

    def close(self) -> None:
        """Leave the last line where it is and give the terminal back."""
        if self._live.is_started:
            self._live.stop()


class _StepLine:
    """A step line as wide as the terminal is at the moment."""

    def __init__(self, line: str, position: Position):
        self.line, self.position = line, position

    def __rich_console__(self, _console: Terminal, options: ConsoleOptions) -> RenderResult:
        step, steps = self.position
        bar = min(BAR, options.max_width // 8) if steps else 0
        text = Text(fit(self.line, options.max_width - bar - bool(bar)), no_wrap=True, overflow="ellipsis")
        if not bar:
            yield text
            return
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=bar)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(ProgressBar(total=steps, completed=step, width=bar), text)
        yield row


def can_move(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be written over."""
    return stream.isatty() and not Terminal(file=stream).is_dumb_terminal


def read_line(line: str) -> Position | None:
    """Where the run stands by a line of `format_line`; None for any other line."""
    found = _STEP_LINE.match(line)
    if found is None:
        return None
    steps = found["steps"]
    return Position(int(found["step"].replace(",", "")), int(steps.replace(",", "")) if steps else None)


def fit(line: str, width: int) -> str:
    """A step line without the parts that do not fit into `width` columns: from the end, the needed ones last."""
    parts = line.split(GAP)

    def rank(index: int) -> tuple[int, int]:
        words = parts[index].split(" ")
        needed = [place for place, word in enumerate(NEEDED) if word in (words[0], words[-1])]
        return (needed[0] + 1 if needed else 0, -index)

    gone: set[int] = set()
    for index in sorted(range(len(parts)), key=rank)[:-1]:
        if len(GAP.join(part for i, part in enumerate(parts) if i not in gone)) <= width:
            break
        gone.add(index)
    return GAP.join(part for i, part in enumerate(parts) if i not in gone)


def format_line(record: Mapping[str, Any], steps: int | None, batch: int) -> str:
    """One line of a record: step, losses, rates, memory, time to go (seconds of the remaining steps at this rate)."""
    step = record["step"]
    share = f"/{steps:,} {100 * step / steps:.1f}%" if steps else ""
    parts = [f"step {step:,}{share}"]
    if "loss/total" in record:
        parts.append(f"loss {number(record['loss/total'])}")
    parts += [
        f"{name.removeprefix('loss/')} {number(value)}"
        for name, value in record.items()
        if name.startswith("loss/") and name not in HIDDEN
    ]
    if "lr" in record:
        parts.append(f"lr {scientific(record['lr'])}")
    if "grad_norm" in record:
        parts.append(f"grad {number(record['grad_norm'])}")
    rate = record.get("rate/images_per_s")
    if rate is not None:
        parts.append(f"{thousands(rate)} img/s")
    if "rate/data_wait" in record:
        parts.append(f"wait {100 * record['rate/data_wait']:.0f}%")
    if "memory/gib" in record:
        parts.append(f"mem {record['memory/gib']:.1f} GiB")
    if steps and rate is not None and rate > 0 and math.isfinite(rate):
        parts.append(f"ETA {duration((steps - step) * batch / rate)}")
    return GAP.join(parts)


def format_event(record: Mapping[str, Any]) -> str:
    """One line of an event: its kind, its message if it has one, then its fields."""
    fields = {name: value for name, value in record.items() if name not in {"kind", "time", "message"}}
    parts = [str(record["kind"]).replace("_", " ") + ":"]
    if "message" in record:
        parts.append(str(record["message"]))
    parts += [f"{name}={number(value) if isinstance(value, float) else value}" for name, value in fields.items()]
    return " ".join(parts)


def number(value: float) -> str:
    """Four significant figures, so that lines stay in step: 7.310, 0.004310, 2.4e-5, nan."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e5:
        return scientific(value)
    return f"{value:#.4g}".removesuffix(".") if abs(value) < 1e4 else f"{value:.0f}"


def scientific(value: float) -> str:
    """Two to three significant figures with a bare exponent: 2.4e-3, 1.25e-4, 0."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def thousands(value: float) -> str:
    """A rate in three figures: 3.05, 42.1, 870, 1.2k, 15.3k, 1.4M."""
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two units of time: 45s, 12m05s, 3h12m, 4d07h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"
