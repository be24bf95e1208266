"""The operations of the training step that have a kernel of their own.

Each is one function for every device: its kernel in Triton on a GPU, and `reference`, the truth of each in plain
PyTorch, on a CPU (`implementation=` insists on one; see `dispatch`). Importing this package needs neither a GPU nor
Triton, and nothing of the rest of mcf. A function hides the module of its name: `from mcf.kernels.mask import …` reaches it.
"""

from mcf.kernels.feature_loss import feature_loss, feature_tap
from mcf.kernels.info_nce import info_nce, info_nce_statistics
from mcf.kernels.mask import mask
from mcf.kernels.patch_gather import patch_gather
from mcf.kernels.reference import ENCODER, FLIP, MOMENTUM, InfoNCE, philox, rank, uniform
from mcf.kernels.token_restore import token_restore

__all__ = [
    "ENCODER",
    "FLIP",
    "MOMENTUM",
    "InfoNCE",
    "feature_loss",
    "feature_tap",
    "info_nce",
    "info_nce_statistics",
    "mask",
    "patch_gather",
    "philox",
    "rank",
    "token_restore",
    "uniform",
]
