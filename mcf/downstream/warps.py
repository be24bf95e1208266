"""A face → the square a network sees, and predictions back into the original image.

    box crop      x' = (x − x1) / (x2 − x1) · S − 0.5                                  (align_corners=False)
    similarity    the turn, scale and shift that bring five points nearest to five standard ones
    tanh-warp     |c| ≤ 1 − a stays; beyond, c' = tanh((c − (1 − a)) / a) · a + (1 − a), mirrored
                  (Lin et al., CVPR 2019; Zheng et al., CVPR 2022)

A warp is a matrix [3, 3] from pixels of the original to pixels of a square of side S, then the tanh-warp of that square
with factor a (0: none), in coordinates c = 2x/S − 1. Pixel (0, 0) has its centre at (0, 0). Matrices and points are
float64; images are sampled for whole batches by grid_sample, on whichever device they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Eyes, tip of the nose, corners of the mouth in a square of side 512.
STANDARD_POINTS = torch.tensor(
    [[196.0, 226.0], [316.0, 226.0], [256.0, 286.0], [220.0, 360.4], [292.0, 360.4]], dtype=torch.float64
)
STANDARD_SIZE = 512
CLAMP = 0.999  # of arctanh's argument: the edge of the square is the end of the world


@dataclass(frozen=True)
class Warp:
    """From original images to squares: matrix float64 [..., 3, 3], side S of the square, factor a of its tanh-warp."""

    matrix: Tensor
    size: int
    factor: float = 0.0

    def points(self, points: Tensor) -> Tensor:
        """Points [..., P, 2] (x, y) of the original, in pixels of the square; float64."""
        return _squeeze(_apply(self.matrix, points), self.size, self.factor)

    def points_back(self, points: Tensor) -> Tensor:
        """Points [..., P, 2] of the square, in pixels of the original; float64."""
        return _apply(torch.linalg.inv(self.matrix), _stretch(points.double(), self.size, self.factor))

    def images(self, images: Tensor, mode: str = "bilinear") -> Tensor:
        """Originals [B, C, H, W] → squares [B, C, S, S] in float32; 0 outside of the originals. `matrix` is [B, 3, 3].

        Args:
            images: any number type; smaller images of a batch stand at the top left, with 0 around them.
            mode: bilinear for colours, nearest for classes.
        """
        where = self.points_back(_pixels(self.size, self.size, images.device).expand(len(images), -1, -1))
        grid = where.view(len(images), self.size, self.size, 2)
        return _sample(images, grid, mode)

    def images_back(self, squares: Tensor, height: int, width: int) -> Tensor:
        """Squares [B, C, S, S] (logits, say) → [B, C, height, width] at the originals' pixels, bilinear; 0 outside."""
        where = self.points(_pixels(height, width, squares.device).expand(len(squares), -1, -1))
        return _sample(squares, where.view(len(squares), height, width, 2), "bilinear")

    def to(self, device: torch.device) -> Warp:
        """The same on another device."""
        return Warp(self.matrix.to(device), self.size, self.factor)


def box_matrix(box: Tensor, size: int) -> Tensor:
    """The crop of boxes [..., 4] (left, top, right, bottom) as a matrix [..., 3, 3] onto a square of side `size`."""
    left, top, right, bottom = box.double().unbind(-1)
    x, y = size / (right - left), size / (bottom - top)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows = [x, zero, -left * x - 0.5, zero, y, -top * y - 0.5, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def similarity_matrix(points: Tensor, size: int) -> Tensor:
    """The similarity that brings points [..., 5, 2] nearest (least squares) to the standard points of a square.

    In two dimensions a similarity is one complex factor and a shift: the factor is the regression of the targets on the
    points, both centred. It never mirrors.
    """
    return similarity_between(points, STANDARD_POINTS * (size / STANDARD_SIZE))


def similarity_between(points: Tensor, targets: Tensor) -> Tensor:
    """The similarity [..., 3, 3] with the least squared distance from points [..., P, 2] to targets [P, 2]."""
    source, target = points.double(), targets.double().to(points.device)
    mean, middle = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    s, t = source - mean, target - middle
    square = s.square().sum((-2, -1))
    a = (s * t).sum((-2, -1)) / square
    b = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(-1) / square
    x, y = mean[..., 0, :].unbind(-1)
    u, v = middle[..., 0, :].unbind(-1)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rows = [a, -b, u - a * x + b * y, b, a, v - b * x - a * y, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def about_centre(size: int, scale: float = 1.0, angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Turn by `angle` (radians, from x towards y), scale and shift (pixels) a square about its centre (S − 1)/2."""
    centre = (size - 1) / 2
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor(
        [
            [a, -b, centre - a * centre + b * centre + shift[0]],
            [b, a, centre - b * centre - a * centre + shift[1]],
            [0.0, 0.0, 1.0],
        ],
        dtype=torch.float64,
    )


def needed_region(warp: Warp, height: int, width: int) -> tuple[int, int, int, int]:
    """What a square reads of an original of this height and width: left, top, right, bottom in whole pixels.

    Never empty: where the square lies outside, one pixel is left. With a tanh-warp almost everything is read.
    """
    if warp.factor:
        return 0, 0, width, height
    edge = warp.size
    corners = torch.tensor([[-1.0, -1.0], [edge, -1.0], [-1.0, edge], [edge, edge]], dtype=torch.float64)
    where = warp.points_back(corners)
    low, high = where.amin(0).floor().tolist(), where.amax(0).ceil().tolist()
    left, top = (int(min(max(v, 0), n - 1)) for v, n in zip(low, (width, height)))
    right, bottom = (int(min(max(v + 1, first + 1), n)) for v, first, n in zip(high, (left, top), (width, height)))
    return left, top, right, bottom


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    return points.double() @ matrix[..., :2, :2].mT + matrix[..., :2, 2].unsqueeze(-2)


def _squeeze(x: Tensor, size: int, a: float) -> Tensor:
    """The tanh-warp of coordinates in pixels of the square."""
    if not a:
        return x
    c = x * 2 / size - 1
    beyond = c.abs() - (1 - a)
    warped = torch.where(beyond > 0, c.sign() * (torch.tanh(beyond / a) * a + (1 - a)), c)
    return (warped + 1) / 2 * size


def _stretch(x: Tensor, size: int, a: float) -> Tensor:
    """Its inverse."""
    if not a:
        return x
    c = x * 2 / size - 1
    beyond = c.abs() - (1 - a)
    straight = torch.where(beyond > 0, c.sign() * (torch.atanh((beyond / a).clamp(-CLAMP, CLAMP)) * a + (1 - a)), c)
    return (straight + 1) / 2 * size


def _pixels(height: int, width: int, device: torch.device) -> Tensor:
    """Centres (x, y) of all pixels, row by row: float64 [height·width, 2]."""
    y = torch.arange(height, device=device, dtype=torch.float64)
    x = torch.arange(width, device=device, dtype=torch.float64)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _sample(images: Tensor, where: Tensor, mode: str) -> Tensor:
    """grid_sample at pixels `where` [B, h, w, 2] of images [B, C, H, W]; what lies outside counts as 0."""
    size = torch.tensor([images.shape[-1], images.shape[-2]], device=images.device, dtype=torch.float64)
    grid = ((2 * where + 1) / size - 1).float()
    return F.grid_sample(images.float(), grid, mode=mode, padding_mode="zeros", align_corners=False)
