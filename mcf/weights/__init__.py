"""Weights in and out of files; `load_teacher` is what a run needs of it."""

from mcf.weights.teacher import load_teacher

__all__ = ["load_teacher"]
