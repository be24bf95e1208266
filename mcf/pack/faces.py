"""Which faces of an image are kept: boxes and landmarks as a detector left them, held against limits.

Boxes are (left, top, right, bottom) and landmarks five points (right eye, left eye, nose, right and left corner of the
mouth, as seen from the person; RetinaFace's order), all in pixels of the upright image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcf.pack.options import PackConfig

COLUMNS = 15  # a face as a row of numbers: box 4, landmarks 10 (NaN where there are none), score 1

NOT_FINITE = "box is not a number"
EMPTY_BOX = "box is empty or reversed"
OUTSIDE = "box outside the image"
LOW_SCORE = "score too low"
SMALL_FACE = "face too small"
NO_LANDMARKS = "no landmarks to align by"
ODD_LANDMARKS = "landmarks do not fit the box"
NOT_LARGEST = "not the largest face"
NO_FACE = "no face"
_STAGES = (NOT_FINITE, EMPTY_BOX, OUTSIDE, LOW_SCORE, SMALL_FACE, NO_LANDMARKS, ODD_LANDMARKS, NOT_LARGEST)
_INSIDE = 0.5  # least share of a box's area that lies in the image: boxes of faces at the edge reach over it a little


@dataclass(frozen=True)
class Face:
    """A face: box, score in [0, 1], and five landmarks (x0, y0 … x4, y4) or None."""

    box: tuple[float, float, float, float]
    score: float = 1.0
    landmarks: tuple[float, ...] | None = None

    @property
    def side(self) -> float:
        """The shorter side of the box, pixels."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top)

    @property
    def area(self) -> float:
        """Square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    def scaled(self, x: float, y: float) -> Face:
        """The same face in an image that was resized by these factors."""
        factors = (x, y)
        left, top, right, bottom = self.box
        marks = self.landmarks and tuple(value * factors[i % 2] for i, value in enumerate(self.landmarks))
        return Face((left * x, top * y, right * x, bottom * y), self.score, marks)

    @classmethod
    def of_row(cls, row: Sequence[float]) -> Face:
        """From COLUMNS numbers."""
        left, top, right, bottom, *marks, score = row
        return cls((left, top, right, bottom), score, tuple(marks) if all(map(math.isfinite, marks)) else None)

    def to_row(self) -> list[float]:
        """The inverse of `of_row`."""
        return [*self.box, *(self.landmarks or (math.nan,) * 10), self.score]


def select(
    faces: Sequence[Face], width: int, height: int, options: PackConfig
) -> tuple[list[tuple[int, Face]], list[str]]:
    """(number in `faces`, face) of those that are kept, and the reasons that the others are not.

    width, height: of the upright image. Kept boxes are as they were given: what reaches over the edge is the crop's
    business. Of equally large faces the first is the largest.
    """
    kept: list[tuple[int, Face]] = []
    reasons: list[str] = []
    for number, face in enumerate(faces):
        reason = _fault(face, width, height, options)
        if reason:
            reasons.append(reason)
        else:
            kept.append((number, face))
    if options.faces == "largest" and len(kept) > 1:
        largest = max(kept, key=lambda item: item[1].area)
        reasons += [NOT_LARGEST] * (len(kept) - 1)
        kept = [largest]
    return kept, reasons


def _fault(face: Face, width: int, height: int, options: PackConfig) -> str | None:
    if not all(map(math.isfinite, (*face.box, face.score))):
        return NOT_FINITE
    left, top, right, bottom = face.box
    if right <= left or bottom <= top:
        return EMPTY_BOX
    inside = max(0.0, min(right, width) - max(left, 0.0)) * max(0.0, min(bottom, height) - max(top, 0.0))
    if inside < _INSIDE * face.area:
        return OUTSIDE
    if face.score < options.min_score:
        return LOW_SCORE
    if face.side < options.min_face:
        return SMALL_FACE
    if options.cropping == "aligned":
        return NO_LANDMARKS if face.landmarks is None else _landmarks_fault(face)
    return None


def _landmarks_fault(face: Face) -> str | None:
    """Landmarks in one point, or far from the box, would turn and stretch a crop beyond all sense."""
    marks = np.array(face.landmarks).reshape(5, 2)
    left, top, right, bottom = face.box
    centre, extent = marks.mean(0), np.ptp(marks, axis=0).max()
    inside = left <= centre[0] <= right and top <= centre[1] <= bottom
    return None if inside and face.side / 8 <= extent <= 2 * max(right - left, bottom - top) else ODD_LANDMARKS


def telling(reasons: Sequence[str]) -> str:
    """Of the reasons that an image's faces are out for, that of the face which came furthest; NO_FACE for none."""
    return max(reasons, key=_STAGES.index, default=NO_FACE)
