"""Geometry of a crop: which part of an upright image is kept, and how large it becomes."""

from __future__ import annotations

from dataclasses import dataclass


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
