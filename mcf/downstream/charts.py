"""Charts of results: the one place that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcf.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
INK, BAR, GRID = "#333333", "#4878a8", "#dddddd"


def ced_chart(x: NDArray, share: NDArray, threshold: float, title: str, unit: str) -> NDArray[np.uint8]:
    """A cumulative error distribution, uint8 [H, W, 3]: share of images (0 to 1) by error (a share of the unit)."""
    figure, axes = _figure(6.4, 4.2)
    axes.plot(100 * x, 100 * share, color=BAR, linewidth=1.8)
    axes.axvline(
        100 * threshold, color=INK, linewidth=1, linestyle="--", label=f"failures beyond {100 * threshold:g} %"
    )
    axes.set(xlabel=f"NME by {unit.replace('_', '-')}, %", ylabel="images with at most this error, %", title=title)
    axes.set(xlim=(0, 100 * x[-1]), ylim=(0, 100))
    axes.grid(color=GRID)
    axes.legend(frameon=False, loc="lower right")
    return _pixels(figure)


def bar_chart(values: Mapping[str, float], mean: float, title: str) -> NDArray[np.uint8]:
    """Horizontal bars of values in percent with their mean as a line, uint8 [H, W, 3]; first name on top."""
    figure, axes = _figure(6.4, 1.2 + 0.27 * len(values))
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=BAR, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean {mean:.2f}")
    axes.set(xlim=(0, 108), xlabel="F1, %", title=title)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return _pixels(figure)


def _figure(width: float, height: float) -> tuple[Any, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "charts") from None
    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _pixels(figure: Any) -> NDArray[np.uint8]:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()
