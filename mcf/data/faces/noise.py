"""Noise tables that repeat: the grain of skin, hair and cloth. The same in every process, whatever is drawn before."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from mcf.data.faces.chart import Floats

CELLS = 256


@lru_cache(maxsize=16)
def table(across: float, along: float) -> Floats:
    """Smooth noise [256, 256] around 0 with deviation 1; `across` and `along` are the grain's sizes in cells."""
    white = np.random.default_rng(20230906).standard_normal((CELLS, CELLS))
    smooth = ndimage.gaussian_filter(white, (across, along), mode="wrap")
    smooth = ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)
    smooth.setflags(write=False)
    return smooth


def at(noise: Floats, u: Floats, v: Floats) -> Floats:
    """Nearest value at cell positions (u, v), which wrap around."""
    i = np.floor(u).astype(np.int32) & (CELLS - 1)
    j = np.floor(v).astype(np.int32) & (CELLS - 1)
    return noise[i, j]
