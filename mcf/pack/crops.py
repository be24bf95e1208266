"""Geometry of a crop: which part of an upright image is kept, and how large it becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mcf.pack.faces import Face

# Where the five landmarks of an upright face stand in a crop that just holds it, as shares of its side: right eye, left
# eye, nose, right and left corner of the mouth (the template of ArcFace, Deng et al. 2019, at 112 pixels).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TEMPLATE /= 112


@dataclass(frozen=True)
class View:
    """A part of an image and the size it is resized to.

    `box` is (left, top, right, bottom) in pixels of the upright original, right and bottom exclusive; `size` is
    (width, height) of the result.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels of the original for one of the result, the smaller of both axes."""
        left, top, right, bottom = self.box
        return min((right - left) / self.size[0], (bottom - top) / self.size[1])

    def keeps(self, width: int, height: int) -> bool:
        """Whether an image of this size passes through untouched."""
        return self.box == (0, 0, width, height) and self.size == (width, height)


@dataclass(frozen=True)
class Turned(View):
    """A square around `centre` with sides of `side` pixels, turned clockwise by `angle` (radians) as seen on a screen.

    `box` is what it touches of the image; where it reaches over the edge, the image's outermost pixels are repeated.
    """

    centre: tuple[float, float]
    side: float
    angle: float

    @property
    def scale(self) -> float:
        """Pixels of the original for one of the result."""
        return self.side / self.size[0]

    @property
    def reach(self) -> tuple[int, int, int, int]:
        """The rectangle that holds the square and what a filter looks at beyond it, over the image's edge too."""
        half = self.side / 2 * (abs(math.cos(self.angle)) + abs(math.sin(self.angle))) + 2 * max(1.0, self.scale)
        x, y = self.centre
        return math.floor(x - half), math.floor(y - half), math.ceil(x + half), math.ceil(y + half)

    def affine(
        self, left: float, top: float, shrunk: tuple[float, float]
    ) -> tuple[float, float, float, float, float, float]:
        """Pillow's (a, b, c, d, e, f): from pixels of the result to those of the image from (left, top), shrunk so."""
        across = (self.scale * math.cos(self.angle), self.scale * math.sin(self.angle))
        down = (-across[1], across[0])
        half = self.size[0] / 2
        x, y = (self.centre[i] - (left, top)[i] - half * (across[i] + down[i]) for i in (0, 1))
        return (
            across[0] / shrunk[0], down[0] / shrunk[0], x / shrunk[0],
            across[1] / shrunk[1], down[1] / shrunk[1], y / shrunk[1],
        )  # fmt: skip


def whole(width: int, height: int, size: int | None) -> View:
    """The whole image; scaled down, never up, until its shorter side is `size`."""
    shorter = min(width, height)
    if size is None or shorter <= size:
        return View((0, 0, width, height), (width, height))
    return View((0, 0, width, height), (round(width * size / shorter), round(height * size / shorter)))


def square(width: int, height: int, size: int | None) -> View:
    """The largest centred square, resized to `size` (smaller ones are enlarged: all results are alike)."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return View((left, top, left + side, top + side), (size or side, size or side))


VIEWS = {"none": whole, "square": square}


def around(face: Face, width: int, height: int, size: int | None, margin: float) -> View:
    """A square around a face, its box's longer side · (1 + margin) wide, resized to `size`.

    No pixels are made up: a square that reaches over the edge is moved inside, and one that is longer than the image's
    shorter side is cut down to that.
    """
    left, top, right, bottom = face.box
    side = min(round(max(right - left, bottom - top) * (1 + margin)), width, height)
    x = min(max(round((left + right - side) / 2), 0), width - side)
    y = min(max(round((top + bottom - side) / 2), 0), height - side)
    return View((x, y, x + side, y + side), (size or side, size or side))


def upright(face: Face, width: int, height: int, size: int | None, margin: float) -> Turned:
    """A square in which the face's five landmarks come nearest to TEMPLATE, whose side is grown by `margin`.

    The similarity that takes the template to the landmarks with the least squares (Umeyama 1991; in the plane it is one
    complex number).
    """
    marks = np.array(face.landmarks, dtype=np.float64).reshape(5, 2) @ [1, 1j]
    model = TEMPLATE @ [1, 1j]
    spread = model - model.mean()
    turn = np.vdot(spread, marks - marks.mean()) / np.vdot(spread, spread).real
    centre = marks.mean() + turn * (0.5 + 0.5j - model.mean())
    side = max(abs(turn) * (1 + margin), 1.0)
    angle = float(np.angle(turn))
    result = size or max(1, round(side))
    view = Turned((0, 0, 0, 0), (result, result), (float(centre.real), float(centre.imag)), float(side), angle)
    left, top, right, bottom = view.reach
    return replace(view, box=(max(0, left), max(0, top), min(width, right), min(height, bottom)))
