"""What the tests of bad input make and ask: tars, boxes, a packing that is refused, its report."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from scenes import jpeg

from mcf.errors import UserError
from mcf.pack import tars
from mcf.pack.options import PackConfig
from mcf.pack.source import LeftOut
from mcf.pack.writing import pack

BOX = [20.0, 10.0, 80.0, 60.0]
MARKS = [[35.0, 25.0], [60.0, 25.0], [48.0, 35.0], [38.0, 48.0], [58.0, 48.0]]


def write_tar(path: Path, members) -> Path:
    """(name or TarInfo, content) one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, number: int, content: bytes | None = None, **facts):
    facts = {"SAMPLE_ID": number, "width": 96, "height": 64, "original_width": 96, "original_height": 64} | facts
    return [(f"{key}.jpg", content or jpeg(number)), (f"{key}.json", json.dumps(facts).encode()), (f"{key}.txt", b"x")]


def write_boxes(folder: Path, found: dict, name: str = "sample2detect_0.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, folder / name)
    return folder


def options(tmp_path: Path, **keys) -> PackConfig:
    values = {"workers": 1, "size": 32, "min_face": 20, "detections": str(tmp_path / "boxes")} | keys
    return PackConfig(source=str(tmp_path / "source"), out=str(tmp_path / "out"), **values)


def read(path: Path, **keys):
    items = list(tars.entries(path, "t.tar", PackConfig(**keys)))
    good = [item.key for item in items if not isinstance(item, LeftOut)]
    return good, {item.name: item.reason for item in items if isinstance(item, LeftOut)}


def refusal(configured: PackConfig) -> str:
    with pytest.raises(UserError) as caught:
        pack(configured)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/report.json").read_text())
