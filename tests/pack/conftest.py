"""Makes tests/laion.py importable here; a small source that several files use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bad import BOX, MARKS, sample, write_boxes, write_tar  # needs the path


@pytest.fixture
def small(tmp_path) -> Path:
    """One tar of three images, boxes for them."""
    write_tar(tmp_path / "source/split_00000/00000.tar", [m for i in range(3) for m in sample(f"00000000{i}", i)])
    write_boxes(tmp_path / "boxes", {i: [(BOX, MARKS, 0.99)] for i in range(3)})
    return tmp_path
