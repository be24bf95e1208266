"""Where a benchmark's numbers go: looked at before anything is measured, since that takes minutes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator


def _writable(file: str) -> str:
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written; give a file in a folder that exists")
    return file


JsonFile = Annotated[str, AfterValidator(_writable)]
"""The key of a file that can be written when the keys are read."""


def save(file: str | None, values: Any) -> None:
    """Write numbers as JSON; nothing without a file."""
    if file:
        Path(file).write_text(json.dumps(values, indent=1) + "\n")
