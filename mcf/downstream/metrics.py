"""What the published numbers are made of: NME, AUC and FR of landmarks, F1 of classes.

Errors are taken in pixels of the original image, and the F1 from one confusion matrix over a whole test set at original
resolution: neither is a mean over images of something computed in the warped square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import simpson

STEP = 1e-4  # of the error axis of a CED curve


@dataclass(frozen=True)
class Unit:
    """What an error is divided by: the diagonal or the side of the annotated box, or the distance between two eyes.

    name: as tables show it. left, right: points whose means are the two ends; empty for the kinds of box.
    """

    name: str
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()

    def of(self, points: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lengths [N] in pixels, of true points [N, P, 2] and boxes [N, 4] (left, top, right, bottom)."""
        if self.left:
            apart = points[:, list(self.left)].mean(1) - points[:, list(self.right)].mean(1)
            return np.linalg.norm(apart, axis=-1)
        width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        return np.hypot(width, height) if self.name == "diag" else np.sqrt(width * height)


DIAGONAL, BOX = Unit("diag"), Unit("box")
# Outer corners of the eyes, and their centres, in iBUG's 68 points and in WFLW's 98.
EYES = {
    68: (Unit("inter_ocular", (36,), (45,)), Unit("inter_pupil", tuple(range(36, 42)), tuple(range(42, 48)))),
    98: (Unit("inter_ocular", (60,), (72,)), Unit("inter_pupil", (96,), (97,))),
}


def nme(predicted: NDArray, true: NDArray, unit: NDArray) -> NDArray[np.float64]:
    """Normalised mean error of each image: mean over its points of ‖p − g‖ / d.

    Args:
        predicted, true: [N, P, 2], pixels of the original images.
        unit: d, [N], pixels (`Unit.of`).

    Returns:
        [N], a share of d; tables show their mean times 100.
    """
    distances = np.linalg.norm(np.asarray(predicted, np.float64) - np.asarray(true, np.float64), axis=-1)
    return distances.mean(axis=1) / np.asarray(unit, np.float64)


def ced(errors: NDArray, threshold: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cumulative error distribution: x, and the share of images whose error is at most x.

    x is np.arange(0, threshold + 1e-4, 1e-4). Its last value depends on a rounding of that sum: for 0.10 there are 1,001
    points that end at 0.1000, for 0.07 there are 702 that end at 0.0701. Published values were computed on it.
    """
    x = np.arange(0.0, threshold + STEP, STEP)
    return x, np.searchsorted(np.sort(errors), x, side="right") / max(len(errors), 1)


def auc_fr(errors: NDArray, threshold: float) -> tuple[float, float]:
    """Area under the CED curve / threshold, and the failure rate 1 − CED at its last x; both 0 to 1."""
    x, share = ced(errors, threshold)
    return _simpson(share, x) / threshold, float(1.0 - share[-1])


def _simpson(y: NDArray[np.float64], x: NDArray[np.float64]) -> float:
    """Simpson's rule as scipy had it when the published values were made.

    With an even number of points one interval is left over: it is taken as a trapezoid, once at either end, and the two
    results are averaged (scipy's `even="avg"`, which has gone since).
    """
    if len(x) % 2:
        return float(simpson(y, x=x))
    first = simpson(y[:-1], x=x[:-1]) + (x[-1] - x[-2]) * (y[-1] + y[-2]) / 2
    last = simpson(y[1:], x=x[1:]) + (x[1] - x[0]) * (y[1] + y[0]) / 2
    return float(first + last) / 2


class Confusion:
    """One confusion matrix over a whole test set: `counts[t, p]` pixels of class t that were called p."""

    def __init__(self, classes: int):
        self.counts = np.zeros((classes, classes), np.int64)

    def add(self, true: NDArray, predicted: NDArray) -> None:
        """Count the pixels of an image; both of one shape, whole numbers below the number of classes."""
        classes = len(self.counts)
        if true.shape != predicted.shape:
            raise ValueError(f"labels of shape {true.shape}, predictions of shape {predicted.shape}")
        pairs = true.astype(np.int64).ravel() * classes + predicted.astype(np.int64).ravel()
        self.counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def f1(self) -> NDArray[np.float64]:
        """F1 of each class, 2·TP / (row + column); NaN for a class that is neither in the labels nor predicted."""
        both = self.counts.sum(0) + self.counts.sum(1)
        with np.errstate(invalid="ignore"):
            return 2 * np.diagonal(self.counts) / both


def mean_f1(f1: Sequence[float] | NDArray, background: int | None = 0) -> float:
    """Mean over all classes but the background; classes that do not occur (NaN) are left out. NaN if none is left."""
    kept = np.delete(np.asarray(f1, np.float64), [] if background is None else background)
    return float(np.nanmean(kept)) if np.isfinite(kept).any() else float("nan")
