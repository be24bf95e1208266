"""The network of METHOD 1: what is trained, what teaches it, and what it is trained for."""

from mcf.models.mcf import MCF, Objective, build_student, dropped
from mcf.models.momentum import MomentumBranch
from mcf.models.regional import compile_blocks, recompute_blocks
from mcf.models.teacher import Teacher

__all__ = [
    "MCF",
    "MomentumBranch",
    "Objective",
    "Teacher",
    "build_student",
    "compile_blocks",
    "dropped",
    "recompute_blocks",
]
