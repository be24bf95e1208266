"""Face parsing: a class for every pixel, its loss, and its F1 in the original images (DOWNSTREAM 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face, FaceSet
from mcf.downstream.loader import Batch, Prepared
from mcf.downstream.metrics import Confusion, mean_f1
from mcf.downstream.scores import Scores


class Parsing:
    """Loss and metrics of parsing for one data set. Predictions are classes [H, W] of the original image's pixels."""

    better = "higher"
    headline = "f1_mean"

    def __init__(self, faces: FaceSet, config: FinetuneConfig):
        self.set, self.config = faces, config

    def terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of logits [B, C, h, w]: "total", the cross-entropy over all pixels of the square."""
        assert batch.labels is not None
        return {"total": F.cross_entropy(self._square(logits), batch.labels)}

    def predict(self, logits: Tensor, prepared: Sequence[Prepared]) -> list[NDArray]:
        """Classes of each original image's pixels: the logits are warped back, then the largest wins."""
        squares = self._square(logits)
        predictions = []
        for one, p in zip(squares, prepared):
            warp = type(p.warp)(p.warp.matrix[None], p.warp.size, p.warp.factor).to(one.device)
            # Outside of the square all logits are 0, and the first class, the background, wins.
            predictions.append(warp.images_back(one[None], *p.shape)[0].argmax(0).to("cpu").numpy().astype(np.uint8))
        return predictions

    def judge(self, prediction: NDArray, prepared: Prepared) -> NDArray:
        """What is kept of a prediction for the scores: the confusion matrix of this image."""
        assert prepared.labels is not None
        confusion = Confusion(len(self.set.classes))
        confusion.add(prepared.labels, prediction)
        return confusion.counts

    def score(self, faces: Sequence[Face], judged: Sequence[NDArray]) -> Scores:
        """F1 ×100 of each class and their mean without the background, from one confusion matrix over all images.

        A class that neither occurs nor is predicted has no F1, and is left out of the mean.
        """
        whole, single = Confusion(len(self.set.classes)), Confusion(len(self.set.classes))
        errors = []
        for counts in judged:
            whole.counts += counts
            single.counts = counts
            errors.append(100 - 100 * mean_f1(single.f1()))
        f1 = whole.f1()
        classes = {name: 100 * float(value) for name, value in zip(self.set.classes, f1) if np.isfinite(value)}
        metrics = {"f1_mean": 100 * mean_f1(f1)} | {f"f1/{name}": value for name, value in classes.items()}
        return Scores(metrics, errors=np.nan_to_num(np.array(errors), nan=0.0))

    def _square(self, logits: Tensor) -> Tensor:
        size = self.config.sides[0]
        return F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
