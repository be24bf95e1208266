"""One encoder, probed over all ranks.

    at the start   rank 0 reads the tables for all; rank r of W decodes and keeps the faces ≡ r (mod W), uint8 squares
    a probe        every rank embeds its faces, in float32                       N/W forward passes of the encoder
                   class tokens (or means) go to all ranks                       N · width floats
                   patch tokens, averaged to 7 × 7 cells, go to the one rank     N · 49 · width floats
                   that computes the ridge; the numbers are dealt to the ranks, each computes its own, all hear all

Names of the numbers, as they stand beside the losses:

    probe/knn              share of the faces whose nearest faces of other groups (videos) tell their label, 0–1
    probe/linear           accuracy of a linear probe of the label, fitted on half of each label's groups, 0–1
    probe/landmark_nme     error of points that ridge regression reads off the patch tokens of people it was not fitted on, % of
                           the distance of the outer eye corners (of the box's diagonal where points are of another number)
    probe/landmark_r2      share of the points' variance about their mean face that it explains, 1 at best
    probe/rank             effective rank of the features, 1 (collapse) to the width
    probe/uniformity       0 (collapse) to about −4 (even over the sphere)
    time/probe_s           seconds that all this took
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mcf import distributed
from mcf.config import ProbeKeys
from mcf.distributed import World
from mcf.downstream.datasets.alignment import units_of
from mcf.downstream.metrics import nme
from mcf.errors import UserError
from mcf.models.teacher import vit_of
from mcf.models.vit import VisionTransformer
from mcf.probing import numbers
from mcf.probing.faces import cuts, points_in_image, points_in_square, read_faces

BATCH = 64  # faces that are embedded at once
CELLS = 7  # side of the grid that patch tokens are averaged to for the ridge


class Probe:
    """Labelled faces, ready for encoders of one input size. Making it and calling it are collective.

    Args:
        keys: what is asked, of which faces.
        world: this rank; the process group must stand.
        side: side of the encoder's input, pixels.
        where: how messages about the folder open.

    Raises:
        UserError: the same on all ranks, for a folder that cannot be used or an image that cannot be read.
    """

    def __init__(self, keys: ProbeKeys, world: World, side: int, where: str | None = None):
        self.keys, self.world = keys, world
        where = where or f"probe.data={keys.data}"
        self.set = distributed.from_main(lambda: read_faces(keys, where))
        self.count = len(self.set.faces)
        mine, told = self.set.faces[world.rank :: world.size], ""
        squares: list[Tensor] = []
        try:
            squares = list(cuts(mine, side, world.cores))
        except UserError as error:
            told = str(error)
        if first := next((text for text in distributed.gather_objects(told) if text), ""):
            raise UserError(first)
        self.squares = torch.stack(squares) if squares else torch.empty(0, side, side, 3, dtype=torch.uint8)

    def __call__(self, encoder: Mapping[str, Tensor], heads: int) -> dict[str, float]:
        """The numbers of an encoder given by timm's names (whole, on every rank), the same on all ranks; NaN where its
        features are not finite. It is copied, and no random generator moves. Collective."""
        began = time.monotonic()
        ridge_on = 2 % self.world.size
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own, cells = self.embed(vit_of(encoder, heads=heads, attention="sdpa").to(self.world.device).eval())
            features = self._in_order(distributed.gather(own))
            gathered = distributed.gather_on(cells, ridge_on) if self.set.points else None
            patches = None if gathered is None else self._in_order(gathered)
        asked: list[Callable[[], dict[str, float]]] = [
            lambda: self.spread(features),
            lambda: self.linear(features) if len(self.set.labels) else {},
            lambda: self.landmarks(patches) if patches is not None else {},
            lambda: self.neighbours(features) if len(self.set.labels) else {},
        ]
        mine: dict[str, float] = {}
        for part in asked[self.world.rank :: self.world.size]:
            mine |= part()
        found = {name: value for part in distributed.gather_objects(mine) for name, value in part.items()}
        return {f"probe/{name}": value for name, value in found.items()} | {"time/probe_s": time.monotonic() - began}

    def embed(self, vit: VisionTransformer) -> tuple[Tensor, Tensor]:
        """Features [n, width] and averaged patch tokens [n, cells·width] of this rank's faces, n the same on all ranks."""
        features, patches = [], []
        for squares in self.squares.split(BATCH) if len(self.squares) else ():
            tokens = vit(squares.to(self.world.device))
            features.append(tokens[:, 0] if self.keys.features == "cls" else tokens[:, 1:].mean(1))
            if self.set.points:
                grid = vit.image_size // vit.patch_size
                maps = tokens[:, 1:].mT.unflatten(-1, (grid, grid))
                patches.append(F.adaptive_avg_pool2d(maps, min(grid, CELLS)).flatten(1))
        most = -(-self.count // self.world.size)
        cells = min(vit.image_size // vit.patch_size, CELLS) ** 2
        return self._filled(features, most, vit.width), self._filled(patches, most, cells * vit.width)

    # --- numbers: each on one rank ------------------------------------------------------------------------------------

    def neighbours(self, features: Tensor) -> dict[str, float]:
        """k-NN among the faces that have the label."""
        known = self._tensor(self.set.labels >= 0)
        labels, groups = self._tensor(self.set.labels)[known], self._tensor(self.set.groups)[known]
        share, _ = (
            numbers.knn(features[known], labels, groups, self.keys.neighbours) if finite(features) else (math.nan, 0)
        )
        return {"knn": share}

    def linear(self, features: Tensor) -> dict[str, float]:
        """Linear probe of the label."""
        if not finite(features):
            return {"linear": math.nan}
        told = self._tensor(self.set.told)
        labels = torch.where(told, self._tensor(self.set.labels), -1)
        return {"linear": numbers.linear_probe(features, labels, self._tensor(self.set.fit))}

    def landmarks(self, patches: Tensor) -> dict[str, float]:
        """Ridge regression of points, judged in the pixels of the original images."""
        if not finite(patches):
            return {"landmark_nme": math.nan, "landmark_r2": math.nan}
        faces, train = self.set.faces, self._tensor(self.set.train)
        targets = torch.stack([points_in_square(face) for face in faces]).to(patches.device).flatten(1)
        told = numbers.ridge(patches, targets, self._tensor(self.set.people), train)
        left = (told - targets[~train]).square().sum()
        about = (targets[~train] - targets[train].mean(0)).square().sum()
        tested = [face for face, fitted in zip(faces, self.set.train) if not fitted]
        found = told.unflatten(1, (-1, 2)).cpu()
        pixels = np.stack([points_in_image(face, points) for face, points in zip(tested, found)])
        true = np.stack([np.asarray(face.points) for face in tested])
        unit = units_of(self.set.points)[0].of(true, np.stack([np.asarray(face.box) for face in tested]))
        return {"landmark_nme": 100 * float(nme(pixels, true, unit).mean()), "landmark_r2": float(1 - left / about)}

    def spread(self, features: Tensor) -> dict[str, float]:
        """How far features fill their space."""
        if not finite(features):
            return {"rank": math.nan, "uniformity": math.nan}
        return {"rank": numbers.effective_rank(features), "uniformity": numbers.uniformity(features)}

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.world.device)

    def _filled(self, parts: list[Tensor], rows: int, width: int) -> Tensor:
        """The parts as [rows, width], zeros at the end: collectives want one shape of all ranks."""
        whole = torch.zeros(rows, width, device=self.world.device)
        if parts:
            found = torch.cat(parts)
            whole[: len(found)] = found
        return whole

    def _in_order(self, gathered: Tensor) -> Tensor:
        """[W, n, D] of all ranks → [N, D]: face i is number i // W of rank i % W."""
        return gathered.transpose(0, 1).flatten(0, 1)[: self.count]


def finite(features: Tensor) -> bool:
    """Whether all are numbers: an encoder that has diverged has no probes, and stops no run."""
    return bool(torch.isfinite(features).all())
