"""A star-shaped surface as a table of radii over directions, and rays against it.

Directions live on a square chart: Lambert's azimuthal projection around the viewing direction z, so that the face is
sampled evenly and only the back of the skull (over 135 degrees from the front) is out of range. A point p is inside
where |p| < radius(direction of p). Rays are parallel (a far camera), and are followed by sphere tracing, coarse to fine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.floating[Any]]

EXTENT = 0.93  # |chart coordinate| = sin(angle from z / 2)
CELLS = 175  # 3k + 1, so that every third cell spans the chart as well


@lru_cache(maxsize=4)
def directions(cells: int = CELLS) -> Floats:
    """Unit vectors [cells, cells, 3] of the chart: rows go up in y, columns right in x."""
    axis = np.linspace(-EXTENT, EXTENT, cells, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    s2 = u * u + v * v
    shrink = np.where(s2 > 0.98, np.sqrt(0.98 / np.maximum(s2, 1e-6)), 1).astype(np.float32)
    u, v = u * shrink, v * shrink
    s2 = u * u + v * v
    chord = 2 * np.sqrt(1 - s2)
    n = np.stack([u * chord, v * chord, 1 - 2 * s2], axis=-1)
    n.setflags(write=False)
    return n


def locate(x: Floats, y: Floats, z: Floats, cells: int = CELLS) -> tuple[Floats, Floats, Floats]:
    """Of points: chart column and row (fractional, inside the table), and distance from the origin."""
    r = np.sqrt(x * x + y * y + z * z)
    q = ((cells - 1) / (2 * EXTENT)) / np.sqrt(2 * r * (r + z) + np.float32(1e-6))
    half = np.float32((cells - 1) / 2)
    top = np.float32(cells - 1.001)
    return np.clip(x * q + half, 0, top), np.clip(y * q + half, 0, top), r


class Radii:
    """A table of radii made ready for many look-ups: the four coefficients of each cell lie together."""

    def __init__(self, radius: Floats):
        self.cells = radius.shape[0]
        self.largest = float(radius.max())
        coefficients = np.zeros((*radius.shape, 4), np.float32)
        coefficients[..., 0] = radius
        coefficients[:, :-1, 1] = radius[:, 1:] - radius[:, :-1]
        coefficients[:-1, :, 2] = radius[1:] - radius[:-1]
        coefficients[:-1, :, 3] = coefficients[1:, :, 1] - coefficients[:-1, :, 1]
        self._coefficients = coefficients.reshape(-1, 4)

    def gap(self, x: Floats, y: Floats, z: Floats) -> Floats:
        """Distance of points outside the surface along the radius (negative inside)."""
        column, row, r = locate(x, y, z, self.cells)
        i, j = row.astype(np.int32), column.astype(np.int32)
        row -= i
        column -= j
        i *= self.cells
        i += j
        c = self._coefficients.take(i, axis=0)
        return r - (c[:, 0] + c[:, 1] * column + row * (c[:, 2] + c[:, 3] * column))


def bilinear(table: Floats, column: Floats, row: Floats) -> Floats:
    """Values of `table` [cells, cells] or [cells, cells, C] at fractional positions [N]."""
    cells = table.shape[0]
    flat = table.reshape(cells * cells, *table.shape[2:])
    i, j = row.astype(np.int32), column.astype(np.int32)
    fi, fj = row - i, column - j
    at = i * cells + j
    if flat.ndim == 2:
        fi, fj = fi[:, None], fj[:, None]
    low = flat[at]
    low += (flat[at + 1] - low) * fj
    at += cells
    high = flat[at]
    high += (flat[at + 1] - high) * fj
    high -= low
    high *= fi
    low += high
    return low


def march(
    radii: Radii, rotation: Floats, x: Floats, y: Floats, depth: Floats, steps: int, relax: float = 0.8
) -> tuple[Floats, Floats]:
    """Follow rays of the camera's plane points (x, y) from `depth` inward: final depth and gap, both [N].

    `rotation` [3, 3] turns head coordinates into the camera's; depth is the camera's z, towards the viewer.
    """
    back = rotation.T.astype(np.float32)
    ox, oy, oz = (back[k, 0] * x + back[k, 1] * y for k in range(3))
    depth = depth.copy()
    outside = depth
    for step in range(steps):
        outside = radii.gap(ox + back[0, 2] * depth, oy + back[1, 2] * depth, oz + back[2, 2] * depth)
        if step < steps - 1:
            depth -= relax * outside
    return depth, outside


def cast(radius: Floats, rotation: Floats, xs: Floats, ys: Floats, coarse: int = 4) -> tuple[NDArray[np.intp], Floats]:
    """Where a picture with camera-plane columns `xs` [W] and rows `ys` [H] sees the surface.

    Returns flat pixel indices [N] and [4, N]: camera depth, and coverage 0–1 of pixels at the outline, and the
    camera-plane x and y.
    """
    height, width = len(ys), len(xs)
    pixel = abs(float(xs[1] - xs[0]))
    radii = Radii(radius)
    reach = radii.largest + 0.01
    cx, cy = np.meshgrid(xs[coarse // 2 :: coarse], ys[coarse // 2 :: coarse])
    inside = cx * cx + cy * cy < reach * reach
    start = np.sqrt(reach * reach - cx[inside] ** 2 - cy[inside] ** 2).astype(np.float32)
    depth, outside = march(radii, rotation, cx[inside], cy[inside], start, 20, 0.7)
    grid = np.full(cx.shape, -9, np.float32)
    # Rays that pass close by may still hold a pixel of the outline: they start the fine search, too.
    grid[inside] = np.where(outside < coarse * pixel, depth, -9)
    grid = ndimage.maximum_filter(grid, 3)
    fine = np.repeat(np.repeat(grid, coarse, axis=0), coarse, axis=1)
    fine = np.pad(fine, ((0, max(0, height - fine.shape[0])), (0, max(0, width - fine.shape[1]))), mode="edge")
    fine = np.ascontiguousarray(fine[:height, :width]).ravel()
    at = np.flatnonzero(fine > -8)
    x, y = xs[at % width], ys[at // width]
    depth, outside = march(radii, rotation, x, y, fine[at], 4, 0.85)
    cover = np.ones_like(depth)
    # Few rays are left that graze an outline or fall behind the nose: these go on alone.
    left = np.flatnonzero(outside > 0.2 * pixel)
    nearest = outside[left]
    behind = -np.sqrt(np.maximum(0, reach * reach - x * x - y * y))
    for _ in range(5):
        tail, gap_left = march(radii, rotation, x[left], y[left], depth[left] - 0.7 * np.maximum(outside[left], 0), 5)
        nearest = np.minimum(nearest, gap_left)
        depth[left], outside[left] = tail, gap_left
        cover[left] = np.where(gap_left > 0.2 * pixel, np.clip(1 - nearest / pixel, 0, 1), 1)
        on = (gap_left > 0.2 * pixel) & (tail > behind[left])
        left, nearest = left[on], nearest[on]
    seen = cover > 0.02
    return at[seen], np.stack([depth[seen], cover[seen], x[seen], y[seen]])


def normals(radius: Floats) -> Floats:
    """Outward unit normals [cells, cells, 3] of the surface, in head coordinates."""
    p = radius[..., None] * directions(radius.shape[0])
    along_row, along_column = np.gradient(p, axis=(0, 1))
    n = np.cross(along_column, along_row)
    return (n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-8)).astype(np.float32)


def shadow(radius: Floats, normal: Floats, light: Floats, every: int = 3) -> Floats:
    """Share of the light [cells, cells] (0–1) that reaches the surface from direction `light` [3], softened."""
    r = radius[::every, ::every]
    p = (r[..., None] * directions(radius.shape[0])[::every, ::every] + 0.025 * normal[::every, ::every]).reshape(-1, 3)
    lit = np.ones(len(p), np.float32)
    small = Radii(r)
    for t in (0.03, 0.07, 0.12, 0.19, 0.28, 0.4):
        q = p + np.float32(t) * light
        outside = small.gap(*np.ascontiguousarray(q.T))
        lit = np.minimum(lit, np.clip(0.75 + outside / (0.25 * t + 0.015), 0, 1))
    blurred = ndimage.gaussian_filter(lit.reshape(r.shape), 0.8)
    full = ndimage.zoom(blurred, radius.shape[0] / r.shape[0], order=1, mode="nearest")
    return np.ascontiguousarray(full[: radius.shape[0], : radius.shape[1]]).astype(np.float32)
