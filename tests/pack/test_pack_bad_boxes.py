"""Whatever may come as a file of boxes or from a detector: one line, or it costs the image alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from bad import BOX, MARKS, options, refusal
from scenes import jpeg, tree

from mcf.errors import UserError
from mcf.pack import detectors
from mcf.pack.writing import pack


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(5):
        (tmp_path / f"source/d{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"source/d{i % 2}/{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def boxes_file(folder: Path, text: str, name: str = "boxes.csv") -> dict:
    (folder / name).write_text(text)
    return {"detections": str(folder / name)}


def test_a_csv_and_a_json_of_the_same_boxes_give_the_same_shards(folder):
    marks = ",".join(f"{axis}{i}" for i in range(5) for axis in "xy")
    points = ",".join(f"{v}" for mark in MARKS for v in mark)
    lines = [f"file,left,top,right,bottom,score,{marks}"]
    lines += [f"d{i % 2}/{i}.jpg,20,10,80,60,0.95,{points}" for i in range(4)]
    content = {f"d{i % 2}/{i}.jpg": [{"box": BOX, "score": 0.95, "landmarks": MARKS}] for i in range(4)}
    for crop in ("face", "aligned"):
        pack(options(folder, crop=crop, **boxes_file(folder, "\n".join(lines))))
        (folder / "out").rename(folder / f"csv-{crop}")
        pack(options(folder, crop=crop, **boxes_file(folder, json.dumps(content), "boxes.json")))
        (folder / "out").rename(folder / f"json-{crop}")
        shards = [
            {n: c for n, c in tree(folder / f"{form}-{crop}").items() if "shard" in n} for form in ("csv", "json")
        ]
        assert shards[0] == shards[1] and len(shards[0]) == 2
        counts = json.loads((folder / f"csv-{crop}/report.json").read_text())
        assert (counts["kept"], counts["left_out"]) == (4, {"not in the detections": 1})


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("file,left,top\n", "b.csv", ":1: no column right"),
        ("file,left,top,right,bottom\nx,1,2,3,four\n", "b.csv", ":2: not a box"),
        ("file,left,top,right,bottom\nx,1,2\n", "b.csv", ":2: not a box"),
        ("{", "b.json", "not valid JSON"),
        ("[1]", "b.json", "a list"),
        ('{"a": [{"score": 1}]}', "b.json", "a: not a list of boxes"),
        ("x", "b.txt", "unknown form"),
        ("file,left,top,right,bottom\nelsewhere.jpg,1,2,30,40\n", "b.csv", "none of the files it names is in"),
    ],
)
def test_files_of_boxes_that_are_none_are_one_line(folder, text, name, words):
    assert words in refusal(options(folder, **boxes_file(folder, text, name)))
    assert words in refusal(options(folder, **boxes_file(folder, text, name), task=0, tasks=2))


def test_a_folder_of_pickles_is_not_for_images_and_a_csv_not_for_tars(folder, small):
    (small / "b.csv").write_text("file,left,top,right,bottom\n")
    assert "give the folder of LAION-Face's" in refusal(options(small, detections=str(small / "b.csv")))
    shutil.rmtree(folder / "source/split_00000")
    assert "give a .csv or .json" in refusal(options(folder))


PLUGIN = """
import numpy as np
def find(image):
    assert image.dtype == np.uint8 and image.shape == (64, 96, 3)
    return [[20, 10, 80, 60]], [0.97], None
def wrong(image):
    return [[1, 2, 3]], [1], None
def broken(image):
    raise ZeroDivisionError("of a detector")
something = 3
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_detector_of_the_users_own(folder, monkeypatch, workers):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    manifest = pack(options(folder, detections=None, detector="own:find", workers=workers, shard_samples=3))
    assert [shard.samples for shard in manifest.shards] == [3, 2]


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        ("own", "give MODULE:FUNCTION"),
        ("own:nothing", "cannot be imported"),
        ("nowhere:find", "cannot be imported"),
        ("own:something", "not a function"),
        ("own:wrong", "gives no (boxes"),
        ("nowhere.onnx", "no such file"),
    ],
)
def test_detectors_that_are_none_are_one_line(folder, monkeypatch, detector, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    assert words in refusal(options(folder, detections=None, detector=detector))


def test_a_detector_that_fails_on_an_image_costs_that_image(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(PLUGIN)
    sys.modules.pop("own", None)
    assert "5 the detector failed" in refusal(options(folder, detections=None, detector="own:broken"))
    assert "ZeroDivisionError: of a detector" in (folder / "out/report.md").read_text()


def test_a_file_that_is_no_yunet_is_one_line(tmp_path):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot read it as YuNet"):
        detectors.finder(str(tmp_path / "x.onnx"))
