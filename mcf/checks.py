"""Checks of a recipe across its keys: whatever can be known to be impossible before data or devices are touched."""

from __future__ import annotations

from mcf.config import Recipe


def check(recipe: Recipe) -> None:
    """Raise UserError for the first impossible combination of keys."""
