"""What training does to a face: turned, scaled and shifted as it is cut out, then its colours (DOWNSTREAM 2).

A `Draw` holds everything random about one sample, and is a function of (seed, sample) alone, so that neither ranks nor
threads nor restarts change it. Geometry goes into the sample's warp; colours are changed on the device, for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue


@dataclass(frozen=True)
class Draw:
    """The augmentation of one sample.

    scale, angle (radians), shift (share of the side): of the square about its centre. hidden: left, top, right, bottom of
    a black box, shares of the side. noise: how much of the picture gives way to it. gamma: ½, 1 or 2. blur: side of the
    mean's window, share of the picture's. seed: of the noise.
    """

    scale: float
    angle: float
    shift: tuple[float, float]
    hidden: tuple[float, float, float, float] | None
    noise: float
    grey: bool
    gamma: float
    blur: float
    seed: int


def draw(task: Literal["alignment", "parsing"], seed: int, sample: int, scale: float = 1.0) -> Draw:
    """The augmentation of sample number `sample` of a run; `scale` is the data set's own.

    Parsing: shift ±1 %, rotation N(0, 18°), scale N(scale, 0.1). Alignment: shift ±5 %, rotation ±10°, scale ±0.1, all
    uniform; a black box always, noise in half of the samples. Both: grey 0.1, gamma, blur up to 1 %. No flip.
    """
    random = np.random.default_rng((seed, sample))
    if task == "parsing":
        # The released configuration says 0.314 and 0.174 rather than degrees.
        shift, angle, size = 0.01, random.normal(0, 0.314), random.normal(scale, 0.1)
    else:
        shift, angle, size = 0.05, random.uniform(-0.174, 0.174), random.uniform(scale - 0.1, scale + 0.1)
    moved = random.uniform(-shift, shift, 2)
    hidden, noise = None, 0.0
    if task == "alignment":
        height = random.uniform(0.2, 0.8)
        width = random.uniform(height - 0.2, height + 0.2)
        x, y = random.random(2)
        # Shares of half of the picture, about a centre anywhere in it.
        hidden = (x - width / 4, y - height / 4, x + width / 4, y + height / 4)
        noise = random.uniform(0, 0.5) if random.random() < 0.5 else 0.0
    return Draw(
        scale=max(float(size), 0.1),
        angle=float(angle),
        shift=(float(moved[0]), float(moved[1])),
        hidden=hidden,
        noise=float(noise),
        grey=bool(random.random() < 0.1),
        gamma=float(random.choice([0.5, 1.0, 2.0])),
        blur=float(random.uniform(0, 0.01)),
        seed=int(random.integers(2**62)),
    )


def colours(images: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply the draws' colours to images float [B, 3, S, S] in [0, 1]: box, noise, grey, gamma, blur, in this order."""
    side = images.shape[-1]
    out = []
    for image, one in zip(images, draws):
        if one.hidden is not None:
            left, top, right, bottom = (min(max(round(v * side), 0), side) for v in one.hidden)
            image = image.clone()
            image[:, top:bottom, left:right] = 0
        if one.noise:
            # Drawn on the CPU, so that a sample is the same on every device.
            noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(one.seed)).to(image.device)
            image = torch.lerp(image, noise, one.noise)
        if one.grey:
            image = (image * image.new_tensor(GREY)[:, None, None]).sum(0, keepdim=True).expand_as(image)
        if one.gamma != 1.0:
            image = image.clamp(0, 1).pow(one.gamma)
        out.append(box_blur(image, math.floor(side * one.blur)))
    return torch.stack(out)


def box_blur(image: Tensor, window: int) -> Tensor:
    """Mean over window × window pixels, [C, S, S] → [C, S, S]; mirrored at the edge, the edge itself not repeated.

    An even window reaches one pixel further to the left and to the top, as OpenCV's.
    """
    if window < 2:
        return image
    before, after = window // 2, window - 1 - window // 2
    padded = F.pad(image[None], (before, after, before, after), mode="reflect")
    return F.avg_pool2d(padded, window, stride=1)[0]
