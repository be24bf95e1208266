"""The operations of the training step that have, or will have, a kernel of their own.

`reference` is the truth of each in plain PyTorch, and the CPU's path. Importing this package needs neither a GPU nor
Triton, and nothing of the rest of mcf.
"""

from mcf.kernels.feature_loss import feature_loss, feature_tap
from mcf.kernels.reference import (
    ENCODER,
    FLIP,
    MOMENTUM,
    info_nce,
    mask,
    patch_gather,
    philox,
    rank,
    token_restore,
    uniform,
)

__all__ = [
    "ENCODER",
    "FLIP",
    "MOMENTUM",
    "feature_loss",
    "feature_tap",
    "info_nce",
    "mask",
    "patch_gather",
    "philox",
    "rank",
    "token_restore",
    "uniform",
]
