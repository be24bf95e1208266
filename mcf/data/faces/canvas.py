"""The picture while it is drawn: colours, classes and depth, and simple solids that meet it by depth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcf.data.faces.chart import Floats


class Canvas:
    """A square picture in linear colours, drawn back to front or by depth, in camera coordinates.

    x and y are the camera-plane coordinates of columns and rows, in head units around the head's origin; y goes up.
    """

    def __init__(self, side: int, scale: float, centre: tuple[float, float]):
        steps = np.arange(side, dtype=np.float32) + np.float32(0.5)
        self.side = side
        self.pixel = 1 / (scale * side)
        self.x: Floats = (steps - np.float32(centre[0] * side)) * np.float32(self.pixel)
        self.y: Floats = (np.float32(centre[1] * side) - steps) * np.float32(self.pixel)
        self.colour: Floats = np.zeros((side * side, 3), np.float32)
        self.label: NDArray[np.uint8] = np.zeros(side * side, np.uint8)
        self.depth: Floats = np.full(side * side, -9, np.float32)

    def box(self, x0: float, x1: float, y0: float, y1: float) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Flat indices and coordinates of the pixels in a rectangle."""
        columns = np.flatnonzero((self.x >= x0) & (self.x <= x1))
        rows = np.flatnonzero((self.y >= y0) & (self.y <= y1))
        at = (rows[:, None] * self.side + columns).ravel()
        return at, self.x[at % self.side], self.y[at // self.side]

    def put(
        self, at: NDArray[np.intp], colour: Floats, cover: Floats, label: int | NDArray[np.uint8] | None, depth: Floats
    ) -> None:
        """Blend colours [N, 3] (or one) by coverage [N] where nothing nearer is there; class where half is covered."""
        seen = (depth >= self.depth[at]) & (cover > 0.004)
        at, cover = at[seen], cover[seen]
        colour = colour[seen] if colour.ndim == 2 else colour
        self.colour[at] += (colour - self.colour[at]) * cover[:, None]
        most = cover >= 0.5
        if label is not None:
            self.label[at[most]] = label if isinstance(label, int) else label[seen][most]
            self.depth[at[most]] = depth[seen][most]


def ellipsoid(
    canvas: Canvas, turn: Floats, centre: Floats, radii: Floats, tilt: Floats
) -> tuple[NDArray[np.intp], Floats, Floats, Floats, Floats] | None:
    """Visible points of an ellipsoid: pixels, depth, coverage, normals in camera coordinates, and points in its own.

    `centre` [3] and `tilt` [3, 3] (own axes to head axes) place it on the head, `turn` [3, 3] the head in the camera.
    """
    axes = turn @ tilt
    middle = turn @ centre
    reach = np.sqrt((axes**2 @ radii**2)[:2]) + canvas.pixel
    at, x, y = canvas.box(middle[0] - reach[0], middle[0] + reach[0], middle[1] - reach[1], middle[1] + reach[1])
    if not len(at):
        return None
    x, y = x - middle[0], y - middle[1]
    start = (np.outer(x, axes[0]) + np.outer(y, axes[1])) / radii
    step = axes[2] / radii
    a, b, c = step @ step, start @ step, (start * start).sum(axis=1) - 1
    root = b * b - a * c
    # Distance to the outline in pixels, from the slope of the root there.
    edge = (c - b * b / a) / 2
    narrow = np.sqrt(np.maximum((start / radii) ** 2, 1e-9).sum(axis=1)) * canvas.pixel
    cover = np.clip(0.5 - edge / narrow, 0, 1).astype(np.float32)
    z = (-b + np.sqrt(np.maximum(root, 0))) / a
    own = start + z[:, None] * step
    normal = (own / radii) @ axes.T
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    seen = cover > 0
    return at[seen], (z + middle[2])[seen], cover[seen], normal[seen].astype(np.float32), own[seen].astype(np.float32)
