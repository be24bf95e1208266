"""Plots of a bench.csv: time over size for each operation, and all times against their floors.

The one door to matplotlib, which a machine that only measures need not have: the file can be drawn elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mcf.kernels.arguments import ArgumentError
from mcf.kernels.bench.table import Machine, Row

COLOURS = {"triton": "#7c3aed", "eager": "#64748b", "compile": "#0891b2", "library": "#d97706"}


def possible() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(rows: list[Row], machine: Machine, out: Path) -> list[Path]:
    """Write `time_OP.png` for each operation and `roofline.png` into a folder; their paths.

    Raises:
        ArgumentError: matplotlib is not installed, or no row holds a time.
    """
    if not possible():
        raise ArgumentError("plots need matplotlib: pip install matplotlib, here or where bench.csv is taken")
    rows = [row for row in rows if row.p50_us]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row holds a time")
    written = [_over_size(op, rows, machine, out) for op in dict.fromkeys(row.op for row in rows)]
    return [*written, _roofline(rows, machine, out)]


def _over_size(op: str, rows: list[Row], machine: Machine, out: Path) -> Path:
    """Median times, p20 to p80 as bars, over the operations of a pass, or over its bytes where it has none."""
    mine = [row for row in rows if row.op == op]
    passes = [which for which in ("forward", "backward", "both") if any(row.which == which for row in mine)]
    figure = _figure(5.0 * len(passes), 4.5)
    for place, which in enumerate(passes):
        axes = figure.add_subplot(1, len(passes), place + 1)
        here = [row for row in mine if row.which == which]
        measure = "operations" if any(row.operations for row in here) else "bytes"
        styles = dict(zip(dict.fromkeys(map(_kind, here)), (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))))
        for name, kind in dict.fromkeys((row.implementation, _kind(row)) for row in here):
            line = [row for row in here if (row.implementation, _kind(row)) == (name, kind)]
            line.sort(key=lambda row: getattr(row, measure))
            middle = [_known(row.p50_us) for row in line]
            below = [_known(row.p50_us) - _known(row.p20_us) for row in line]
            above = [_known(row.p80_us) - _known(row.p50_us) for row in line]
            label = f"{name} {kind}" if len(styles) > 1 else name
            linestyle, marker = styles[kind]
            style: dict[str, Any] = {"marker": marker, "linestyle": linestyle, "color": COLOURS.get(name), "capsize": 2}
            sizes = [getattr(row, measure) for row in line]
            axes.errorbar(sizes, middle, yerr=(below, above), label=label, **style)
        floors = sorted({(getattr(row, measure), _known(row.floor_us)) for row in here})
        axes.plot(*zip(*floors), linewidth=1, color="black", marker=".", label="floor")
        axes.set(xscale="log", yscale="log", title=f"{op}, {which}", xlabel=measure)
        if not place:
            axes.set_ylabel("µs: median, p20 to p80")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=7)
    return _save(figure, machine, out / f"time_{op}.png")


def _roofline(rows: list[Row], machine: Machine, out: Path) -> Path:
    """Measured time over the floor that bytes and operations set; on the diagonal nothing is left to win."""
    figure = _figure(7.0, 6.0)
    axes = figure.add_subplot(1, 1, 1)
    drawn = [row for row in rows if row.which != "both" and row.floor_us]
    markers = dict(zip(dict.fromkeys(row.op for row in drawn), "osD^vP*"))
    for op, name in dict.fromkeys((row.op, row.implementation) for row in drawn):
        points = [(row.floor_us, row.p50_us) for row in drawn if (row.op, row.implementation) == (op, name)]
        style: dict[str, Any] = {"marker": markers[op], "color": COLOURS.get(name), "label": f"{op} {name}"}
        axes.scatter(*zip(*points), s=26, alpha=0.8, **style)
    ends = [min(_known(row.floor_us) for row in drawn), max(_known(row.floor_us) for row in drawn)]
    axes.plot(ends, ends, color="black", linestyle=":", label="roofline")
    axes.set(xscale="log", yscale="log", xlabel="floor, µs", ylabel="measured, µs", title="Time against the roofline")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=6, ncols=2)
    return _save(figure, machine, out / "roofline.png")


def _kind(row: Row) -> str:
    """The words of a shape without its numbers: shapes of one kind are joined by a line."""
    return " ".join(word for word in row.shape.split() if re.fullmatch("[a-z_]+(8|32)?", word))


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, machine: Machine, path: Path) -> Path:
    warning = "not GPU numbers, " if not machine.capability else ""
    figure.supxlabel(
        f"{machine.device}, {warning}torch {machine.torch}, triton {machine.triton}, {machine.commit}", fontsize=7
    )
    figure.savefig(path, dpi=130)
    return path
