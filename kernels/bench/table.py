"""Rows of results: written as CSV, read again for plots, and set as Markdown tables."""

from __future__ import annotations

import csv
import hashlib
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from mcf.kernels.triton_or_none import HAS_TRITON, triton

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """Where and of what something was measured."""

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str
    """Of the repository, with a + where files differ from it; "unknown" outside of one."""
    source: str
    """Digest of this package's files: what ran, whatever the commit says."""
    date: str


def here(device: torch.device) -> Machine:
    """This machine, this code, now."""
    gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if gpu else f"CPU ({_processor()})",
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else "",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if gpu else "",
        torch=torch.__version__,
        triton=triton.__version__ if HAS_TRITON else "",
        python=platform.python_version(),
        commit=_commit(),
        source=_source(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Row:
    """One pass of one implementation of one case. Times in microseconds; None is what was not measured."""

    op: str
    shape: str
    dtype: str
    implementation: str
    which: str
    """The pass: forward, backward or both."""
    error: float | None
    """Largest relative error against the float64 reference; None where the outputs cannot be compared."""
    note: str
    """Why it was not timed; "" where it was."""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    peak_mib: float | None = None
    bytes: int = 0
    operations: int = 0
    floor_us: float | None = None
    accept_us: float | None = None
    """What is asked of it on an H200."""

    @property
    def share(self) -> float | None:
        """Share of the roofline: the floor over the median time."""
        return self.floor_us / self.p50_us if self.floor_us and self.p50_us else None


def write_csv(path: Path, rows: list[Row], machine: Machine) -> None:
    """All rows, each with the machine."""
    names = [f.name for f in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, "share", *(f.name for f in fields(Machine))])
        writer.writeheader()
        for row in rows:
            share = None if row.share is None else round(row.share, 4)
            writer.writerow({**asdict(row), "share": share, **asdict(machine)})


def read_csv(path: Path) -> tuple[list[Row], Machine | None]:
    """What `write_csv` wrote; the machine is the first row's, None where there is no row."""
    kinds = {f.name: str(f.type) for f in fields(Row)}

    def value(name: str, text: str) -> object:
        if kinds[name] == "str":
            return text
        if not text:
            return None
        return int(text) if kinds[name] == "int" else float(text)

    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = [Row(**{name: value(name, line[name]) for name in kinds}) for line in table]  # type: ignore[arg-type]
    machine = Machine(**{f.name: table[0][f.name] for f in fields(Machine)}) if table else None
    return rows, machine


def markdown(rows: list[Row]) -> str:
    """One table an operation: a line a shape and pass, the kernel's time beside the baselines'; no column that is empty."""
    parts = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        names = list(dict.fromkeys(row.implementation for row in mine))
        lines: list[list[str]] = []
        for shape, dtype, which in dict.fromkeys((row.shape, row.dtype, row.which) for row in mine):
            here = {
                row.implementation: row for row in mine if (row.shape, row.dtype, row.which) == (shape, dtype, which)
            }
            first = next(iter(here.values()))
            cells = [f"{shape} {dtype}", which, *(_time(here.get(name)) for name in names), _number(first.floor_us)]
            share = here[names[0]].share if names[0] in here else None
            cells += [f"{share:.0%}" if share else "–", _number(first.accept_us)]
            peaks = [here[name].peak_mib if name in here else None for name in names]
            lines.append([*cells, "–" if peaks == [None] * len(names) else " / ".join(map(_number, peaks))])
        head = ["shape", "pass", *(f"{name} µs" for name in names), "floor µs", f"{names[0]}'s share", "accept µs"]
        head += [f"peak MiB ({' / '.join(names)})"]
        told = [place for place in range(len(head)) if any(cells[place] != "–" for cells in lines)]
        table = [head, ["---"] * len(head), *lines]
        parts.append("\n".join([f"### {op}", "", *(f"| {' | '.join(cells[i] for i in told)} |" for cells in table)]))
    return "\n\n".join(parts)


def _time(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.p50_us is None:
        return row.note or "–"
    return f"{_number(row.p50_us)} ({_number(row.p20_us)}–{_number(row.p80_us)})"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _commit() -> str:
    commit = _output("git", "-C", str(PACKAGE), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _output("git", "-C", str(PACKAGE), "status", "--porcelain", "--", str(PACKAGE)) else "")


def _source() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """What a command prints; "" where there is none such, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
