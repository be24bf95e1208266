"""A fine-tuned model on any picture: cut as in training, predicted, and brought back into the picture's own pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mcf.downstream.alignment import points_of
from mcf.downstream.datasets import Face
from mcf.downstream.datasets.faceset import box_around, read_image
from mcf.downstream.loader import whole_box
from mcf.downstream.network import Network
from mcf.downstream.saved import Description
from mcf.downstream.warps import Warp, about_centre, box_matrix

SETTLED = 0.005  # of the box's side: how far points move, at the mean, between two looks at the same face


class Predictor:
    """Predicts one picture at a time.

    A box is the face's as its data set annotates it. Without one the whole picture is the square that the network sees:
    the face fills it as it fills the crops of training.
    """

    def __init__(self, network: Network, description: Description):
        self.network, self.description = network, description

    def __call__(
        self, picture: Path, box: NDArray[np.float64] | None = None, looks: int = 1
    ) -> tuple[NDArray[np.uint8], NDArray]:
        """The picture, uint8 [H, W, 3], upright, and points [P, 2] or classes [H, W] in its pixels.

        looks: of a model of points at most, each after the first cut around the points of the one before; fewer where
            the points stay where they are. A face that is far from filling the picture is approached step by step.

        Raises UserError for a file that is no picture.
        """
        image = read_image(Face(picture.name, picture))
        warp = self.warp(box, image.shape)
        if self.description.task == "parsing":
            return image, self.classes(image, warp)
        points = self.points(image, warp)
        # AFLW's boxes are no function of its points; those of all other sets are as box_around makes them.
        for _ in range(looks - 1 if self.description.dataset != "aflw19" else 0):
            around = box_around(points)
            before, points = points, self.points(image, self.warp(around, image.shape))
            if np.linalg.norm(points - before, axis=1).mean() < SETTLED * (around[2] - around[0]):
                break
        return image, points

    def warp(self, box: NDArray[np.float64] | None, shape: tuple[int, ...]) -> Warp:
        """The cut of a box at the scale of training, or of the whole picture as it is."""
        d = self.description
        if box is None:
            return Warp(box_matrix(whole_box((shape[0], shape[1])), d.warp_size), d.warp_size, d.warp)
        matrix = about_centre(d.warp_size, d.scale) @ box_matrix(torch.from_numpy(box), d.warp_size)
        return Warp(matrix, d.warp_size, d.warp)

    def points(self, image: NDArray[np.uint8], warp: Warp) -> NDArray[np.float64]:
        """Points [P, 2] in pixels of the image."""
        (found,) = points_of(self.logits(image, warp).float().sigmoid()).double().cpu()
        return warp.points_back(found * warp.size - 0.5).numpy()

    def classes(self, image: NDArray[np.uint8], warp: Warp) -> NDArray[np.uint8]:
        """Classes [H, W] of the image's pixels; background outside of the cut."""
        size = (warp.size, warp.size)
        square = F.interpolate(self.logits(image, warp).float(), size, mode="bilinear", align_corners=False)
        back = Warp(warp.matrix[None], warp.size, warp.factor).to(square.device)
        return back.images_back(square, image.shape[0], image.shape[1])[0].argmax(0).cpu().numpy().astype(np.uint8)

    @torch.no_grad()
    def logits(self, image: NDArray[np.uint8], warp: Warp) -> Tensor:
        """The network's output [1, C, h, w] of the cut."""
        device = next(self.network.parameters()).device
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
        square = Warp(warp.matrix[None], warp.size, warp.factor).to(device).images(pixels) / 255
        side = self.description.input_size
        if square.shape[-1] != side:
            square = F.interpolate(square, (side, side), mode="bilinear", align_corners=False)
        return self.network(square)
