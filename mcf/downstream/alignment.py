"""Face alignment: heat-maps of points, their loss, and their errors in the original images (DOWNSTREAM 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mcf.downstream.config import FinetuneConfig
from mcf.downstream.datasets import Face, FaceSet
from mcf.downstream.loader import Batch, Prepared
from mcf.downstream.metrics import auc_fr, nme
from mcf.downstream.scores import Scores

LEAST_MASS = 1e-6  # of a heat-map, in the division


class Alignment:
    """Loss and metrics of alignment for one data set. Predictions are points [P, 2] in pixels of the original image."""

    better = "lower"

    def __init__(self, faces: FaceSet, config: FinetuneConfig):
        self.set, self.config = faces, config
        self.headline = f"nme_{faces.units[0].name}"

    def terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of logits [B, P, h, w]: "coordinate", "heatmap", and "total", their sum.

        coordinate: mean distance of the predicted points, in sides of the square. heatmap: binary cross-entropy against
        the target heat-maps at heatmap.size.
        """
        assert batch.points is not None
        logits = logits.float()
        coordinate = (points_of(logits.sigmoid()) - batch.points).norm(dim=-1).mean()
        size = self.config.heatmap.size
        resized = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
        target = heatmaps(batch.points, size, self.config.heatmap.radius)
        heatmap = F.binary_cross_entropy_with_logits(resized, target)
        return {"total": coordinate + heatmap, "coordinate": coordinate, "heatmap": heatmap}

    def predict(self, logits: Tensor, prepared: Sequence[Prepared]) -> list[NDArray]:
        """Points of each face in pixels of its original image."""
        points = points_of(logits.float().sigmoid()).double().cpu()
        return [p.warp.points_back(one * p.warp.size - 0.5).numpy() for one, p in zip(points, prepared)]

    def judge(self, prediction: NDArray, prepared: Prepared) -> NDArray:
        """What is kept of a prediction for the scores: itself."""
        return prediction

    def score(self, faces: Sequence[Face], judged: Sequence[NDArray]) -> Scores:
        """NME ×100 by every unit, AUC and FR, over all faces and over each subset."""
        true, box = (np.stack([np.asarray(getattr(face, name)) for face in faces]) for name in ("points", "box"))
        errors = {unit.name: nme(np.stack(judged), true, unit.of(true, box)) for unit in self.set.units}
        subsets: dict[str, NDArray[np.bool_]] = {"": np.ones(len(faces), bool)}
        for tag in sorted({tag for face in faces for tag in face.tags}):
            subsets[f"/{tag}"] = np.array([tag in face.tags for face in faces])
        metrics: dict[str, float] = {}
        for suffix, chosen in subsets.items():
            metrics |= {f"nme_{name}{suffix}": 100 * float(e[chosen].mean()) for name, e in errors.items()}
            if self.set.auc is not None:
                name, threshold = self.set.auc
                area, failures = auc_fr(errors[name][chosen], threshold)
                label = f"{name}_{100 * threshold:g}"
                metrics |= {f"auc_{label}{suffix}": 100 * area, f"fr_{label}{suffix}": 100 * failures}
        return Scores(metrics, errors=100 * errors[self.set.units[0].name])


def points_of(heat: Tensor) -> Tensor:
    """Centres of mass of heat-maps [B, P, h, w] ≥ 0, as points [B, P, 2] in [0, 1]: (Σ heat·(x, y) / Σ heat + ½) / size."""
    height, width = heat.shape[-2:]
    mass = heat.sum((-2, -1)).clamp(min=LEAST_MASS)
    x = (heat.sum(-2) * torch.arange(width, device=heat.device)).sum(-1) / mass
    y = (heat.sum(-1) * torch.arange(height, device=heat.device)).sum(-1) / mass
    return torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1)


def heatmaps(points: Tensor, size: int, radius: float) -> Tensor:
    """Targets [B, P, size, size] of points in [0, 1]: exp(−r²·16 / (2R²)) at distance r (cells) up to R, else 0."""
    centre = points * size - 0.5
    line = torch.arange(size, device=points.device)
    x = (line - centre[..., :1]).square()
    y = (line - centre[..., 1:]).square()
    square = y[..., :, None] + x[..., None, :]
    # Far away exp would be a denormal number, which a CPU is slow with.
    near = square.clamp(max=radius**2)
    return torch.exp(-near * 16 / (2 * radius**2)) * (square <= radius**2)
