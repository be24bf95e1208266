"""Weights in and out of files; `read_start`, `read_teacher` and `build_teacher` are what a run needs of it."""

from mcf.weights.start import read_start
from mcf.weights.teacher import build_teacher, load_teacher, read_teacher

__all__ = ["build_teacher", "load_teacher", "read_start", "read_teacher"]
