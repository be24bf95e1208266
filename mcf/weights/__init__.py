"""Weights in and out of files; `read_teacher` and `build_teacher` are what a run needs of it."""

from mcf.weights.teacher import build_teacher, load_teacher, read_teacher

__all__ = ["build_teacher", "load_teacher", "read_teacher"]
