"""Finding faces where nobody has: a function of the user's, or OpenCV's YuNet.

`detector=MODULE:FUNCTION` names a function of one image, uint8 RGB [H, W, 3], that gives (boxes, scores, landmarks):
float [n, 4] as left, top, right, bottom in pixels, float [n] in [0, 1], and float [n, 5, 2] or None.
`detector=FILE.onnx` is YuNet (OpenCV Zoo's face_detection_yunet_*.onnx), through OpenCV.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mcf.errors import UserError, missing_package
from mcf.pack.faces import Face

_LONGEST = 1024  # YuNet looks at images scaled down to this: it finds faces of 10 to 300 pixels


def finder(detector: str) -> Callable[[np.ndarray], list[Face]]:
    """The function that `detector` names, as image → faces. Raises UserError for what it cannot be."""
    find = _yunet(Path(detector)) if detector.lower().endswith(".onnx") else _named(detector)
    return lambda pixels: _faces(find(pixels), detector)


def _named(detector: str) -> Callable[[np.ndarray], Any]:
    module, colon, name = detector.partition(":")
    if not (module and colon and name):
        raise UserError(f"detector={detector}: give MODULE:FUNCTION, or the path of a YuNet file that ends in .onnx")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it, in worker processes too
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"detector={detector}: cannot be imported ({error}); check the name and PYTHONPATH") from None
    if not callable(found):
        raise UserError(f"detector={detector}: not a function")
    return found


def _faces(result: Any, detector: str) -> list[Face]:
    try:
        boxes, scores, landmarks = result
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        scores = np.asarray(scores, dtype=np.float64).reshape(len(boxes))
        marks = None if landmarks is None else np.asarray(landmarks, dtype=np.float64).reshape(len(boxes), 10)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"detector={detector}: gives no (boxes [n,4], scores [n], landmarks [n,5,2] or None): {error}"
        ) from None
    return [
        Face((box[0], box[1], box[2], box[3]), float(score), None if marks is None else tuple(marks[i].tolist()))
        for i, (box, score) in enumerate(zip(boxes.tolist(), scores))
    ]


def _yunet(path: Path) -> Callable[[np.ndarray], Any]:
    if not path.is_file():
        raise UserError(f"detector={path}: no such file; download face_detection_yunet_*.onnx of OpenCV's model zoo")
    try:
        import cv2
    except ImportError:
        raise missing_package("OpenCV", "detector=FILE.onnx", "opencv-python-headless") from None
    cv2.setNumThreads(1)
    try:
        model = cv2.FaceDetectorYN.create(str(path), "", (320, 320), score_threshold=0.5)
    except cv2.error as error:
        raise UserError(f"detector={path}: OpenCV cannot read it as YuNet ({str(error).strip()[:150]})") from None

    def find(pixels: np.ndarray):
        scale = min(1.0, _LONGEST / max(pixels.shape[:2]))
        small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        model.setInputSize((small.shape[1], small.shape[0]))
        _, rows = model.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        rows = np.zeros((0, 15)) if rows is None else rows.astype(np.float64)
        boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)
        # Rounding of the scaled picture: each axis has its own factor.
        x, y = pixels.shape[1] / small.shape[1], pixels.shape[0] / small.shape[0]
        return boxes * [x, y, x, y], rows[:, 14], rows[:, 4:14].reshape(-1, 5, 2) * [x, y]

    return find
